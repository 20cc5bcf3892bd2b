"""The probe guest moves live while it cycles its devices without rest; it says itself whether anything was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from trivmm import CpusConfig, Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.blocks import has_direct
from trivmm.testing.road import Road, open_road

pytestmark = pytest.mark.kvm

LIMIT_S = 200  # generous: about 1 % of all events take 0.1 to 1 s on a busy host


def probe_config(folder: Path, *, cpus: int = 2, memory: int = 64 << 20, **options: int | str) -> VmConfig:
    """Its disk is past the page cache where it has more than one queue, and the host can do that."""
    disk = folder / "disk.img"
    queues = int(options.get("blk_queues", 1))
    if not disk.exists():
        disk.write_bytes(bytes(8 << 20))
    cmdline = probe_cmdline(cpus=cpus, report=200, **options)
    return VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(memory),
        disks=(DiskConfig(str(disk), num_queues=queues, direct=queues > 1 and has_direct(folder)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def fresh_report(vm: Vm, folder: Path) -> ProbeReport:
    """The first report that the guest began after this call."""
    wanted = report_of(folder).reports + 2
    while (report := report_of(folder)).reports < wanted:
        await vm.console_output()
    return report


def unharmed(report: ProbeReport) -> bool:
    return not report.problems and report.errors == 0 and report.stuck == 0


async def settled(road: Road) -> None:
    """Activations go on, and each is settled, on the side that runs."""
    missing = {"_disk0", "__rng"}
    all_seen = trio.Event()

    def note(event: Event) -> None:
        if event.event == "activated" and event.properties is not None:
            missing.discard(event.properties["id"])
        if not missing:
            all_seen.set()

    road.vm.events.listen(note)
    with trio.fail_after(road.vm.deadlines.activation + 10):
        await all_seen.wait()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_one_vcpu_moves(tmp_path: Path, kind: str) -> None:
    url = f"unix:{tmp_path}/m.sock" if kind == "unix" else "tcp:127.0.0.1:0"
    config = probe_config(tmp_path, cpus=1, rate=200, cycle="rng,blk", mem=32)
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await road.vm.wait_for_console("PROBE ready")
            before = await fresh_report(road.vm, tmp_path)
            await road.move(url)
            after = await fresh_report(road.vm, tmp_path)
            assert unharmed(after)
            assert after.checked > before.checked
            assert after.rng_act > before.rng_act
            assert after.blk_act > before.blk_act


@pytest.mark.parametrize(
    ("cpus", "options"),
    [
        (1, {"window": 1, "event_idx": 1}),
        (2, {"window": 1, "race": 1}),
        (2, {"race": 2}),
        (4, {"indirect": 1, "event_idx": 1, "blk_queues": 2, "blk_clear": 1}),
    ],
)
async def test_twenty_moves_of_a_guest_that_cycles_its_devices(
    tmp_path: Path, cpus: int, options: dict[str, int]
) -> None:
    config = probe_config(tmp_path, cpus=cpus, rate=300, cycle="rng,blk", mem=24, **options)
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await road.vm.wait_for_console("PROBE ready")
            for number in range(20):
                await road.move(f"unix:{tmp_path}/m{number}.sock" if number % 2 else "tcp:127.0.0.1:0")
                if number % 5 == 4:
                    await settled(road)
            after = await fresh_report(road.vm, tmp_path)
            assert unharmed(after)
            assert len(road.reports) == 20


async def test_the_guest_sees_what_is_spoiled(tmp_path: Path) -> None:
    """The checker itself: a page lost and a page stale are both reported."""
    with trio.fail_after(LIMIT_S):
        async with open_road(probe_config(tmp_path, cpus=1, mem=8, corrupt=1)) as road:
            await road.vm.wait_for_console("PROBE ready")
            report = await fresh_report(road.vm, tmp_path)
            assert report.errors == 2
            assert {problem.split()[0] for problem in report.problems} == {"LOST", "STALE"}
