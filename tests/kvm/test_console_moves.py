"""virtio-console and pseudo-terminals with a real guest: the probe echoes what is typed, wherever it runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

from trivmm import ConsoleConfig, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.driver import until
from trivmm.testing.road import console_of, open_road
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 120


def config_of(folder: Path, *, console: str = "Pty", **options: object) -> VmConfig:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    words: dict[str, object] = {"cpus": 1, "report": 100, "mem": 8, "echo": 1, **options}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        console=ConsoleConfig(console, socket=str(folder / "console.sock")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


class Terminal:
    """A client of a pseudo-terminal, or of anything else with a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    @classmethod
    def open(cls, vm: Vm, line: str = "console") -> Terminal:
        return cls(os.open(vm.pty_paths[line], os.O_RDWR | os.O_NOCTTY))

    async def read(self, length: int) -> bytes:
        got = b""
        while len(got) < length:
            await trio.lowlevel.wait_readable(self.fd)
            piece = os.read(self.fd, 65536)
            assert piece
            got += piece
        return got

    async def write(self, data: bytes) -> None:
        while data:
            await trio.lowlevel.wait_writable(self.fd)
            data = data[os.write(self.fd, data) :]

    async def echo(self, data: bytes) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.write, data)
            assert await self.read(len(data)) == data

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)


def pattern(length: int) -> bytes:
    return b"".join(b"%06d " % number for number in range(-(-length // 7)))[:length]


@pytest.mark.parametrize("options", [{}, {"event_idx": 1, "indirect": 1}], ids=["plain", "event_idx-indirect"])
async def test_the_guest_echoes_on_a_pty(tmp_path: Path, options: dict[str, int]) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path, **options)) as vm:
            assert vm.pty_paths == {}
            await vm.boot()
            assert set(vm.pty_paths) == {"console"}
            tree = vm.info()["device_tree"]
            assert (tree["_virtio-pci-__console"]["pci_bdf"], tree["_virtio-pci-_disk0"]["pci_bdf"]) == (
                "0000:00:01.0",
                "0000:00:02.0",
            )
            terminal = Terminal.open(vm)
            await terminal.echo(pattern(20_000))  # more than the rings and the terminal hold
            terminal.close()
            counted = vm.counters()["__console"]
            assert (counted["received_bytes"], counted["transmitted_bytes"]) == (20_000, 20_000)
            assert report_of(tmp_path).problems == ()
            await vm.shutdown()
            assert vm.pty_paths == {}


async def test_a_reboot_keeps_the_pty_and_its_client(tmp_path: Path) -> None:
    config = attrs.evolve(config_of(tmp_path), serial=SerialConfig("Pty"))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            before = vm.pty_paths
            assert set(before) == {"serial", "console"}
            terminal, serial = Terminal.open(vm), Terminal.open(vm, "serial")
            await terminal.echo(b"before")
            await vm.reboot()
            assert vm.pty_paths == before
            await terminal.echo(b"after")
            said = b""
            while said.count(b"PROBE ready") < 2:
                said += await serial.read(1)
            await serial.write(b"q")  # the serial port's other direction
            assert (await vm.wait()).kind == "poweroff"
            terminal.close()
            serial.close()


@pytest.mark.parametrize("url", ["unix", "tcp"])
async def test_what_was_typed_before_a_move_is_echoed_after_it(tmp_path: Path, url: str) -> None:
    """The guest stands still while it is typed: all but its one buffer is in the device's ring at the switchover."""
    typed = pattern(4000)
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path)) as road:
            source = road.vm
            here = Terminal.open(source)
            await here.echo(b"warm")
            await source.pause()
            await here.write(typed)
            await until(lambda: source.counters()["__console"]["rx_bytes"] == 4 + len(typed))
            await road.move(f"unix:{tmp_path}/m.sock" if url == "unix" else "tcp:127.0.0.1:0")
            here.close()
            there = Terminal.open(road.vm)
            await road.vm.resume()
            assert await there.read(len(typed)) == typed
            await there.echo(b"and on it goes")
            there.close()
            assert report_of(tmp_path).problems == ()


async def test_a_console_in_full_flow_moves(tmp_path: Path) -> None:
    """What the source had taken comes out on one of the two sides, once and in order."""
    typed, here = pattern(2_000_000), bytearray()
    flowing = trio.Event()
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, console="Socket", rate=200)) as road:
            first = await trio.open_unix_socket(tmp_path / "console.sock")
            machine = road.vm.host.machine
            assert machine is not None
            line = machine.board.lines["console"]

            async def type_on() -> None:
                with pytest.raises(trio.BrokenResourceError):  # its VMM goes away in the middle
                    await first.send_all(typed)

            async def hear_to_the_end() -> None:
                with suppress(trio.BrokenResourceError):  # what is left unread by the VMM makes it one
                    while piece := await first.receive_some():
                        here.extend(piece)
                        if len(here) > 5000:
                            flowing.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(type_on)
                nursery.start_soon(hear_to_the_end)
                await flowing.wait()
                await road.move(f"unix:{tmp_path}/m.sock")
            taken = line.counters()["rx_bytes"]
            assert 0 < len(here) < taken < len(typed)
            second = Terminal((await trio.open_unix_socket(tmp_path / "console.sock")).socket.detach())
            assert bytes(here) + await second.read(taken - len(here)) == typed[:taken]
            await second.echo(b"and on it goes")
            second.close()
            await first.aclose()
            assert report_of(tmp_path).problems == ()


async def test_a_socket_goes_with_the_vm(tmp_path: Path) -> None:
    """Both sides have the same path: the source lets go of it at COMMIT."""
    path = tmp_path / "console.sock"
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, console="Socket")) as road:
            for number in range(3):
                client = Terminal((await trio.open_unix_socket(path)).socket.detach())
                await client.echo(b"number %d" % number)
                client.close()
                await road.move(f"unix:{tmp_path}/m{number}.sock")
            await road.vm.shutdown()
            assert not path.exists()


async def test_the_guest_sees_a_new_size(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path, console="Null")) as vm:
            await vm.boot()
            machine = vm.host.machine
            assert machine is not None
            await vm.wait_for_console("PROBE t=")
            console_of(machine.board).resize(132, 43)
            while (report := report_of(tmp_path)).cols != 132:
                await vm.console_output()
            assert (report.rows, report.problems) == (43, ())
