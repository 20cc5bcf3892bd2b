"""A mock driver: it lays out split virtqueues in guest RAM and uses them as a guest would (virtio 1.2 section 2.7).

For tests, fuzzers and benchmarks of rings and devices without a guest: :class:`MockDriver` is one queue of anything,
:class:`DeviceDriver` drives a whole device of any kind. It writes memory directly, so it can be as
wrong as a test wants it to be.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import NO_VECTOR, QueueState
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.queue import F_EVENT_IDX
from trivmm.virtio.setup import DriverSetup

__all__ = ["INDIRECT", "NEXT", "WRITE", "Descriptor", "DeviceDriver", "MockDriver", "activated", "answered", "until"]

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
STOP_LIMIT_S: Final = 10.0
ANSWER_LIMIT_S: Final = 20.0
RINGS_ROOM: Final = 0x10000
DESCRIPTOR: Final = struct.Struct("<QIHH")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread in C does, which nothing tells us of. The caller bounds it."""
    while True:
        if condition():
            return
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def activated(device: WorkerDevice, setup: DriverSetup, handles: Sequence[QueueHandle]) -> AsyncIterator[None]:
    """``device`` works within the block; its workers have ended after it. Not closed."""
    async with trio.open_nursery() as workers:
        await device.activate(setup, handles, workers)
        try:
            yield
        finally:
            with trio.move_on_after(STOP_LIMIT_S, shield=True):
                await device.stop()


async def answered(driver: MockDriver, count: int = 1) -> list[tuple[int, int]]:
    """What ``used`` gives, once interrupts have told of ``count`` chains at the least. Within 20 s."""
    found: list[tuple[int, int]] = []
    with trio.fail_after(ANSWER_LIMIT_S):
        while len(found) < count:
            await trio.lowlevel.wait_readable(driver.call)
            driver.interrupts()
            found += driver.used()
    return found


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

    def _next(self) -> tuple[int, int]:
        entry = self.memory.read(self.used_gpa + 4 + 8 * (self.seen % self.size), 8)
        self.seen = (self.seen + 1) & 0xFFFF
        head, length = struct.unpack("<II", entry)
        return head, length

    def used(self) -> list[tuple[int, int]]:
        """(head, length) of every entry that is new since the last call."""
        found = []
        while self.seen != self.used_index:
            found.append(self._next())
        return found

    async def next_used(self) -> tuple[int, int]:
        """(head, length) of the next entry, once an interrupt has told of it. Bounded by the caller."""
        self.set_used_event(self.seen)  # "tell me of the next", before looking whether it is there already
        while self.seen == self.used_index:
            await trio.lowlevel.wait_readable(self.call)
            self.interrupts()
        return self._next()

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


@attrs.define(eq=False)
class DeviceDriver:
    """All the queues of a device, whatever its kind: sets them up, activates it, and makes requests whose buffers it
    finds room for.

    Rings from ``base``, a :data:`RINGS_ROOM` a queue; behind them the buffers, which :meth:`request` gives back."""

    device: WorkerDevice
    queues: tuple[MockDriver, ...]
    features: int
    arena: int  # where buffers lie
    _free: int = 0

    @classmethod
    def of(cls, device: WorkerDevice, *, size: int = 8, base: int = 0x10000, event_idx: bool = False) -> DeviceDriver:
        """Takes every feature that the device offers, but for EVENT_IDX, which is for ``event_idx`` to say."""
        memory = device.memory
        queues = tuple(
            MockDriver(memory, size=size, base=base + RINGS_ROOM * index, event_idx=event_idx)
            for index in range(len(device.queue_sizes))
        )
        features = device.features if event_idx else device.features & ~F_EVENT_IDX
        arena = base + RINGS_ROOM * len(queues)
        return cls(device, queues, features, arena, arena)

    @asynccontextmanager
    async def active(self) -> AsyncIterator[None]:
        setup = DriverSetup(self.features, tuple(queue.queue() for queue in self.queues))
        async with activated(self.device, setup, [queue.handle for queue in self.queues]):
            yield

    def room(self, data: bytes) -> int:
        """Put ``data`` into a buffer of its own; gives where."""
        at, self._free = self._free, self._free + len(data)
        self.device.memory.write(at, data)
        return at

    def offer(self, *readable: bytes, writable: Sequence[int] = (), queue: int = 0, first: int = 0) -> list[int]:
        """A chain of such buffers, from descriptor ``first``, and a notification. Gives where the writable ones are."""
        parts = [Descriptor(self.room(data), len(data)) for data in readable]
        places = [self.room(bytes(length)) for length in writable]
        parts += [Descriptor(at, length, WRITE) for at, length in zip(places, writable, strict=True)]
        self.queues[queue].offer(self.queues[queue].chain(*parts, first=first))
        self.queues[queue].ring()
        return places

    async def request(self, *readable: bytes, writable: Sequence[int] = (), queue: int = 0) -> list[bytes]:
        """What the device wrote into each writable buffer, once it has used the chain. Bounded by the caller."""
        free, driver = self._free, self.queues[queue]
        driver.set_used_event(driver.seen)
        places = self.offer(*readable, writable=writable, queue=queue)
        while not driver.used():
            await trio.lowlevel.wait_readable(driver.call)
            driver.interrupts()
        self._free = free
        return [driver.memory.read(at, length) for at, length in zip(places, writable, strict=True)]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
