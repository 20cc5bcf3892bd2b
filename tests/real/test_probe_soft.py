"""The probe guest on the soft CPU: the ring features, the config window, the checker's self-test, and power-off."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import trio

from trivmm.config import CpusConfig, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.deadlines import Deadlines
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.soft import SoftHypervisor
from trivmm.testing.road import open_road
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.vm import open_vm

BOUND_S = 120.0
pytestmark = [
    pytest.mark.soft,
    pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed"),
]


async def last_words(folder: Path, cpus: int = 1, **options: object) -> ProbeReport:
    """Everything the guest said until it powered itself off."""
    disk, serial = folder / "disk.img", folder / "serial.txt"
    disk.write_bytes(bytes(1 << 20))
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=cpus, report=200, mem=8, cycle="rng,blk", **options)),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(serial)),
    )
    with trio.fail_after(BOUND_S):
        async with open_vm(config, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
    return parse_report(serial.read_text(errors="replace"))


@pytest.mark.parametrize("options", [{}, {"window": 1, "event_idx": 1}, {"indirect": 1}], ids=repr)
async def test_devices_cycle(tmp_path: Path, options: dict[str, int]) -> None:
    report = await last_words(tmp_path, rate=300, once=20, **options)
    assert (report.problems, report.errors, report.stuck, report.needs_reset) == ((), 0, 0, 0)
    assert report.rng_act + report.blk_act >= 20
    assert min(report.rng_ios, report.blk_ios) > 0
    assert report.dirtied > 0


@pytest.mark.parametrize("cpus", [2, 4])
async def test_several_cpus_take_turns(tmp_path: Path, cpus: int) -> None:
    """Each checks its own pages, and all of them race for one device."""
    report = await last_words(tmp_path, cpus, rate=300, once=20, race=2)
    assert (report.cpus, report.problems, report.errors, report.stuck) == (cpus, (), 0, 0)
    assert report.rng_act + report.blk_act >= 20


async def test_several_cpus_move(tmp_path: Path) -> None:
    serial = tmp_path / "serial.txt"
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=2, report=100, mem=4, cycle="rng", rate=300)),
        cpus=CpusConfig(2),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(serial)),
        deadlines=Deadlines(pause=10, downtime=20),
    )

    def report() -> ProbeReport:
        return parse_report(serial.read_text(errors="replace"))

    with trio.fail_after(BOUND_S):
        async with open_road(config, hypervisor=SoftHypervisor()) as road:
            for number in range(3):
                since = report().checked
                while report().checked < since + 5000 and not report().problems:
                    await road.vm.console_output()
                await road.move(f"unix:{tmp_path}/{number}.sock")
            since = report().checked
            while report().checked < since + 5000 and not report().problems:
                await road.vm.console_output()
    assert (report().problems, report().errors, report().stuck) == ((), 0, 0)


async def test_a_disk_comes_is_used_and_goes(tmp_path: Path) -> None:
    serial, image = tmp_path / "serial.txt", tmp_path / "plugged.img"
    image.write_bytes(bytes(1 << 20))
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=8, cycle="rng", plug=1)),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(serial)),
    )
    with trio.fail_after(BOUND_S):
        async with open_vm(config, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            for turn in range(2):
                with vm.events.subscribe() as events:
                    await vm.add_device(DiskConfig(str(image), id="plugged"))
                    while (report := parse_report(serial.read_text(errors="replace"))).blk_ios < 20 * (turn + 1):
                        assert (report.problems, report.errors) == ((), 0)
                        await vm.console_output()
                    await vm.remove_device("plugged")
                    async for event in events:
                        if event.event == "device-removed":
                            break
            assert any(image.read_bytes())


async def test_the_guest_sees_what_is_spoiled(tmp_path: Path) -> None:
    report = await last_words(tmp_path, corrupt=1, once=1)
    assert report.errors == 2
    assert {problem.split()[0] for problem in report.problems} == {"LOST", "STALE"}


async def test_a_balloon_gives_and_takes_and_moves(tmp_path: Path) -> None:
    """The engine reads the VMM's own mapping, from which the pages go."""
    serial = tmp_path / "serial.txt"
    words = {"cpus": 1, "report": 100, "mem": 4, "balloon": 4, "balloon_report": 1}
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(serial)),
        virtio=[BalloonConfig("2M", free_page_reporting=True)],
        deadlines=Deadlines(pause=10, downtime=20),
    )

    def report() -> ProbeReport:
        return parse_report(serial.read_text(errors="replace"))

    with trio.fail_after(BOUND_S):
        async with open_road(config, hypervisor=SoftHypervisor()) as road:
            for number in range(2):
                since = report().counts.get("balloon_taken", 0)
                while report().counts.get("balloon_taken", 0) < since + 600 and not report().problems:
                    await road.vm.console_output()
                await road.move(f"unix:{tmp_path}/{number}.sock")
            since = report().counts["balloon_taken"]
            while report().counts["balloon_taken"] < since + 600 and not report().problems:
                await road.vm.console_output()
    assert (report().problems, report().errors, report().stuck) == ((), 0, 0)
    assert report().counts["balloon_reported"] > 0
