"""The PCI hotplug controller that the DSDT drives: Cloud Hypervisor's four registers at ``layout.PCI_HOTPLUG_START``.

====  ======  =============================================================================================
 0    PCIU    slots that got a device since the last read, a bit each; a read clears them
 4    PCID    slots whose device is to go, likewise
 8    B0EJ    written: eject these slots; reads 0
12    PSEG    the PCI segment that the others are about: 0, the only one
====  ======  =============================================================================================

Removal is asked for, and the guest's to grant: what it ejects is gone for it in that moment, in this thread; all that
waits (workers, doorbells, files) is left as a target, ``ejected``, for a task of the device nursery
(``trivmm.nursery.ejection``). Only what was asked for can be ejected, and once; anything else is ignored and counted. A
guest that never ejects keeps its device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from typing import Final

from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import Effect
from trivmm.platform.pci.bus import SLOTS, PciBus
from trivmm.state.platform import PciHotplugState
from trivmm.state.strict import refused

__all__ = ["HOTPLUG_SIZE", "PciHotplug"]

HOTPLUG_SIZE: Final = 16
UP, DOWN, EJECT, SEGMENT = range(0, HOTPLUG_SIZE, 4)
WIDTH: Final = 4  # of every register, and of every access that means something


def _slots(bits: int) -> Iterator[int]:
    return (slot for slot in range(SLOTS) if bits >> slot & 1)


class PciHotplug:
    """A :class:`~trivmm.bus.space.BusDevice`. Reads and writes come from vCPU threads, the rest from the trio thread.

    ``removable()`` are the slots with a device that can be unplugged, as bits. ``wake()`` tells the task that there is
    something in ``ejected``: any thread, never blocks."""

    def __init__(self, bus: PciBus, removable: Callable[[], int], lock_s: float) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.ignored_ejects = 0
        self._bus = bus
        self._removable = removable
        self._lock = BoundedLock("the PCI hotplug controller", lock_s)
        self._up = self._down = 0  # what the guest has not read yet
        self._asked = self._ejected = 0

    # --- the owner's side ------------------------------------------------------------------------------------

    @property
    def ejected(self) -> Collection[int]:
        """Slots that the guest has let go of, and that are not free yet."""
        return list(_slots(self._ejected))

    @property
    def leaving(self) -> Collection[int]:
        """Slots whose device was asked for, ejected or not yet."""
        return list(_slots(self._asked | self._ejected))

    def inserted(self, slot: int) -> None:
        with self._lock:
            self._up |= 1 << slot

    def ask(self, slot: int) -> None:
        """For the device back. Asked again, the guest is told again, unless it has ejected it already."""
        with self._lock:
            if not self._ejected >> slot & 1:
                self._asked |= 1 << slot
                self._down |= 1 << slot

    def freed(self, slot: int) -> None:
        """Nothing is there any more."""
        with self._lock:
            for register in ("_up", "_down", "_asked", "_ejected"):
                setattr(self, register, getattr(self, register) & ~(1 << slot))

    # --- the guest's side ------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """An access of another width than a register's reads 0, and clears nothing."""
        bits = 0
        if size == WIDTH and offset == UP:
            with self._lock:
                bits, self._up = self._up, 0
        elif size == WIDTH and offset == DOWN:
            with self._lock:
                bits, self._down = self._down, 0
        return bits.to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> Effect:
        if offset == EJECT and len(data) == WIDTH:
            (bits,) = struct.unpack("<I", data)
            with self._lock:
                granted = bits & self._asked
                self._asked &= ~granted
                self._down &= ~granted
                self._up &= ~granted  # who ejects what it has not looked at finds nothing there
                self._ejected |= granted
                self.ignored_ejects += (bits & ~granted).bit_count()
            if granted:
                self._bus.hide(list(_slots(granted)))
                self.wake()
        return None

    def counters(self) -> dict[str, int]:
        return {"ejects_ignored": self.ignored_ejects}

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> PciHotplugState:
        with self._lock:
            return PciHotplugState(self._up, self._down, self._asked, self._ejected)

    def check(self, state: PciHotplugState, where: str) -> None:
        """:raises ProtocolError: bits of slots that have no such device, or that contradict each other."""
        removable = self._removable()
        for name, bits, allowed, what in (
            ("up", state.up, removable & ~state.ejected, "slots with a device that can be plugged"),
            ("asked", state.asked, removable & ~state.ejected, "slots with a device that can go, and has not"),
            ("ejected", state.ejected, removable, "slots with a device that can go"),
            ("down", state.down, state.asked, "slots whose device was asked for"),
        ):
            if bits & ~allowed:
                raise refused(f"{where}.{name}", bits, f"bits of {allowed:#x}: {what}")

    def load(self, state: PciHotplugState) -> None:
        """Take over what :meth:`check` has passed."""
        with self._lock:
            self._up, self._down, self._asked, self._ejected = state.up, state.down, state.asked, state.ejected
        self._bus.hide_only(list(_slots(state.ejected)))
