"""Where a guest's port and MMIO accesses go: two sorted tables of address ranges.

Lookups come from every vCPU thread; a change (a BAR that moves) builds a new table and swaps it in one assignment,
so that a lookup never sees half a change. An access that no range owns is counted and answered all-ones.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from itertools import pairwise
from typing import Protocol, TypeAlias

import attrs

from trivmm.bus.ticket import Ticket

__all__ = ["AddressSpace", "BusDevice", "Effect", "GuestRequest", "Range"]


@attrs.frozen
class GuestRequest:
    """The guest asks the board for something: ``reset``, ``poweroff`` or ``crash``. ``details`` are the registers of a
    CPU that was reset by its own fault, for whoever looks for it."""

    kind: str
    why: str
    details: str = ""


Effect: TypeAlias = Ticket | GuestRequest | None
"""What a write asks of the vCPU that made it: to park at a barrier, to leave for the board's sake, or nothing."""


class BusDevice(Protocol):
    """Offsets are relative to the start of the range. Calls come from any vCPU thread and never block."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, little-endian."""

    def write(self, offset: int, data: bytes) -> Effect: ...


@attrs.frozen(eq=False)
class Range:
    start: int
    size: int
    device: BusDevice
    name: str

    @property
    def end(self) -> int:
        return self.start + self.size


@attrs.define(eq=False)
class AddressSpace:
    """``name`` is ``pio`` or ``mmio``."""

    name: str
    unhandled_reads: int = 0
    unhandled_writes: int = 0
    _table: tuple[tuple[int, ...], tuple[Range, ...]] = ((), ())
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def insert(self, new: Range) -> bool:
        """Add a range. False, and no change, when it overlaps one that is there (a guest may try that)."""
        with self._lock:
            ranges = sorted((*self._table[1], new), key=lambda each: each.start)
            if any(low.end > high.start for low, high in pairwise(ranges)):
                return False
            self._table = (tuple(each.start for each in ranges), tuple(ranges))
            return True

    def remove(self, device: BusDevice, start: int) -> None:
        """Take out the range of ``device`` that begins at ``start``; nothing happens when there is none."""
        with self._lock:
            ranges = tuple(each for each in self._table[1] if not (each.device is device and each.start == start))
            self._table = (tuple(each.start for each in ranges), ranges)

    def find(self, address: int, size: int) -> Range | None:
        """The range that holds all of ``[address, address + size)``."""
        starts, ranges = self._table
        index = bisect_right(starts, address) - 1
        if index < 0:
            return None
        found = ranges[index]
        return found if address + size <= found.end else None

    def read(self, address: int, size: int) -> bytes:
        found = self.find(address, size)
        if found is None:
            self.unhandled_reads += 1
            return b"\xff" * size
        return found.device.read(address - found.start, size)

    def write(self, address: int, data: bytes) -> Effect:
        found = self.find(address, len(data))
        if found is None:
            self.unhandled_writes += 1
            return None
        return found.device.write(address - found.start, data)

    def counters(self) -> dict[str, int]:
        return {
            f"{self.name}_unhandled_reads": self.unhandled_reads,
            f"{self.name}_unhandled_writes": self.unhandled_writes,
        }

    @property
    def ranges(self) -> tuple[Range, ...]:
        return self._table[1]
