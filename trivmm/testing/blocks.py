"""A block driver on the mock driver's queue: requests with a slot of guest memory each, several under way at once."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver

__all__ = [
    "DISCARD",
    "FLUSH",
    "GET_ID",
    "IN",
    "OUT",
    "WRITE_ZEROES",
    "Answer",
    "BlockDriver",
    "has_direct",
    "open_blocks",
    "ranges",
]

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
HEADERS: Final = 0x20000
STATUSES: Final = 0x28000
DATA: Final = 0x100000
UNTOUCHED: Final = 0xAA  # a status that no device gives
LIMIT_S: Final = 20.0


def ranges(*each: tuple[int, int, int]) -> bytes:
    """The data of a discard or write-zeroes: (sector, sectors, flags) of each."""
    return b"".join(struct.pack("<QII", *one) for one in each)


def has_direct(folder: Path) -> bool:
    """Whether files there can be read past the page cache."""
    path = folder / "probe"
    path.write_bytes(bytes(4096))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@attrs.frozen
class Answer:
    status: int
    used: int
    data: bytes


@attrs.define(eq=False)
class BlockDriver:
    """``slot_bytes`` of data each request may have; ``parts`` descriptors, so a queue of ``driver.size`` holds
    ``driver.size // (parts + 2)`` requests."""

    driver: MockDriver
    slot_bytes: int = 0x10000
    parts: int = 2
    base: int = 0  # of all its guest memory but the rings
    _waiting: dict[int, tuple[int, int, int]] = attrs.field(factory=dict, init=False)
    """By head: slot, and what is to be read, from where and how much."""

    def data_gpa(self, slot: int) -> int:
        return self.base + DATA + slot * self.slot_bytes

    def offer(
        self,
        kind: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        room: int = 0,
        slot: int = 0,
        cut: Sequence[int] = (),
        shift: int = 0,
    ) -> None:
        """A request whose data begins ``shift`` bytes into its slot, in segments that end at ``cut``."""
        memory, gpa, length = self.driver.memory, self.data_gpa(slot) + shift, room or len(data)
        memory.write(self.base + HEADERS + 16 * slot, struct.pack("<IIQ", kind, 0, sector & (1 << 64) - 1))
        memory.write(self.base + STATUSES + slot, bytes([UNTOUCHED]))
        if data:
            memory.write(gpa, data)
        ends = [*cut, length] if length else []
        starts = [0, *cut]
        segments = [
            Descriptor(gpa + start, end - start, WRITE if room else 0) for start, end in zip(starts, ends, strict=False)
        ]
        assert len(segments) <= self.parts
        chain = [
            Descriptor(self.base + HEADERS + 16 * slot, 16),
            *segments,
            Descriptor(self.base + STATUSES + slot, 1, WRITE),
        ]
        head = self.driver.chain(*chain, first=slot * (self.parts + 2))
        self._waiting[head] = slot, gpa, room
        self.driver.offer(head)

    async def answers(self, count: int = 1) -> dict[int, Answer]:
        """Wait for so many, by slot."""
        found: dict[int, Answer] = {}
        with trio.fail_after(LIMIT_S):
            while True:
                for head, used in self.driver.used():
                    slot, gpa, room = self._waiting.pop(head)
                    status = self.driver.memory.read(self.base + STATUSES + slot, 1)[0]
                    found[slot] = Answer(status, used, self.driver.memory.read(gpa, room))
                if len(found) >= count:
                    return found
                await trio.lowlevel.wait_readable(self.driver.call)
                self.driver.interrupts()

    async def do(self, kind: int, sector: int = 0, **how: object) -> Answer:
        """One request, to its end."""
        self.offer(kind, sector, **how)  # type: ignore[arg-type]
        self.driver.ring()
        return (await self.answers())[0]


@contextmanager
def open_blocks() -> Iterator[BlockDriver]:
    """One with guest RAM of its own, and a queue of 64."""
    memory = GuestMemory([(0, 8 << 20)])
    driver = MockDriver(memory, size=64)
    yield BlockDriver(driver)
    driver.close()
    memory.close()
