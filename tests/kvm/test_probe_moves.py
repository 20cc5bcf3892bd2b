"""The probe guest moves live while it cycles its devices without rest; it says itself whether anything was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm import (
    CpusConfig,
    Deadlines,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    Vm,
    VmConfig,
    open_incoming,
    open_vm,
)
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path

pytestmark = pytest.mark.kvm

LIMIT_S = 200  # generous: about 1 % of all events take 0.1 to 1 s on a busy host


def probe_config(folder: Path, *, cpus: int = 2, memory: int = 64 << 20, **options: object) -> VmConfig:
    disk = folder / "disk.img"
    if not disk.exists():
        disk.write_bytes(bytes(8 << 20))
    cmdline = probe_cmdline(cpus=cpus, report=200, **options)
    return VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(memory),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def fresh_report(vm: Vm) -> None:
    """Wait until the guest has printed two more report lines, so that at least one began after this call."""
    for _ in range(2):
        seen = vm.console_tail.count(b"PROBE t=")
        while vm.console_tail.count(b"PROBE t=") <= seen:
            await vm.console_output()


@asynccontextmanager
async def limited() -> AsyncIterator[None]:
    with trio.fail_after(LIMIT_S):
        yield


async def move(vm: Vm, url: str, stack: AsyncExitStack) -> Vm:
    """Move ``vm`` to a new receiver in this program; gives the VM on the other side, whose scope is ``stack``'s."""
    incoming = await stack.enter_async_context(open_incoming(url, deadlines=vm.deadlines, hypervisor=vm.hypervisor))
    moved: list[Vm] = []

    async def receive() -> None:
        moved.append(await incoming.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await vm.migrate_to(incoming.url)
    return moved[0]


async def test_one_vcpu_moves_over_unix(tmp_path: Path) -> None:
    async with limited(), AsyncExitStack() as stack:
        vm = await stack.enter_async_context(open_vm(probe_config(tmp_path, cpus=1, rate=200, cycle="rng,blk")))
        await vm.boot()
        await vm.wait_for_console("PROBE ready")
        await fresh_report(vm)
        before = report_of(tmp_path)
        vm = await move(vm, f"unix:{tmp_path}/m.sock", stack)
        await fresh_report(vm)
        after = report_of(tmp_path)
        assert after.errors == 0
        assert after.stuck == 0
        assert after.checked > before.checked
        assert after.rng_act > before.rng_act
        assert after.blk_act > before.blk_act


async def test_twenty_moves_of_a_guest_that_cycles_its_devices(tmp_path: Path) -> None:
    async with limited(), AsyncExitStack() as stack:
        config = probe_config(tmp_path, cpus=2, rate=300, cycle="rng,blk", window=1, race=1)
        vm = await stack.enter_async_context(open_vm(config))
        await vm.boot()
        await vm.wait_for_console("PROBE ready")
        for number in range(20):
            url = f"unix:{tmp_path}/m{number}.sock" if number % 2 else "tcp:127.0.0.1:0"
            async with AsyncExitStack() as next_stack:
                vm = await move(vm, url, next_stack)
                await stack.aclose()
                stack = next_stack.pop_all()
        await fresh_report(vm)
        after = report_of(tmp_path)
        assert after.errors == 0
        assert after.stuck == 0
        await stack.aclose()
