"""Where the BARs of a bus decode: assigned by the VMM when a function is plugged, moved by its guest afterwards.

A BAR decodes only inside the BAR windows of ``layout`` and where nothing else is, so never over RAM, over another
BAR, the configuration window (ECAM), the interrupt controllers or a platform device. Any other placement is refused:
nothing is mapped, ``refused`` counts it, and it is tried again whenever a BAR moves. Mapping waits for the kernel,
which has the doorbells: everything here is behind one lock with that bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import AddressSpace, Effect, Range
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.memory import layout
from trivmm.platform.pci.config_space import Bar
from trivmm.platform.pci.function import PciFunction

__all__ = ["BarPlacement"]

BAR_WINDOWS: Final = (
    (layout.BAR32_START, layout.BAR32_START + layout.BAR32_SIZE),
    (layout.FIRMWARE_BARS_START, layout.FIRMWARE_BARS_END),
    (layout.BAR64_START, layout.BAR64_END),
)
TURNS: Final = 3  # calls into the kernel, each a doorbell that moves, which a vCPU may have to wait out


@attrs.frozen(eq=False)
class _BarWindow:
    """A BAR as a device of the MMIO address space."""

    function: PciFunction
    index: int

    def read(self, offset: int, size: int) -> bytes:
        return self.function.bar_read(self.index, offset, size)

    def write(self, offset: int, data: bytes) -> Effect:
        return self.function.bar_write(self.index, offset, data)

    @property
    def bar(self) -> Bar:
        return self.function.config.bars[self.index]


class BarPlacement:
    """Of the functions of one bus, by slot. In any thread."""

    def __init__(self, mmio: AddressSpace, deadlines: Deadlines) -> None:
        self.refused = 0
        self._mmio = mmio
        self._lock = BoundedLock("the placement of PCI BARs", TURNS * deadlines.kernel, "kernel")
        self._functions: dict[int, PciFunction] = {}
        self._windows: dict[tuple[int, int], _BarWindow] = {}
        self._seen: dict[int, int] = {}  # slot → layout version that is placed
        self._refused_at: dict[tuple[int, int], int] = {}  # (slot, bar) → address refused last

    def plug(self, slot: int, function: PciFunction) -> None:
        """Assign its BARs places that no other one holds, and map them.

        :raises ConfigError: no BAR space is left; nothing has changed."""
        with self._lock:
            windows = {(slot, index): _BarWindow(function, index) for index in function.config.bars}
            taken = self._taken()
            for (_, index), window in windows.items():
                address = _free_place(taken, window.bar)
                function.config.set_bar_address(index, address)
                taken.append((address, address + window.bar.size))
            self._windows |= windows
            self._functions[slot] = function
            self._agree()

    def unplug(self, slot: int) -> None:
        """No access reaches its BARs from now on but one that has begun; its doorbells are gone."""
        with self._lock:
            gone = [key for key in self._windows if key[0] == slot]
            for key in gone:
                window = self._windows.pop(key)
                if window.bar.mapped is not None:
                    self._mmio.remove(window, window.bar.mapped)
                    window.bar.mapped = None
                self._refused_at.pop(key, None)
            self._seen.pop(slot, None)
            function = self._functions.pop(slot, None)
            if function is not None:
                function.bars_changed()
            self._agree()  # a BAR that was refused for its sake

    def _taken(self) -> list[tuple[int, int]]:
        """(first, end) of what the BARs hold: where their registers point, and where they are mapped."""
        found = []
        for window in self._windows.values():
            for at in {window.function.config.bar_address(window.index), window.bar.mapped}:
                if at is not None:
                    found.append((at, at + window.bar.size))
        return found

    def is_stale(self, slot: int, function: PciFunction) -> bool:
        """Whether it wants to be elsewhere than it was placed."""
        return function.config.layout_version != self._seen.get(slot)

    def place(self) -> None:
        """Make the MMIO address space agree with all BAR registers."""
        with self._lock:
            self._agree()

    def _agree(self) -> None:
        # Told in two rounds: where two BARs change places, a doorbell can't be set where the other's still is.
        self._tell(self._unmap_moved())
        self._tell(self._map_wanted())

    def _tell(self, moved: set[int]) -> None:
        for slot, function in self._functions.items():
            if slot in moved:
                function.bars_changed()

    def _unmap_moved(self) -> set[int]:
        moved = set()
        for (slot, index), window in self._windows.items():
            bar = window.bar
            if bar.mapped is not None and bar.mapped != window.function.config.decoded_address(index):
                self._mmio.remove(window, bar.mapped)
                bar.mapped = None
                moved.add(slot)
        return moved

    def _map_wanted(self) -> set[int]:
        moved = set()
        for slot, function in self._functions.items():
            self._seen[slot] = function.config.layout_version
        for (slot, index), window in self._windows.items():
            bar = window.bar
            wanted = window.function.config.decoded_address(index)
            if bar.mapped is not None or wanted is None:
                self._refused_at.pop((slot, index), None)
                continue
            name = f"{window.function.name} BAR {index}"
            if _allowed(wanted, bar.size) and self._mmio.insert(Range(wanted, bar.size, window, name)):
                bar.mapped = bar.base = wanted
                moved.add(slot)
                self._refused_at.pop((slot, index), None)
            elif self._refused_at.get((slot, index)) != wanted:
                self._refused_at[slot, index] = wanted
                self.refused += 1
        return moved

    def names(self) -> Mapping[int, str]:
        """Who has which slot."""
        return {slot: function.name for slot, function in self._functions.items()}


def _free_place(taken: list[tuple[int, int]], bar: Bar) -> int:
    """Naturally aligned: 64-bit ones from the top of their window down, 32-bit ones from the bottom of theirs up.

    :raises ConfigError: there is none."""
    size = bar.size
    if bar.is_64bit:
        at = (layout.BAR64_END - size) & -size
        while hit := _overlapping(taken, at, size):
            at = (min(first for first, _ in hit) - size) & -size
        if at >= layout.BAR64_START:
            return at
        raise ConfigError("devices", size, "no 64-bit BAR space is left", "give fewer devices")
    at = (layout.BAR32_START + size - 1) & -size
    while hit := _overlapping(taken, at, size):
        at = (max(end for _, end in hit) + size - 1) & -size
    if at + size <= layout.BAR32_START + layout.BAR32_SIZE:
        return at
    raise ConfigError("devices", size, "no 32-bit BAR space is left", "give fewer devices")


def _overlapping(taken: list[tuple[int, int]], at: int, size: int) -> list[tuple[int, int]]:
    return [(first, end) for first, end in taken if first < at + size and at < end]


def _allowed(address: int, size: int) -> bool:
    """Whether a BAR may decode here: wholly inside one BAR window."""
    return any(start <= address and address + size <= end for start, end in BAR_WINDOWS)
