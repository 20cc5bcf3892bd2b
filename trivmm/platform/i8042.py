"""The keyboard controller, as far as it resets the machine, and port 0x61: ports 0x61 to 0x64, stateless.

Bit 5 of port 0x61 (PIT channel 2's output) reads 1, as in Cloud Hypervisor, so that a kernel that calibrates its TSC
by it does not wait for ever. With an in-kernel PIT that claims port 0x61 the hypervisor answers before us.
"""

from __future__ import annotations

from typing import Final

from trivmm.bus.space import Effect, GuestRequest

__all__ = ["I8042", "I8042_PORTS"]

I8042_PORTS: Final = (0x61, 4)  # first port and count
PORT_B: Final = 0
COMMAND: Final = 3
PULSE_RESET: Final = 0xFE
PIT_OUT2: Final = 0x20


class I8042:
    def read(self, offset: int, size: int) -> bytes:
        if size == 1 and offset == PORT_B:
            return bytes([PIT_OUT2])
        return bytes(size)  # no keyboard: status 0, nothing in the buffer

    def write(self, offset: int, data: bytes) -> Effect:
        if offset == COMMAND and data == bytes([PULSE_RESET]):
            return GuestRequest("reset", "i8042")
        return None
