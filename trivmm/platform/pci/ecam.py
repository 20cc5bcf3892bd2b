"""PCI configuration space as memory: the Enhanced Configuration Access Mechanism (PCI Express 5.0 section 7.2.2).

A megabyte a bus, 4 KiB a function, at Cloud Hypervisor's address; the MCFG table tells the guest. Everything that an
access means is the bus's affair, and the same by either way: inside one dword, a function that isn't there reads
all-ones, and so does what a function has beyond its 256 bytes (there is no extended configuration space).
"""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.bus.space import Effect
from trivmm.memory import layout
from trivmm.platform.pci.bus import PciBus

__all__ = ["Ecam"]

FUNCTION_BYTES: Final = 4096
FUNCTIONS: Final = 8  # a device


@attrs.frozen(eq=False)
class Ecam:
    """A :class:`~trivmm.bus.space.BusDevice` for the ``layout.PCI_MMCONFIG_SIZE`` bytes of bus 0."""

    bus: PciBus

    def read(self, offset: int, size: int) -> bytes:
        device, register = divmod(offset, FUNCTION_BYTES * FUNCTIONS)
        return b"\xff" * size if register >= FUNCTION_BYTES else self.bus.read_config(device, register, size)

    def write(self, offset: int, data: bytes) -> Effect:
        device, register = divmod(offset, FUNCTION_BYTES * FUNCTIONS)
        return None if register >= FUNCTION_BYTES else self.bus.write_config(device, register, data)


assert layout.PCI_MMCONFIG_SIZE == 32 * FUNCTION_BYTES * FUNCTIONS
