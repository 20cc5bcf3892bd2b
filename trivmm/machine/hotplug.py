"""Devices that come and go while a machine lives: any kind that declares it (``DeviceKind.hotplug``).

Plugged, a device is one like every other: its actor runs in the device nursery that is open already, it pauses, moves
and reboots with the rest. It is unplugged in the reverse order, once its guest has ejected it: nobody waits for it and
nothing of it runs; what was written is on its storage; no access, doorbell or interrupt leads to it; then it is closed,
and its slot is free. Until that last step it is one of the board's devices, so whatever ends the machine half way
closes it with the others.

Opening files, and everything that changes what the kernel has of the VM, waits: in threads, under ``storage`` and
``kernel``. An owner's operation holds the lease; an ejection needs none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import attrs

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, DeadlineError, MigrationError, NoSuchDevice, WrongState
from trivmm.machine.board import Board, DeviceSlot
from trivmm.machine.build import as_plugged, plug
from trivmm.machine.interrupts import Interrupts
from trivmm.nursery.ejection import Ejector
from trivmm.nursery.kernel import KernelCalls
from trivmm.nursery.tree import DeviceTasks
from trivmm.platform.ged import PCI_DEVICES_CHANGED
from trivmm.platform.pci import pick_slots
from trivmm.virtio.kind import AnyKind, Place
from trivmm.virtio.kinds import names_of

__all__ = ["Hotplug", "check_new", "removable"]

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.001  # between two looks whether an access has ended, which takes microseconds
TRANSPORT: Final = "_virtio-pci-"  # before a device's id: its node in the device tree, which names it too


@attrs.define(eq=False)
class Hotplug:
    """Part of a machine. ``tasks`` is what the nursery tree gives; ``on_removed(id, bdf)`` tells of a device that is
    gone."""

    board: Board
    deadlines: Deadlines
    kernel: KernelCalls
    storage: KernelCalls
    interrupts: Interrupts
    on_removed: Callable[[str, str], None]
    tasks: DeviceTasks | None = attrs.field(default=None, init=False)
    ejector: Ejector = attrs.field(
        default=attrs.Factory(
            lambda self: Ejector(self.board.hotplug, self._take_away, self.deadlines), takes_self=True
        ),
        init=False,
    )

    # --- the owner's verbs -----------------------------------------------------------------------------------

    async def add(self, kind: AnyKind, config: Any) -> DeviceSlot:
        """Plug a device in and tell the guest. A cancellation waits for the calls that have begun, and shows at the
        caller's next await: either it is there, or nothing of it is left.

        :raises ConfigError: naming what is wrong with it. :raises DeadlineError: (storage, kernel) it did not come.
        :raises WrongState: the machine ends."""
        board = self.board
        name = check_new(board.config, kind, config)
        (number,) = pick_slots([config.pci_device_id], board.pci.placement.names())
        place = Place(board.memory, name, incoming=False, sink=None, deadlines=board.config.deadlines)
        device = await self.storage.call(
            f"opening {name}", lambda: kind.make(config, place), late=lambda device: device.close()
        )
        if self._ending:
            device.close()
            raise self._too_late(name)

        def work() -> DeviceSlot:
            made = plug(board, kind, device, number)
            if self.interrupts.connected:
                made.transport.connect_interrupts()
            return made

        slot = await self.kernel.call(f"plugging {name}", work, late=self._withdraw)
        if self._ending:
            _close(slot)
            raise self._too_late(name)
        assert self.tasks is not None
        board.config = kind.grown(board.config, as_plugged(kind, config, device, number))
        board.devices = [*board.devices, slot]
        self.tasks.start_actor(slot.actor)
        board.hotplug.inserted(number)
        board.ged.notify(PCI_DEVICES_CHANGED)
        return slot

    @property
    def _ending(self) -> bool:
        return self.tasks is None or self.tasks.closed

    @staticmethod
    def _too_late(name: str) -> WrongState:
        return WrongState(f"adding {name}", "at its end", "running or paused")

    def ask(self, name: str) -> DeviceSlot:
        """Ask the guest to let go of a device; also again.

        :raises NoSuchDevice: there is none. :raises ConfigError: it is of a kind that stays."""
        slot = next((slot for slot in self.board.devices if slot.backend.name == name), None)
        if slot is None:
            raise NoSuchDevice(name)
        removable(slot.kind, name)
        self.board.hotplug.ask(slot.pci_slot)
        self.board.ged.notify(PCI_DEVICES_CHANGED)
        self.ejector.look()
        return slot

    # --- taking away -----------------------------------------------------------------------------------------

    async def _take_away(self, number: int) -> None:
        """:raises TrivmmError: it is still there, and can be taken away later."""
        slot = next(slot for slot in self.board.devices if slot.pci_slot == number)
        name = slot.backend.name
        await slot.actor.retire()
        if slot.backend.storage is not None:
            try:
                await self.storage.call(f"flushing {name}", slot.backend.storage.flush)
            except MigrationError as error:  # of no use to a guest that has let go of it
                logger.error("%s is ejected, and what was written to it may be lost: %s", name, error)
        await self.kernel.call(f"unplugging {name}", lambda: self._unplug(slot))
        if self.tasks is not None:
            self.tasks.end_actor(slot.actor)
        self.board.take_out(slot)
        _close(slot)
        self.on_removed(name, slot.bdf)

    def _unplug(self, slot: DeviceSlot) -> None:
        """Nothing of the guest or of the kernel leads to it when this returns. In a thread; safe to be made again."""
        self.board.pci.remove(slot.pci_slot)
        slot.backend.unplug()
        slot.transport.disconnect_interrupts()
        self._outwait_accesses()

    def _outwait_accesses(self) -> None:
        """A vCPU may have found the device before it was unplugged, and still be in one of its registers."""
        inside = [(bus, token) for bus in self.board.buses if (token := bus.token()) is not None]
        limit_s = self.deadlines.kernel
        ends = time.monotonic() + limit_s
        while inside := [(bus, token) for bus, token in inside if bus.token() is token]:
            if time.monotonic() > ends:
                raise DeadlineError("kernel", limit_s, f"a vCPU does not leave {inside[0][0].serving()}")
            time.sleep(LOOK_S)

    def _withdraw(self, slot: DeviceSlot) -> None:
        """One that came after its caller had given up. In the thread that made it; nobody's actor runs."""
        with slot.transport.state.lock:
            slot.transport.state.retire()
        self._unplug(slot)
        _close(slot)


def _close(slot: DeviceSlot) -> None:
    slot.transport.close()
    slot.backend.close()


def check_new(config: Any, kind: AnyKind, device: Any) -> str:
    """Whether a VM of ``config`` can have one more, as far as can be said without opening anything. Gives its id.

    :raises ConfigError: naming what can't be."""
    grown = kind.grown(config, device)
    kind.check(kind.of(grown))
    names = names_of(grown)
    name = names[kind][-1]
    if sum(each.count(name) for each in names.values()) > 1:
        raise ConfigError("id", name, "two devices have this id", "give each its own")
    return name


def removable(kind: AnyKind, name: str) -> None:
    """:raises ConfigError: a device of that kind is there from boot to the end."""
    if kind.hotplug is None:
        raise ConfigError("id", name, f"a device of {kind.contract.section} can't be removed", "give another one's id")
