"""Devices that are added to a VM, or taken away, while it runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs

from trivmm.errors import ConfigError, NoSuchDevice, WrongState
from trivmm.machine.hotplug import TRANSPORT, check_new, removable
from trivmm.machine.machine import Machine
from trivmm.platform.pci import pick_slots
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.kinds import find, kind_of, names_of
from trivmm.vm.core import VmCore, VmState

__all__ = ["Devices", "PciDeviceInfo"]


@attrs.frozen
class PciDeviceInfo:
    """What became of a device: its id, and its place on PCI as ``segment:bus:device.function``."""

    id: str
    bdf: str


class Devices(VmCore):
    """The part of a VM's API that is about hotplug. A VM that is not booted is changed on paper."""

    async def add_device(self, config: Any) -> PciDeviceInfo | None:
        """Add a device of a kind that can be (``DiskConfig``, …). It stays: over reboots, and wherever the VM moves.
        The guest is told, and finds it when it looks. On paper: None.

        Cancelled, it is there or it isn't: ``config`` says which.

        :raises ConfigError: naming what is wrong with it; nothing has changed.
        :raises DeadlineError: (storage, kernel) its files, or the kernel, took too long; nothing has changed.
        :raises VmMigrating: a migration owns the VM."""
        kind = kind_of(config)
        if kind.hotplug is None:
            raise ConfigError("device", config, "of a kind that is there from boot", f"give {kind.contract.section}")
        async with self.ownership.lease(kind.hotplug.verb):
            machine = self._plugged_machine(kind.hotplug.verb)
            if machine is None:
                check_new(self.config, kind, config)
                grown = kind.grown(self.config, config)
                pick_slots([each.pci_device_id for kind in names_of(grown) for each in kind.of(grown)])
                self.config = grown
                return None
            slot = await machine.hotplug.add(kind, config)
            self.config = machine.board.kept_config
            self._tell("device-added", id=slot.backend.name, bdf=slot.bdf)
            return PciDeviceInfo(slot.backend.name, slot.bdf)

    async def remove_device(self, name: str) -> None:
        """Ask the guest to let go of the device with that id; it is gone from the configuration at once, and from the
        VM (the event ``device-removed`` says so) when the guest has ejected it. Said again, the guest is asked again.

        :raises NoSuchDevice: there is none. :raises ConfigError: it is of a kind that is there from boot to the end.
        :raises VmMigrating: a migration owns the VM."""
        name = name.removeprefix(TRANSPORT)
        async with self.ownership.lease("remove-device"):
            machine = self._plugged_machine("remove-device")
            if machine is not None:
                machine.hotplug.ask(name)
                self.config = machine.board.kept_config
                return
            found = find(self.config, name)
            if found is None:
                raise NoSuchDevice(name)
            kind, index = found
            removable(kind, name)
            self.config = kind.shrunk(self.config, index)

    async def resize_disk(self, name: str, size: int) -> None:
        """Make the image of a disk ``size`` bytes long, and tell the guest. The image of one that is not booted is its
        owner's to resize.

        :raises NoSuchDevice: there is no such disk. :raises WrongState: the VM is not booted.
        :raises ConfigError: the image can't be, or not so long. :raises NotSupported: not in its format.
        :raises DeadlineError: (storage) it took too long, and may yet be done; the guest was not told.
        :raises VmMigrating: a migration owns the VM."""
        async with self.ownership.lease("resize-disk"):
            machine = self._plugged_machine("resize-disk")
            if machine is None:
                raise WrongState("resize-disk", self.state.value, "booted")
            name = name.removeprefix(TRANSPORT)
            ejected = machine.board.hotplug.ejected  # one that is closed in a moment, and its image another's
            there = [each for each in machine.board.devices if each.pci_slot not in ejected]
            disk = next((each.backend for each in there if each.backend.name == name), None)
            if not isinstance(disk, WorkerDevice) or disk.storage is None:
                raise NoSuchDevice(name)
            await machine.storage.call("resizing a disk", partial(disk.set_capacity, size))
            disk.capacity_changed()

    def _plugged_machine(self, operation: str) -> Machine | None:
        """The one that has the devices; None: there are none but on paper."""
        if self.host.machine is None and self.state in (VmState.CREATED, VmState.SHUTDOWN):
            return None
        machine = self._machine_in(operation, VmState.RUNNING, VmState.PAUSED)
        if self.in_doubt:
            raise WrongState(operation, "Paused, in doubt", "resolved, resumed or shut down by you first")
        return machine
