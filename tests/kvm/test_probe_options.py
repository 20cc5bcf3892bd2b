"""Each word of the probe guest's command line, without a migration in the way."""

from __future__ import annotations

import threading
from pathlib import Path

import attrs
import pytest
import trio

from trivmm import CpusConfig, Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.memory.guest import GuestMemory
from trivmm.testing.blocks import has_direct
from trivmm.testing.kernels import PACKINGS, make_bzimage
from trivmm.vm import VmState, open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 120  # generous: about 1 % of all events take 0.1 to 1 s on a busy host
ENOUGH = 20  # activations of each device


def probe_config(folder: Path, *, cpus: int, sectors: int = 256, **options: object) -> VmConfig:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(512 * sectors))
    cmdline = probe_cmdline(cpus=cpus, report=200, rate=300, mem=8, cycle="rng,blk", **options)
    return VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def worked(vm: Vm, folder: Path) -> ProbeReport:
    """The first report after both devices were activated, used and checked often enough."""
    report = report_of(folder)
    while min(report.rng_act, report.blk_act) < ENOUGH and not report.problems:
        await vm.console_output()
        report = report_of(folder)
    return report


@pytest.mark.parametrize(
    ("cpus", "options"),
    [
        (1, {"event_idx": 1}),
        (1, {"indirect": 1}),
        (1, {"window": 1}),
        (2, {"window": 1, "race": 1, "event_idx": 1, "indirect": 1}),
        (8, {}),
    ],
    ids=["event_idx", "indirect", "window", "all-and-race", "eight-vcpus"],
)
async def test_devices_cycle(tmp_path: Path, cpus: int, options: dict[str, int]) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(probe_config(tmp_path, cpus=cpus, **options)) as vm:
            await vm.boot()
            report = await worked(vm, tmp_path)
            assert (report.problems, report.errors, report.stuck, report.needs_reset) == ((), 0, 0, 0)
            assert report.cpus == cpus
            assert report.dirtied > 0
            assert report.checked > report.pages
            assert bool(report.raced) == ("race" in options)
            if not report.raced:
                assert report.rng_ios >= 2 * (report.rng_act - 1)


@pytest.mark.parametrize("direct", [False, True])
async def test_the_guest_discards_and_zeroes_by_every_queue(tmp_path: Path, direct: bool) -> None:
    """It checks itself what it reads after that; here is looked at the holes, and at what the disk counted."""
    if direct and not has_direct(tmp_path):
        pytest.skip("the folder for temporary files has no direct I/O: give --basetemp on a disk")
    config = probe_config(tmp_path, cpus=2, blk_queues=4, blk_clear=1)
    (disk,) = config.disks
    image = Path(disk.path)
    image.write_bytes(b"\xee" * (512 * 256))
    before = image.stat().st_blocks
    config = attrs.evolve(config, disks=(attrs.evolve(disk, num_queues=4, direct=direct),))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            report = await worked(vm, tmp_path)
            while min(report.counts["blk_discards"], report.counts["blk_zeroings"]) < ENOUGH and not report.problems:
                await vm.console_output()
                report = report_of(tmp_path)
            counters = vm.counters()["_disk0"]
            holes = before - image.stat().st_blocks
    assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
    assert report.counts["blk_queues_used"] == 0b1111
    assert counters["discard_ops"] >= ENOUGH
    assert counters["write_zeroes_ops"] >= ENOUGH
    assert (counters["errors"], counters["io_errors"]) == (0, 0)
    assert holes > 0


@pytest.mark.parametrize("spoiled", [False, True])
async def test_a_load_checks_each_block_that_it_reads(tmp_path: Path, spoiled: bool) -> None:
    """What benchmarks/disks.py counts on."""
    config = probe_config(tmp_path, cpus=1)
    cmdline = probe_cmdline(cpus=1, report=200, rate=0, mem=2, cycle="load", load_depth=8)
    numbers = [number if number != 3 or not spoiled else 4 for number in range(32)]
    Path(config.disks[0].path).write_bytes(b"".join(number.to_bytes(8, "little").ljust(4096) for number in numbers))
    config = attrs.evolve(config, payload=attrs.evolve(config.payload, cmdline=cmdline))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            report = report_of(tmp_path)
            while report.counts.get("load_ios", 0) < 500 and not report.problems:
                await vm.console_output()
                report = report_of(tmp_path)
    assert bool(report.problems) == spoiled
    assert not spoiled or "LOST block" in report.problems[0]


