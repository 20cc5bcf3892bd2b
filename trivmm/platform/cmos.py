"""CMOS RAM and real-time clock, ports 0x70 and 0x71: MC146818 registers A to D, UTC of the host, memory sizes.

Owned by the board. The time registers are computed at each read and follow register B (BCD or binary, 12 or 24
hours); writes to them are ignored, the host keeps the time. Alarm and periodic interrupts don't exist. Memory sizes
and the century lie where Cloud Hypervisor has them; as there, writing 0 to the shutdown status byte (index 0x8f,
that is 0x0f with NMI masked) resets the machine. Not where firmware boots it: a BIOS says in that byte how it wants
to go on after a reset, and writes 0 at power-on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from trivmm.bus.space import Effect, GuestRequest
from trivmm.memory import layout
from trivmm.state.platform import CMOS_BYTES, CmosState

__all__ = ["CMOS_PORTS", "Cmos"]

CMOS_PORTS: Final = (0x70, 2)  # first port and count
SIZE: Final = CMOS_BYTES
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
SHUTDOWN_STATUS_NO_NMI: Final = 0x8F
CENTURY: Final = 0x32
BOOT_ORDER: Final = 0x3D  # SeaBIOS' and QEMU's; two devices here, a third in 0x38
FIRST_DISK: Final = 2
OTHER_CPUS: Final = 0x5F
B_24_HOURS: Final = 0x02
B_BINARY: Final = 0x04
A_DIVIDER: Final = 0x26  # 32.768 kHz, 1024 Hz
A_UPDATE_IN_PROGRESS: Final = 0x80
D_POWER: Final = 0x80
UPDATE_NS: Final = 8 * 1_000_000_000 // 32768  # the last 244 us of each second
TIME_REGISTERS: Final = {0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY}
UNIT: Final = 64 << 10
READ_ONLY: Final = TIME_REGISTERS | {REGISTER_A, REGISTER_C, REGISTER_D}


class Cmos:
    """``clock_ns`` gives nanoseconds since the epoch (for tests)."""

    def __init__(
        self,
        ram_size: int,
        vcpus: int = 1,
        *,
        for_firmware: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``ram_size`` in bytes. ``for_firmware``: the shutdown status is a byte like others."""
        self._resets = not for_firmware
        self._index = 0
        self._clock_ns = clock_ns
        self._data = bytearray(SIZE)
        self._data[REGISTER_B] = B_24_HOURS
        self._data[BOOT_ORDER] = FIRST_DISK
        self._data[OTHER_CPUS] = vcpus - 1
        low = min(ram_size, layout.MMIO_HOLE_START)
        from_16m = min(0xFFFF, max(0, low - (16 << 20)) // UNIT)
        from_4g = min(0xFF_FFFF, (ram_size - low) // UNIT)
        self._data[0x34:0x36] = from_16m.to_bytes(2, "little")
        self._data[0x5B:0x5E] = from_4g.to_bytes(3, "little")

    def read(self, offset: int, size: int) -> bytes:
        if size != 1:
            return b"\xff" * size
        return bytes([self._index if offset == 0 else self._register(self._index & 0x7F)])

    def write(self, offset: int, data: bytes) -> Effect:
        if len(data) != 1:
            return None
        if offset == 0:
            self._index = data[0]
            return None
        if self._resets and self._index == SHUTDOWN_STATUS_NO_NMI and data[0] == 0:
            return GuestRequest("reset", "CMOS shutdown status")
        index = self._index & 0x7F
        if index not in READ_ONLY:
            self._data[index] = data[0]
        return None

    def _register(self, index: int) -> int:
        now = self._clock_ns()
        if index == REGISTER_A:
            return A_DIVIDER | (A_UPDATE_IN_PROGRESS if now % 1_000_000_000 >= 1_000_000_000 - UPDATE_NS else 0)
        if index == REGISTER_D:
            return D_POWER
        if index in TIME_REGISTERS:
            return self._time(index, time.gmtime(now // 1_000_000_000))
        return self._data[index]

    def _time(self, index: int, now: time.struct_time) -> int:
        mode = self._data[REGISTER_B]
        afternoon = 0
        hours = now.tm_hour
        if not mode & B_24_HOURS:
            afternoon = 0x80 if hours >= 12 else 0
            hours = hours % 12 or 12
        value = {
            0x00: min(now.tm_sec, 59),
            0x02: now.tm_min,
            0x04: hours,
            0x06: (now.tm_wday + 1) % 7 + 1,  # Sunday is 1
            0x07: now.tm_mday,
            0x08: now.tm_mon,
            0x09: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }[index]
        if not mode & B_BINARY:
            value = value // 10 << 4 | value % 10
        return value | (afternoon if index == 0x04 else 0)

    def after_reset(self, before: CmosState) -> None:
        """A battery keeps these bytes. But RAM begins anew here: there is nothing to go on with as the shutdown status
        asks for."""
        self._data[:] = before.data
        self._data[SHUTDOWN_STATUS_NO_NMI & 0x7F] = 0

    def save(self) -> CmosState:
        return CmosState(self._index, bytes(self._data))

    def check(self, state: CmosState, where: str) -> None:
        """Its time registers are never looked at; any other byte is the guest's."""

    def load(self, state: CmosState) -> None:
        self._index, self._data = state.index, bytearray(state.data)
