"""A distribution's kind of kernel file, from the VM's side: boot, reboot, a destination's look at it, cancellation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, VmState, open_incoming, open_vm
from trivmm.boot import bzimage
from trivmm.errors import ConfigError, MigrationError
from trivmm.guest import parse_report, probe_cmdline, probe_path
from trivmm.testing.kernels import PACKINGS, make_bzimage, wrap
from trivmm.testing.scripted import ScriptedHypervisor

LIMIT_S = 120


def config_of(kernel: Path, cmdline: str = "") -> VmConfig:
    serial = SerialConfig("File", str(kernel.with_name("serial.txt")))
    return VmConfig(PayloadConfig(str(kernel), cmdline), memory=MemoryConfig(64 << 20), serial=serial)


@pytest.fixture
def vmlinuz(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(probe_path().read_bytes(), "zstd"))
    return path


async def test_it_boots_reboots_and_moves(vmlinuz: Path, tmp_path: Path) -> None:
    hypervisor, url = ScriptedHypervisor(), f"unix:{tmp_path}/m.sock"
    with trio.fail_after(LIMIT_S):
        async with (
            open_vm(config_of(vmlinuz), hypervisor=hypervisor) as vm,
            open_incoming(url, hypervisor=hypervisor) as incoming,
        ):
            await vm.boot()
            await vm.reboot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                await vm.migrate_to(url)
            await incoming.vm.reboot()
            assert incoming.vm.state is VmState.RUNNING


async def test_a_destination_refuses_a_kernel_that_it_could_not_reboot(vmlinuz: Path, tmp_path: Path) -> None:
    hypervisor, url = ScriptedHypervisor(), f"unix:{tmp_path}/m.sock"
    with trio.fail_after(LIMIT_S):
        async with (
            open_vm(config_of(vmlinuz), hypervisor=hypervisor) as vm,
            open_incoming(url, hypervisor=hypervisor) as incoming,
        ):
            await vm.boot()
            vmlinuz.write_bytes(wrap(b"\x89LZO\0\r\n\x1a\n" + bytes(100)))
            refused: list[ConfigError] = []

            async def receive() -> None:
                with pytest.raises(ConfigError) as caught:
                    await incoming.receive()
                refused.append(caught.value)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                with pytest.raises(MigrationError, match="packed by lzo"):
                    await vm.migrate_to(url)
            assert "extract-vmlinux" in str(refused[0])
            assert vm.state is VmState.RUNNING


@pytest.mark.soft
@pytest.mark.parametrize("packing", ["lz4", "xz"])
async def test_it_runs(tmp_path: Path, packing: str) -> None:
    soft = pytest.importorskip("trivmm.hypervisor.soft")
    pytest.importorskip("unicorn")
    vmlinuz = tmp_path / "vmlinuz"
    vmlinuz.write_bytes(make_bzimage(probe_path().read_bytes(), packing))
    config = config_of(vmlinuz, probe_cmdline(cpus=1, mem=8, cycle="rng", once=3))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=soft.SoftHypervisor()) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
    report = parse_report((tmp_path / "serial.txt").read_text())
    assert (report.ready, report.problems) == (True, ())


@pytest.mark.soft
async def test_a_boot_that_is_cancelled_does_not_wait_until_all_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft = pytest.importorskip("trivmm.hypervisor.soft")
    pytest.importorskip("unicorn")
    at_work, cancelled = threading.Event(), threading.Event()
    after = 0

    def endless(payload: object) -> Iterator[bytes]:
        nonlocal after
        yield b"\x7fELF"
        at_work.set()
        assert cancelled.wait(LIMIT_S)
        while after < 100:  # the check is the next thing that happens
            after += 1
            yield b"\0"

    monkeypatch.setattr(bzimage, "DECODERS", ((b"\x1f\x8b", "gzip", endless),))
    vmlinuz = tmp_path / "vmlinuz"
    vmlinuz.write_bytes(wrap(PACKINGS["gzip"](bytes(1 << 20))))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(vmlinuz), hypervisor=soft.SoftHypervisor()) as vm:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.boot)
                await trio.to_thread.run_sync(at_work.wait, LIMIT_S)
                nursery.cancel_scope.cancel()
                cancelled.set()
            assert vm.state is VmState.CREATED
    assert after < 100
