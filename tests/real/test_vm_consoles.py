"""Console lines over a VM's life: boot, reboot, migration, failures. Real board and files, scripted vCPUs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import attrs
import pytest
import trio

from trivmm import ConsoleConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig, VmState
from trivmm.errors import CommitRefused, ConfigError, MigrationInDoubt, WrongState
from trivmm.guest import probe_path
from trivmm.machine.machine import Machine
from trivmm.platform.sinks import SocketSink
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.testing.sides import two_sides
from trivmm.vm import open_vm

LIMIT_S = 60


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    kernel = tmp_path / "kernel.elf"
    shutil.copy(probe_path(), kernel)
    return VmConfig(
        PayloadConfig(str(kernel)),
        memory=MemoryConfig(8 << 20),
        serial=SerialConfig("Socket", socket=str(tmp_path / "serial.sock")),
        console=ConsoleConfig("Pty"),
        deadlines=Deadlines(downtime=10, commit=0.3),
    )


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def say(vm: Vm, data: bytes) -> None:
    assert vm.host.machine is not None
    for at in range(len(data)):
        vm.host.machine.board.serial.write(0, data[at : at + 1])


async def test_a_life(config: VmConfig, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
            assert vm.pty_paths == {}
            for line in ("serial", "console", "no such"):
                with pytest.raises(WrongState, match=line):
                    vm.console_input(b"x", line)
            await vm.boot()
            path = vm.pty_paths["console"]
            assert vm.console_input(b"x", "console") == 1
            await vm.feed_console(b"yz", "console")
            client = await trio.open_unix_socket(tmp_path / "serial.sock")
            await vm.reboot()
            assert vm.pty_paths == {"console": path}
            say(vm, b"!")
            assert await client.receive_some() == b"!"
            await vm.shutdown()
            assert vm.pty_paths == {}
            assert await client.receive_some() == b""
            await client.aclose()
            assert not (tmp_path / "serial.sock").exists()
            await vm.boot()
            assert set(vm.pty_paths) == {"console"}
            vm.terminal_resized()  # there is none: nothing to tell


@pytest.mark.parametrize("spoil", ["kernel", "socket"])
async def test_a_boot_that_fails_leaves_nothing_open(config: VmConfig, tmp_path: Path, spoil: str) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
            await trio.lowlevel.checkpoint()
            before = open_descriptors()
            other = SocketSink(str(tmp_path / "serial.sock"), "serial") if spoil == "socket" else None
            if spoil == "kernel":
                Path(config.payload.kernel).unlink()
            with pytest.raises(ConfigError, match=r"serial\.socket = .*in use" if other else "kernel"):
                await vm.boot()
            if other is not None:
                other.close()
            assert (vm.pty_paths, vm.state) == ({}, VmState.CREATED)
            assert open_descriptors() == before
            assert not (tmp_path / "serial.sock").exists()


async def test_a_reboot_that_fails_closes_what_it_had_kept(config: VmConfig, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
            await vm.boot()
            Path(config.payload.kernel).unlink()
            with pytest.raises(ConfigError, match="kernel"):
                await vm.reboot()
            assert (vm.pty_paths, vm.state) == ({}, VmState.SHUTDOWN)
            assert not (tmp_path / "serial.sock").exists()


async def test_a_move_hands_the_socket_over_and_makes_a_new_pty(config: VmConfig, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, target, move):
            path = source.pty_paths["console"]
            client = await trio.open_unix_socket(tmp_path / "serial.sock")
            say(source, b"here")
            assert await client.receive_some() == b"here"
            await move()
            assert source.pty_paths == {}
            assert target.pty_paths["console"] != path
            assert await client.receive_some() == b""
            await client.aclose()
            client = await trio.open_unix_socket(tmp_path / "serial.sock")
            say(target, b"there")
            assert await client.receive_some() == b"there"
            await client.aclose()


async def test_a_destination_that_cannot_have_the_socket_is_refused_and_the_client_notices_nothing(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes the path in the moment in which the source has let go of it."""
    take = Machine.take_locks
    taken: list[SocketSink] = []

    async def after_another(machine: Machine) -> None:
        await take(machine)
        if machine.board.serial.sink is None:  # the destination
            taken.append(SocketSink(str(tmp_path / "serial.sock"), "another"))
        monkeypatch.setattr(Machine, "take_locks", take)

    start = Machine.start

    async def refused(machine: Machine) -> None:
        try:
            await start(machine)
        finally:
            taken[0].close()

    monkeypatch.setattr(Machine, "take_locks", after_another)
    monkeypatch.setattr(Machine, "start", refused)
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, target, move):
            client = await trio.open_unix_socket(tmp_path / "serial.sock")
            with pytest.raises(CommitRefused, match=r"serial\.socket = .*in use"):
                await move()
            assert (source.state, target.pty_paths) == (VmState.RUNNING, {})
            say(source, b"still here")
            assert await client.receive_some() == b"still here"
            await client.aclose()
            again = await trio.open_unix_socket(tmp_path / "serial.sock")
            await again.aclose()


async def test_a_vm_in_doubt_has_let_go_of_its_socket_until_it_is_resumed(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold(machine: Machine) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Machine, "start", hold)
    path = tmp_path / "serial.sock"
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, _, move):
            with pytest.raises(MigrationInDoubt):
                await move()
            assert source.in_doubt
            assert not path.exists()
            other = SocketSink(str(path), "another")
            with pytest.raises(ConfigError, match=r"serial\.socket = .*in use"):
                await source.resume(force=True)  # the destination can't say: nobody will know
            other.close()
            await source.resume(force=True)
            assert (source.state, source.in_doubt) == (VmState.RUNNING, False)
            client = await trio.open_unix_socket(path)
            say(source, b"back")
            assert await client.receive_some() == b"back"
            await client.aclose()


async def test_the_console_comes_first_on_the_bus_and_only_where_there_is_one(config: VmConfig) -> None:
    def tree(vm: Vm) -> dict[str, str]:
        nodes = vm.info()["device_tree"]
        return {node["children"][0]: node["pci_bdf"] for node in nodes.values() if "pci_bdf" in node}

    off = attrs.evolve(config, console=ConsoleConfig("Off"))
    named = attrs.evolve(config, console=ConsoleConfig("Null", id="con0", pci_device_id=7))
    with trio.fail_after(LIMIT_S):
        for given, found in (
            (config, {"__console": "0000:00:01.0", "__rng": "0000:00:02.0"}),
            (off, {"__rng": "0000:00:01.0"}),
            (named, {"con0": "0000:00:07.0", "__rng": "0000:00:01.0"}),
        ):
            async with open_vm(given, hypervisor=ScriptedHypervisor()) as vm:
                await vm.boot()
                assert tree(vm) == found
                assert ("__console" in vm.counters()) == ("__console" in found)
