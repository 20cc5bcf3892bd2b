"""Disks that come and go under a real guest, which finds them by PCI, drives them, checks their data and ejects them.

The probe guest serves the hotplug controller (``plug=``): it has no AML, and does what the DSDT's methods do.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import trio

from trivmm import CpusConfig, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import Road, open_road

pytestmark = pytest.mark.kvm

LIMIT_S = 200
SERVE, KEEP, SURPRISE = 1, 2, 3


def a_config(folder: Path, *, cpus: int = 2, plug: int = SERVE, **words: object) -> VmConfig:
    cmdline = probe_cmdline(cpus=cpus, report=100, mem=8, rate=200, cycle="rng", plug=plug, **words)
    return VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=10),
    )


def an_image(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(bytes(1 << 20))
    return path


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


def count(report: ProbeReport, what: str) -> int:
    return report.counts.get(what, 0)


async def reported(vm: Vm, folder: Path, **at_least: int) -> ProbeReport:
    """The first report in which each of these counts is so high, and nothing is wrong."""
    while True:
        found = report_of(folder)
        assert (found.problems, found.errors, found.stuck) == ((), 0, 0)
        values = {name: getattr(found, name, count(found, name)) for name in at_least}
        if all(values[name] >= least for name, least in at_least.items()):
            return found
        await vm.console_output()


async def used(vm: Vm, folder: Path) -> ProbeReport:
    """The disk that came last is read and written."""
    now = report_of(folder)
    return await reported(vm, folder, blk_ios=now.blk_ios + 20, blk_act=now.blk_act + 3)


async def gone(vm: Vm, name: str) -> None:
    with vm.events.subscribe() as events:
        if name not in vm.info()["device_tree"]:
            return
        async for event in events:
            if event.event == "device-removed" and event.properties is not None and event.properties["id"] == name:
                return


def is_free(image: Path) -> bool:
    """Nobody has its lock."""
    with image.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_disk_comes_is_used_and_goes_again_and_again(tmp_path: Path, cpus: int) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_road(a_config(tmp_path, cpus=cpus)) as road:
            vm = road.vm
            await vm.wait_for_console("PROBE ready")
            for turn in range(4):
                image = an_image(tmp_path, f"{turn}.img")
                info = await vm.add_device(DiskConfig(str(image)))
                assert info is not None
                assert (info.id, info.bdf) == ("_disk0", "0000:00:02.0")
                await reported(vm, tmp_path, inserted=turn + 1)
                await used(vm, tmp_path)
                (bar,) = vm.info()["device_tree"]["_virtio-pci-_disk0"]["resources"]
                assert bar["PciBar"]["base"] == 0xD000_0000 + 2 * 0x80000, "where the guest has put it"
                assert not is_free(image)
                await vm.remove_device("_disk0")
                await gone(vm, "_disk0")
                await reported(vm, tmp_path, ejected=turn + 1)
                assert is_free(image)
                assert any(image.read_bytes()), "what it wrote is there"
            assert vm.counters()["__bus"]["ejects_ignored"] == 0
            assert "_disk0" not in vm.counters()


async def moved(road: Road, folder: Path, number: int) -> Vm:
    await road.move(f"unix:{folder}/{number}.sock")
    return road.vm


async def test_a_disk_that_came_moves_stays_over_a_reboot_and_goes_elsewhere(tmp_path: Path) -> None:
    first, second = an_image(tmp_path, "first.img"), an_image(tmp_path, "second.img")
    with trio.fail_after(LIMIT_S):
        async with open_road(a_config(tmp_path)) as road:
            vm = road.vm
            await vm.wait_for_console("PROBE ready")
            await vm.add_device(DiskConfig(str(first), id="first"))
            await vm.add_device(DiskConfig(str(second), id="second"))
            await reported(vm, tmp_path, inserted=2)
            await used(vm, tmp_path)
            vm = await moved(road, tmp_path, 0)
            assert [disk.id for disk in vm.config.disks] == ["first", "second"]
            await used(vm, tmp_path)
            await vm.remove_device("first")
            await gone(vm, "first")
            vm = await moved(road, tmp_path, 1)
            await used(vm, tmp_path)
            assert [(disk.id, disk.pci_device_id) for disk in vm.config.disks] == [("second", 3)]
            assert is_free(first)
            await vm.reboot()
            await vm.wait_for_console("PROBE ready")
            assert vm.info()["device_tree"]["_virtio-pci-second"]["pci_bdf"] == "0000:00:03.0"
            assert await vm.add_device(DiskConfig(str(first), id="third")) is not None
            await used(vm, tmp_path)
            assert vm.info()["device_tree"]["_virtio-pci-third"]["pci_bdf"] == "0000:00:02.0"


async def test_a_guest_that_never_ejects_keeps_its_disk_over_a_move_until_it_reboots(tmp_path: Path) -> None:
    image = an_image(tmp_path, "kept.img")
    with trio.fail_after(LIMIT_S):
        async with open_road(a_config(tmp_path, plug=KEEP)) as road:
            vm = road.vm
            await vm.wait_for_console("PROBE ready")
            await vm.add_device(DiskConfig(str(image), id="kept"))
            await used(vm, tmp_path)
            await vm.remove_device("kept")
            await used(vm, tmp_path)
            vm = await moved(road, tmp_path, 0)
            await used(vm, tmp_path)
            assert vm.config.disks == ()
            assert "kept" in vm.info()["device_tree"]
            await vm.reboot()
            await vm.wait_for_console("PROBE ready")
            assert "kept" not in vm.info()["device_tree"]
            assert is_free(image)


async def test_a_guest_that_ejects_in_the_middle_of_it_harms_nobody(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_road(a_config(tmp_path, plug=SURPRISE)) as road:
            vm = road.vm
            await vm.wait_for_console("PROBE ready")
            for turn in range(8):
                image = an_image(tmp_path, "surprise.img")
                await vm.add_device(DiskConfig(str(image)))
                if turn % 2:
                    await reported(vm, tmp_path, inserted=turn + 1)
                await vm.remove_device("_disk0")  # it may not have been found yet
                await gone(vm, "_disk0")
                assert is_free(image)
            before = report_of(tmp_path)
            await reported(vm, tmp_path, rng_ios=before.rng_ios + 4)


async def test_moves_that_begin_as_a_disk_is_asked_back(tmp_path: Path) -> None:
    """The guest ejects it before the move, in the middle of it, or after it."""
    image = an_image(tmp_path, "asked.img")
    with trio.fail_after(LIMIT_S):
        async with open_road(a_config(tmp_path)) as road:
            vm = road.vm
            await vm.wait_for_console("PROBE ready")
            for turn in range(6):
                await vm.add_device(DiskConfig(str(image)))
                await reported(vm, tmp_path, inserted=turn + 1)
                await used(vm, tmp_path)
                await vm.remove_device("_disk0")
                vm = await moved(road, tmp_path, turn)
                await gone(vm, "_disk0")
                assert vm.config.disks == ()
                assert is_free(image)
            await reported(vm, tmp_path, ejected=6)