@pytest.mark.parametrize("packing", PACKINGS)
async def test_a_bzimage_boots(tmp_path: Path, packing: str) -> None:
    config = probe_config(tmp_path, cpus=1, once=2)
    vmlinuz = tmp_path / "vmlinuz"
    vmlinuz.write_bytes(make_bzimage(probe_path().read_bytes(), packing))
    config = attrs.evolve(config, payload=attrs.evolve(config.payload, kernel=str(vmlinuz)))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
    report = report_of(tmp_path)
    assert (report.ready, report.problems, report.errors) == (True, (), 0)


async def test_a_disk_smaller_than_asked_for(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(probe_config(tmp_path, cpus=1, sectors=8)) as vm:
            await vm.boot()
            assert (await worked(vm, tmp_path)).problems == ()


async def test_seven_disks_keep_to_themselves(tmp_path: Path) -> None:
    config = probe_config(tmp_path, cpus=2, disks=7)
    for number in range(6):
        (tmp_path / f"disk{number}.img").write_bytes(bytes(512 * 256))
    more = tuple(DiskConfig(str(tmp_path / f"disk{number}.img")) for number in range(6))
    config = attrs.evolve(config, disks=config.disks + more)
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            report = report_of(tmp_path)
            while report.blk_act < 7 * ENOUGH and not report.problems:
                await vm.console_output()
                report = report_of(tmp_path)
    assert (report.problems, report.errors, report.stuck, report.needs_reset) == ((), 0, 0, 0)
    assert "absent" not in (tmp_path / "serial.txt").read_text()
    images = {path.read_bytes() for path in tmp_path.glob("disk*.img")}
    assert len(images) == 7  # each has its own contents


async def test_once_powers_off(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(probe_config(tmp_path, cpus=1, once=5)) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
    assert "PROBE off" in (tmp_path / "serial.txt").read_text()


async def test_reboot_begins_anew(tmp_path: Path) -> None:
    rebooted = trio.Event()

    def note(event: Event) -> None:
        if event.event == "rebooted":
            rebooted.set()

    with trio.fail_after(LIMIT_S):
        async with open_vm(probe_config(tmp_path, cpus=2, reboot=5)) as vm:
            vm.events.listen(note)
            await vm.boot()
            await rebooted.wait()
            while (tmp_path / "serial.txt").read_text(errors="replace").count("PROBE ready") < 2:
                await vm.console_output()
            assert vm.reboots >= 1
            assert report_of(tmp_path).problems == ()


async def test_q_on_the_console_powers_off(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(probe_config(tmp_path, cpus=1)) as vm:
            await vm.boot()
            await vm.wait_for_console("PROBE ready")
            vm.console_input(b"q")
            assert (await vm.wait()).kind == "poweroff"


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "expires"])
async def test_freeing_a_guests_memory_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The kernel takes seconds for a big guest; meanwhile the other VMs of this process must run."""
    freeing, go_on, free = trio.Event(), threading.Event(), GuestMemory.close

    def slow(memory: GuestMemory) -> None:
        if threading.current_thread() is not threading.main_thread():  # the workers' holds end in the trio thread
            trio.from_thread.run_sync(freeing.set)
            assert go_on.wait(LIMIT_S)
        free(memory)

    monkeypatch.setattr(GuestMemory, "close", slow)
    config = probe_config(tmp_path, cpus=1)
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, free=LIMIT_S if waits else 0.1))
    with trio.fail_after(LIMIT_S):
        async with open_vm(config) as vm:
            await vm.boot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.shutdown)
                await freeing.wait()
                assert vm.state is VmState.RUNNING
                if waits:
                    go_on.set()
            assert vm.state is VmState.SHUTDOWN
            await vm.boot()
            await vm.wait_for_console("PROBE ready")
            go_on.set()
