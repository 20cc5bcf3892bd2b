"""A mock driver: it lays out a split virtqueue in guest RAM and uses it as a guest would (virtio 1.2 section 2.7).

For tests, fuzzers and benchmarks of rings and devices without a guest. It writes memory directly, so it can be as
wrong as a test wants it to be.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import NO_VECTOR, QueueState
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.setup import DriverSetup

__all__ = ["INDIRECT", "NEXT", "WRITE", "Descriptor", "MockDriver", "until"]

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
DESCRIPTOR: Final = struct.Struct("<QIHH")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread in C does, which nothing tells us of. The caller bounds it."""
    while True:
        if condition():
            return
        await trio.lowlevel.checkpoint()


@attrs.frozen
class Descriptor:
    gpa: int
    length: int
    flags: int = 0
    next: int = 0


@attrs.define(eq=False)
class MockDriver:
    """One queue of ``size`` entries at ``base`` (descriptor table, then avail ring, then used ring, a page each)."""

    memory: GuestMemory
    size: int = 8
    base: int = 0x10000
    event_idx: bool = False
    avail: int = 0
    seen: int = 0
    doorbell: int = attrs.field(factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    call: int = attrs.field(factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    irq: Any = None
    isr: Any = None

    def __attrs_post_init__(self) -> None:
        self.isr = ffi.new("uint32_t *")
        self.irq = ffi.new("struct tv_irq *")
        self.irq.isr, self.irq.fd = self.isr, self.call

    @property
    def avail_gpa(self) -> int:
        return self.base + 0x4000

    @property
    def used_gpa(self) -> int:
        return self.base + 0x8000

    def queue(self, next_avail: int = 0, next_used: int = 0) -> QueueState:
        return QueueState(self.size, NO_VECTOR, True, self.base, self.avail_gpa, self.used_gpa, next_avail, next_used)

    def setup(self, features: int, **where: int) -> DriverSetup:
        """Of a driver that uses this queue only; ``where`` as :meth:`queue`."""
        return DriverSetup(features, (self.queue(**where),))

    @property
    def handle(self) -> QueueHandle:
        return QueueHandle(self.doorbell, self.irq)

    # --- the driver's half -----------------------------------------------------------------------------------

    def describe(self, at: int, descriptor: Descriptor, table: int | None = None) -> None:
        where = (self.base if table is None else table) + 16 * at
        self.memory.write(where, DESCRIPTOR.pack(descriptor.gpa, descriptor.length, descriptor.flags, descriptor.next))

    def chain(self, *parts: Descriptor, first: int = 0, table: int | None = None) -> int:
        """Write descriptors ``first``, ``first + 1``, … linked in order; gives the head."""
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            flags = part.flags if last else part.flags | NEXT
            self.describe(first + number, Descriptor(part.gpa, part.length, flags, first + number + 1), table)
        return first

    def offer(self, head: int) -> None:
        self.memory.write(self.avail_gpa + 4 + 2 * (self.avail % self.size), struct.pack("<H", head & 0xFFFF))
        self.avail = (self.avail + 1) & 0xFFFF
        self.set_avail_index(self.avail)

    def set_avail_index(self, index: int) -> None:
        self.memory.write(self.avail_gpa + 2, struct.pack("<H", index & 0xFFFF))

    def set_avail_flags(self, flags: int) -> None:
        self.memory.write(self.avail_gpa, struct.pack("<H", flags))

    def set_used_event(self, index: int) -> None:
        self.memory.write(self.avail_gpa + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    @property
    def avail_event(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used_gpa + 4 + 8 * self.size, 2))[0])

    @property
    def used_flags(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used_gpa, 2))[0])

    @property
    def used_index(self) -> int:
        return int(struct.unpack("<H", self.memory.read(self.used_gpa + 2, 2))[0])

    def used(self) -> list[tuple[int, int]]:
        """(head, length) of every entry that is new since the last call."""
        found = []
        while self.seen != self.used_index:
            entry = self.memory.read(self.used_gpa + 4 + 8 * (self.seen % self.size), 8)
            found.append(struct.unpack("<II", entry))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    def ring(self) -> None:
        os.eventfd_write(self.doorbell, 1)

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    # --- the device's half, without a worker -----------------------------------------------------------------

    def open(self, *, indirect: bool = True, next_avail: int = 0, next_used: int = 0) -> Any:
        """A ``struct tv_queue *`` over this queue, to be walked by hand. :raises ValueError: when it can't be."""
        queue = ffi.new("struct tv_queue *")
        queue.memory, queue.irq = self.memory.native, self.irq
        queue.desc_gpa, queue.avail_gpa, queue.used_gpa = self.base, self.avail_gpa, self.used_gpa
        queue.size, queue.next_avail, queue.next_used = self.size, next_avail, next_used
        queue.event_idx, queue.indirect = self.event_idx, indirect
        if lib.tv_queue_open(queue):
            raise ValueError("rings outside RAM or misaligned")
        return queue

    def close(self) -> None:
        os.close(self.doorbell)
        os.close(self.call)
