"""Every kind of device that can be plugged: its files, sockets and threads come and go with it, and move."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import DiskConfig, MemoryConfig, MigrationError, PayloadConfig, PciDeviceInfo, VmConfig, open_vm
from trivmm.machine.machine import Machine
from trivmm.memory import layout
from trivmm.testing.road import open_road
from trivmm.testing.script_driver import ScriptDriver, pci_read
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.testing.told_guest import PCIU, ToldGuest, eject, hotplug_read
from trivmm.virtio.kinds import hotplug_verbs, kind_of
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.virtio.vsock.config import VsockConfig
from trivmm.vm import Vm

LIMIT_S = 60
CONFIG = VmConfig(PayloadConfig("told"), memory=MemoryConfig(16 << 20))
BASE, SLOT = 0x10_0000, 2


def a_disk(folder: Path) -> DiskConfig:
    image = folder / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return DiskConfig(str(image))


def a_net(folder: Path) -> NetConfig:
    return NetConfig(link=f"listen:{folder}/net.sock")


def a_vsock(folder: Path) -> VsockConfig:
    return VsockConfig(3, f"{folder}/vsock.sock")


def a_pmem(folder: Path) -> PmemConfig:
    image = folder / "pmem.img"
    image.write_bytes(bytes(4 << 20))
    return PmemConfig(str(image))


SAMPLES: dict[str, Callable[[Path], Any]] = {
    "add-disk": a_disk,
    "add-net": a_net,
    "add-pmem": a_pmem,
    "add-vsock": a_vsock,
}


def test_every_verb_has_a_sample() -> None:
    assert set(SAMPLES) == set(hotplug_verbs())


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return SAMPLES[request.param](tmp_path)


def open_files() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            what = os.readlink(f"/proc/self/fd/{name}").split(":")[0]
        except OSError:
            continue  # the listing's own
        found[what] = found.get(what, 0) + 1
    return found


async def until_gone(vm: Vm, name: str) -> None:
    with vm.events.subscribe() as events:
        if name in vm.info()["device_tree"]:
            async for event in events:
                if event.event == "device-removed":
                    return


def driver_of(sample: Any) -> ScriptDriver:
    bar = layout.BAR64_START if kind_of(sample).bar_is_64bit else layout.BAR32_START + 0x1000_0000
    return ScriptDriver(SLOT, bar, BASE)


def machine_of(vm: Vm) -> Machine:
    assert vm.host.machine is not None
    return vm.host.machine


async def test_it_comes_is_active_and_leaves_nothing(sample: Any) -> None:
    guest = ToldGuest()
    with trio.fail_after(LIMIT_S):
        async with open_vm(CONFIG, hypervisor=ScriptedHypervisor(guest.cpu(0), needs_payload=False)) as vm:
            await vm.boot()
            spaces = machine_of(vm).board.mmio.ranges
            before = open_files()
            for _ in range(3):
                info = await vm.add_device(sample)
                assert info is not None
                assert info.bdf == f"0000:00:{SLOT:02x}.0"
                assert await guest.does(hotplug_read(PCIU)) == 1 << SLOT
                driver = driver_of(sample)
                await guest.does(driver.place())
                assert await guest.does(driver.activate()) == 15
                assert open_files() != before
                await vm.remove_device(info.id)
                await guest.does(eject(1 << SLOT))
                assert await guest.does(pci_read(SLOT, 0)) == 0xFFFF_FFFF
                await until_gone(vm, info.id)
                assert open_files() == before
                assert machine_of(vm).board.mmio.ranges == spaces
                assert kind_of(sample).of(vm.config) == ()


async def test_it_moves_and_goes_where_it_has_come_to(sample: Any, tmp_path: Path) -> None:
    guest = ToldGuest()
    with trio.fail_after(LIMIT_S):
        hypervisor = ScriptedHypervisor(guest.cpu(0), needs_payload=False)
        async with open_road(CONFIG, hypervisor=hypervisor) as road:
            info = await road.vm.add_device(sample)
            assert info is not None
            driver = driver_of(sample)
            await guest.does(driver.place())
            assert await guest.does(driver.activate()) == 15
            await road.move(f"unix:{tmp_path}/1.sock")
            assert await guest.does(driver.status()) == 15
            assert await guest.does(hotplug_read(PCIU)) == 1 << SLOT, "what was not read yet has moved too"
            assert road.vm.config == machine_of(road.vm).board.config
            await road.vm.remove_device(info.id)
            assert kind_of(sample).of(road.vm.config) == ()
            await road.move(f"unix:{tmp_path}/2.sock")
            assert kind_of(sample).of(road.vm.config) == ()
            assert info.id in road.vm.info()["device_tree"], "it was asked for, and the guest has it still"
            held = machine_of(road.vm)
            async with held.hotplug.ejector.held():  # as in a migration
                await guest.does(eject(1 << SLOT))
            await road.move(f"unix:{tmp_path}/3.sock")
            await until_gone(road.vm, info.id)
            assert await road.vm.add_device(sample) == PciDeviceInfo(info.id, info.bdf)


async def test_one_that_is_ejected_in_mid_migration_goes_where_the_vm_runs(tmp_path: Path) -> None:
    guest = ToldGuest()
    with trio.fail_after(LIMIT_S):
        hypervisor = ScriptedHypervisor(guest.cpu(0), needs_payload=False)
        async with open_road(CONFIG, hypervisor=hypervisor) as road:
            await road.vm.add_device(a_disk(tmp_path))
            await road.vm.remove_device("_disk0")
            machine = machine_of(road.vm)

            def in_the_middle(progress: object) -> None:
                machine.board.hotplug.write(8, (1 << SLOT).to_bytes(4, "little"))

            await road.move(f"unix:{tmp_path}/1.sock", on_progress=in_the_middle)
            assert "_disk0" not in machine_of(road.vm).board.config.disks
            assert await guest.does(pci_read(SLOT, 0)) == 0xFFFF_FFFF
            await until_gone(road.vm, "_disk0")
            assert await road.vm.add_device(a_disk(tmp_path)) == PciDeviceInfo("_disk0", "0000:00:02.0")


async def test_one_that_is_ejected_in_a_migration_that_fails_goes_here(tmp_path: Path) -> None:
    guest = ToldGuest()
    with trio.fail_after(LIMIT_S):
        hypervisor = ScriptedHypervisor(guest.cpu(0), needs_payload=False)
        async with open_vm(CONFIG, hypervisor=hypervisor) as vm:
            await vm.boot()
            await vm.add_device(a_disk(tmp_path))
            await vm.remove_device("_disk0")
            ejector = machine_of(vm).hotplug.ejector
            async with ejector.held():  # the migration holds it from its start to its end
                await guest.does(eject(1 << SLOT))
                with pytest.raises(MigrationError, match="nobody"):
                    await vm.migrate_to(f"unix:{tmp_path}/nobody.sock")
                assert "_disk0" in vm.info()["device_tree"]
            await until_gone(vm, "_disk0")
