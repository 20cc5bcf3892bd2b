"""What a guest is told of its memory: E820's words, for every way to boot."""

from __future__ import annotations

from typing import Final

from trivmm.memory import layout

__all__ = ["E820_RAM", "E820_RESERVED", "memory_map"]

E820_RAM: Final = 1
E820_RESERVED: Final = 2
PCI_MMCONFIG_RESERVED: Final = 256 << 20  # room for more segments than there are


def memory_map(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """(gpa, size, E820 type) of everything that a guest is told, for RAM ``ranges`` of (gpa, size)."""
    found = []
    for gpa, size in ranges:
        if gpa == 0:
            found.append((0, min(size, layout.EBDA_START), E820_RAM))
            if size > layout.HIGH_RAM_START:
                found.append((layout.HIGH_RAM_START, size - layout.HIGH_RAM_START, E820_RAM))
        else:
            found.append((gpa, size, E820_RAM))
    found.append((layout.PCI_MMCONFIG_START, PCI_MMCONFIG_RESERVED, E820_RESERVED))
    return tuple(found)
