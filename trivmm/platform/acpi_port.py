"""Port 0x600: ACPI's reset and sleep-control register in one byte, as in Cloud Hypervisor; stateless."""

from __future__ import annotations

from typing import Final

from trivmm.bus.space import Effect, GuestRequest

__all__ = ["ACPI_PORTS", "AcpiPort"]

ACPI_PORTS: Final = (0x600, 4)  # first port and count
RESET: Final = 1
S5: Final = 5
SLEEP_ENABLE: Final = 1 << 5


class AcpiPort:
    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> Effect:
        if offset or len(data) != 1:
            return None
        if data[0] == RESET:
            return GuestRequest("reset", "ACPI reset register")
        if data[0] == S5 << 2 | SLEEP_ENABLE:
            return GuestRequest("poweroff", "ACPI S5")
        return None
