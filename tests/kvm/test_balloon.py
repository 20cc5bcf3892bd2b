"""virtio-balloon with a real guest, which looks at what comes back of the pages that it gave away, wherever it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import CpusConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 120
MIB = 1 << 20
RAM = 96 * MIB


def config_of(folder: Path, *, size: int, cpus: int = 1, **options: object) -> VmConfig:
    words: dict[str, object] = {"cpus": cpus, "report": 100, "mem": 8, "balloon": 12, "balloon_report": 1, **options}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(RAM),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        virtio=[BalloonConfig(size, deflate_on_oom=True, free_page_reporting=True)],
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


async def until(vm: Vm, folder: Path, so: Callable[[ProbeReport], bool]) -> ProbeReport:
    """The guest's first report that is so."""
    while True:
        report = parse_report((folder / "serial.txt").read_text(errors="replace"))
        assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
        if report.reports and so(report):
            return report
        await vm.console_output()


def resident(vm: Vm) -> int:
    """Bytes of host memory under the guest's."""
    assert vm.host.board is not None
    return sum(os.fstat(region.memfd).st_blocks * 512 for region in vm.host.board.memory.regions)


async def test_memory_goes_back_to_the_host_and_comes_again(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path, size=0)) as vm:
            await vm.boot()
            await until(vm, tmp_path, lambda report: report.counts["balloon_reported"] > 128)
            assert vm.info()["memory_actual_size"] == RAM
            await vm.resize(balloon=10 * MIB)
            await until(vm, tmp_path, lambda report: report.counts["balloon"] >= 2500)
            # It gives and takes 64 of them all the time.
            assert abs(RAM - vm.info()["memory_actual_size"] - 10 * MIB) <= 64 * 4096
            full = resident(vm)
            await until(vm, tmp_path, lambda report: report.counts["balloon_taken"] > 1000)
            await vm.resize(balloon=0)
            await until(vm, tmp_path, lambda report: report.counts["balloon"] == 0)
            assert vm.info()["memory_actual_size"] == RAM
            # Taken back and filled, all of it.
            assert resident(vm) - full > 9 * MIB
            counters = vm.counters()["__balloon"]
            assert counters["inflated"] == counters["deflated"] >= 2560
            assert counters["released"] >= counters["inflated"] + counters["reported"]
            assert (counters["refused"], counters["failed"]) == (0, 0)
            # A list of 64 pages, backwards, is one range.
            assert counters["ranges"] <= counters["released"] / 16


@pytest.mark.parametrize("cpus", [1, 2])
async def test_it_moves_while_pages_come_and_go(tmp_path: Path, cpus: int) -> None:
    """Stale or lost in a move: a page that is not zero when it is taken back, or not its own before it is given."""
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, size=8 * MIB, cpus=cpus, rate=500)) as road:
            # All 3072 pages of its pool have been used: from now on memory only comes and goes.
            used = 3072 - 8 * MIB // 4096 + 256
            await until(road.vm, tmp_path, lambda report: report.counts["balloon_taken"] > used)
            for number in range(3):
                before, there = resident(road.vm), road.vm
                await road.move(f"unix:{tmp_path}/{number}.sock")
                assert there.host.machine is None
                # What it gave away costs no host anything, but where it shares a huge page with what the guest keeps:
                # the 4 MiB of the pool that it keeps, a ring, lie in three of them at the most. Beside it, 64 pages
                # each are given, taken and reported in this moment.
                assert resident(road.vm) <= before + 2 * MIB + 3 * 64 * 4096
                assert abs(RAM - road.vm.info()["memory_actual_size"] - 8 * MIB) <= 64 * 4096
                since = await until(road.vm, tmp_path, lambda report: True)
                goal = since.counts["balloon_taken"] + 2500  # all of them have been away since
                await until(road.vm, tmp_path, lambda report, goal=goal: report.counts["balloon_taken"] > goal)
            await road.vm.resize(balloon=2 * MIB)
            await until(road.vm, tmp_path, lambda report: report.counts["balloon"] <= 512)
