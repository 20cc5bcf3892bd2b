"""The firmware ROM's place on the bus. Reads never come here: they are the CPU's own, from memory that it can't write.

Owned by the board. What a guest writes is dropped and counted; hardware would take it for a command of a flash chip,
and there is none.
"""

from __future__ import annotations

from trivmm.bus.space import Effect

__all__ = ["Rom"]


class Rom:
    """``writes`` dropped since the build."""

    def __init__(self) -> None:
        self.writes = 0

    def read(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> Effect:
        self.writes += 1
        return None

    def counters(self) -> dict[str, int]:
        return {"rom_writes": self.writes}
