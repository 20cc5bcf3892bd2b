"""Whether a guest that was reset by a triple fault should be booted once more.

A triple fault resets a PC, and old guests reboot by one on purpose; a kernel that crashes at once does the same after
every boot, for ever. So a few in a row, each soon after its boot, are a crash with its registers.
"""

from __future__ import annotations

from typing import Final

import attrs

__all__ = ["LIMIT", "SOON_S", "TripleFaults"]

LIMIT: Final = 5
SOON_S: Final = 10.0  # after a boot; who gets further than that is slow to loop, and told of in the log each time


@attrs.define
class TripleFaults:
    """Times in seconds, of the clock that the VM has."""

    _booted: float = 0.0
    _count: int = 0

    def booted(self, now: float) -> None:
        self._booted = now

    def loop(self, now: float) -> bool:
        """There is another one: whether it is one too many."""
        self._count = self._count + 1 if now - self._booted < SOON_S else 1
        return self._count >= LIMIT
