"""A bus that notes what a guest asks for: to run a vCPU back end by hand, access by access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, Effect, GuestRequest
from trivmm.testing.scripted import IoIn, IoOut, MmioRead, MmioWrite

__all__ = ["NOTED", "RecordingBus"]

NOTED: Final = GuestRequest("noted", "by a recording bus")
"""The outcome of every write: the vCPU has executed nothing past it."""

Read = IoIn | MmioRead
Write = IoOut | MmioWrite


def _all_ones(read: Read) -> bytes:
    return b"\xff" * (read.size * read.count if isinstance(read, IoIn) else read.size)


class RecordingBus(Bus):
    """``reads`` and ``writes`` in their order; ``answer`` gives what a read finds."""

    def __init__(self, answer: Callable[[Read], bytes] = _all_ones) -> None:
        super().__init__(AddressSpace("pio"), AddressSpace("mmio"))
        self.reads: list[Read] = []
        self.writes: list[Write] = []
        self.answer = answer

    def _read(self, read: Read) -> bytes:
        self.reads.append(read)
        return self.answer(read)

    def _write(self, write: Write) -> Effect:
        self.writes.append(write)
        return NOTED

    def read_port(self, port: int, size: int, count: int = 1) -> bytes:
        return self._read(IoIn(port, size, count))

    def write_port(self, port: int, size: int, data: bytes) -> Effect:
        return self._write(IoOut(port, size, data))

    def read_mmio(self, gpa: int, size: int) -> bytes:
        return self._read(MmioRead(gpa, size))

    def write_mmio(self, gpa: int, data: bytes) -> Effect:
        return self._write(MmioWrite(gpa, data))
