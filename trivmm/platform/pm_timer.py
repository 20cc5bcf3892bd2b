"""The ACPI power management timer: 32 bits at port 0x608 that count 3,579,545 times a second, as in Cloud Hypervisor.

Owned by the board. Nothing announces it; UEFI made for Cloud Hypervisor knows where it is, and waits by it. It goes on
at a migration's destination where it stood, so no wait there becomes one of twenty minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from trivmm.bus.space import Effect
from trivmm.state.platform import PmTimerState

__all__ = ["PM_TIMER_PORTS", "PmTimer"]

PM_TIMER_PORTS: Final = (0x608, 4)  # first port and count
HZ: Final = 3_579_545
WIDTH: Final = 32


class PmTimer:
    """``clock_ns`` counts nanoseconds from anywhere (for tests)."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._began_ns = clock_ns()

    def _ticks(self) -> int:
        return (self._clock_ns() - self._began_ns) * HZ // 1_000_000_000 & (1 << WIDTH) - 1

    def read(self, offset: int, size: int) -> bytes:
        return self._ticks().to_bytes(WIDTH // 8, "little")[offset : offset + size]

    def write(self, offset: int, data: bytes) -> Effect:
        return None

    def save(self) -> PmTimerState:
        return PmTimerState(self._ticks())

    def check(self, state: PmTimerState, where: str) -> None:
        """Any count will do."""

    def load(self, state: PmTimerState) -> None:
        self._began_ns = self._clock_ns() + -state.ticks * 1_000_000_000 // HZ  # not one tick less
