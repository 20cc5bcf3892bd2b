"""virtio-console with its real worker threads and the mock driver as the guest."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.config import ConsoleConfig
from trivmm.errors import MigrationError, ProtocolError
from trivmm.memory.guest import GuestMemory
from trivmm.platform.sinks import FdSink, GuestOutput, NullSink, PtySink, Sink
from trivmm.state.virtio import QueueState
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, until
from trivmm.testing.states import sent
from trivmm.virtio.console.device import ConsoleDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.setup import DriverSetup

LIMIT_S = 30
VERSION_1, EVENT_IDX, F_SIZE = 1 << 32, 1 << 29, 1
INPUT, OUTPUT = 0x100000, 0x200000  # where the driver's buffers lie
TX_SIZE, RX_SIZE = 65536, 4096


class Guest:
    """Memory and a driver for each queue: ``receive`` and ``transmit``."""

    def __init__(self, *, event_idx: bool = False) -> None:
        self.memory = GuestMemory([(0, 4 << 20)])
        self.receive = MockDriver(self.memory, event_idx=event_idx)
        self.transmit = MockDriver(self.memory, base=0x20000, event_idx=event_idx)

    def setup(self, features: int, queues: tuple[QueueState, ...] = ()) -> DriverSetup:
        """Fresh queues, or such as somebody left."""
        return DriverSetup(features, queues or (self.receive.queue(), self.transmit.queue()))

    @property
    def handles(self) -> list[QueueHandle]:
        return [self.receive.handle, self.transmit.handle]

    def say(self, data: bytes, *, at: int = OUTPUT, pieces: int = 1, first: int = 0) -> None:
        self.memory.write(at, data)
        step = -(-len(data) // pieces)
        parts = [Descriptor(at + start, min(step, len(data) - start)) for start in range(0, len(data), step)]
        self.transmit.offer(self.transmit.chain(*parts, first=first))
        self.transmit.ring()

    def listen(self, length: int, *, number: int = 0) -> None:
        """Offer a buffer for input."""
        at = INPUT + 0x10000 * number
        self.receive.offer(self.receive.chain(Descriptor(at, length, WRITE), first=number))
        self.receive.ring()

    async def heard(self) -> bytes:
        head, length = await self.receive.next_used()
        return self.memory.read(INPUT + 0x10000 * head, length)

    def dirty(self, gpa: int) -> bool:
        region = self.memory.regions[0]
        words = ffi.new("uint64_t[]", region.bitmap_words)
        lib.tv_dirty_take(region.dirty, words, region.bitmap_words)
        return bool(words[(gpa >> 12) // 64] >> ((gpa >> 12) % 64) & 1)

    def close(self) -> None:
        self.receive.close()
        self.transmit.close()
        self.memory.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


@attrs.define(eq=False)
class SlowSink:
    """Takes nothing until it is let, and then only so many bytes at a time."""

    piece: int = 1000
    gate: trio.Event = attrs.field(factory=trio.Event)
    got: bytearray = attrs.field(factory=bytearray)

    async def take(self, output: GuestOutput) -> None:
        await self.gate.wait()
        piece = output.peek()[: self.piece]
        self.got += piece
        output.consume(len(piece))

    def close(self) -> None:
        return None


def device_of(guest: Guest, sink: Sink | None) -> ConsoleDevice:
    return ConsoleDevice(ConsoleConfig("Null"), guest.memory, sink)


@asynccontextmanager
async def active(
    device: ConsoleDevice, guest: Guest, features: int = VERSION_1 | F_SIZE, queues: tuple[QueueState, ...] = ()
) -> AsyncIterator[None]:
    """Active, with its line's tasks; stopped at the end, not closed."""
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(device.line.run)
            await device.activate(guest.setup(features, queues), guest.handles, nursery)
            try:
                yield
            finally:
                with trio.move_on_after(LIMIT_S, shield=True):
                    await device.stop()
                nursery.cancel_scope.cancel()


async def test_both_ways(guest: Guest) -> None:
    device = device_of(guest, NullSink())
    async with active(device, guest):
        guest.say(b"hello, host", pieces=3)
        assert await guest.transmit.next_used() == (0, 0)
        await until(lambda: device.line.tail() == b"hello, host")
        guest.listen(64)
        assert device.line.push_input(b"hello, guest") == 12
        assert await guest.heard() == b"hello, guest"
        assert guest.dirty(INPUT), "what the host wrote travels with a migration"
    counted = device.counters()
    assert (counted["transmitted_bytes"], counted["received_bytes"]) == (11, 12)
    assert (counted["tx_bytes"], counted["rx_bytes"]) == (11, 12)
    device.close()
    device.close()


@pytest.mark.parametrize("event_idx", [False, True])
async def test_buffers_wait_for_input_and_input_for_buffers(event_idx: bool) -> None:
    guest = Guest(event_idx=event_idx)
    device = device_of(guest, NullSink())
    async with active(device, guest, VERSION_1 | (EVENT_IDX if event_idx else 0)):
        for number in range(3):
            guest.listen(4, number=number)
        device.line.push_input(b"abcdef")
        assert [await guest.heard(), await guest.heard()] == [b"abcd", b"ef"]
        device.line.push_input(b"gh")
        assert await guest.heard() == b"gh"
        device.line.push_input(b"early")
        guest.listen(8, number=0)
        assert await guest.heard() == b"early"
    assert device.queues[0] == guest.receive.queue(4, 4)
    device.close()
    guest.close()


async def test_a_buffer_without_input_goes_back_and_is_served_by_the_next_worker(guest: Guest) -> None:
    device = device_of(guest, NullSink())
    async with active(device, guest):
        guest.listen(16)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert device.queues[0] == guest.receive.queue()
    assert guest.receive.used_index == 0
    device.line.push_input(b"later")
    async with active(device, guest, queues=device.queues):
        assert await guest.heard() == b"later"
    device.close()


async def test_a_worker_that_has_nothing_to_do_does_nothing(guest: Guest) -> None:
    """Neither a buffer without input nor a full ring keeps it busy: it sleeps until the other side wakes it."""
    sink = SlowSink()
    device = device_of(guest, sink)
    async with active(device, guest):
        guest.listen(16)
        guest.say(bytes(TX_SIZE + 1))
        await until(lambda: lib.tv_line_tx_used(device.line.rings) == TX_SIZE)
        await trio.testing.wait_all_tasks_blocked(0.05)
        before = [int(worker.native.worker.wakeups) for worker in device._workers]
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert [int(worker.native.worker.wakeups) for worker in device._workers] == before
        sink.gate.set()
        assert await guest.transmit.next_used() == (0, 0)
    device.close()


async def test_a_slow_sink_holds_the_driver_up_and_nothing_is_lost(guest: Guest) -> None:
    sink = SlowSink()
    device = device_of(guest, sink)
    said = bytes(each * 7 & 0xFF for each in range(3 * TX_SIZE + 123))
    async with active(device, guest):
        guest.say(said, pieces=3)
        guest.say(b"the end", at=OUTPUT + len(said), first=5)
        await until(lambda: lib.tv_line_tx_used(device.line.rings) == TX_SIZE)
        assert guest.transmit.used_index == 0
        sink.gate.set()
        assert [(await guest.transmit.next_used())[0] for _ in range(2)] == [0, 5]
        await device.line.drain(LIMIT_S)
    assert bytes(sink.got) == said + b"the end"
    device.close()


async def test_input_that_finds_no_room_waits(guest: Guest) -> None:
    device = device_of(guest, NullSink())
    typed = bytes(each & 0x7F for each in range(3 * RX_SIZE))
    heard = b""
    async with active(device, guest), trio.open_nursery() as nursery:
        nursery.start_soon(device.line.feed, typed)
        while len(heard) < len(typed):
            guest.listen(1000)
            heard += await guest.heard()
    assert heard == typed
    device.close()


async def test_what_is_under_way_travels(guest: Guest) -> None:
    """A chain that the ring has half of, output that no sink took, input that no buffer took."""
    device = device_of(guest, SlowSink())
    said = bytes(each * 11 & 0xFF for each in range(TX_SIZE + 5000))
    async with active(device, guest):
        guest.say(said)
        await until(lambda: lib.tv_line_tx_used(device.line.rings) == TX_SIZE)
        device.line.push_input(b"typed before")
    device.resize(100, 30)
    state, queues = sent(device.save()), device.queues
    assert queues[1] == guest.transmit.queue()
    assert state.tx_taken == TX_SIZE
    assert not lib.tv_line_peek_tx(device.line.rings, ffi.new("uint8_t[]", 1), 1), "it is not said here as well"
    assert device.line.push_input(b"x") == 0

    there = SlowSink()
    twin = device_of(guest, there)
    twin.load(state)
    there.gate.set()
    async with active(twin, guest, queues=queues):
        assert await guest.transmit.next_used() == (0, 0)
        await twin.line.drain(LIMIT_S)
        guest.listen(100)
        assert await guest.heard() == b"typed before"
    assert bytes(there.got) == said
    assert twin.size == (100, 30)
    twin.close()

    device.line.thaw()  # or it did not move after all
    sink = device.line.sink
    assert isinstance(sink, SlowSink)
    sink.gate.set()
    again = Guest()
    device.memory = again.memory
    again.say(said)
    async with active(device, again, queues=queues):
        assert await again.transmit.next_used() == (0, 0)
        await device.line.drain(LIMIT_S)
    assert bytes(sink.got) == said
    device.close()
    again.close()


async def test_a_reset_forgets_the_chain_but_not_what_was_said_or_typed(guest: Guest) -> None:
    sink = SlowSink()
    device = device_of(guest, sink)
    async with active(device, guest):
        guest.say(b"a" * (TX_SIZE + 10))
        await until(lambda: lib.tv_line_tx_used(device.line.rings) == TX_SIZE)
        device.line.push_input(b"for the next driver")
    device.reset()
    sink.gate.set()
    again = Guest()
    device.memory = again.memory
    again.say(b"b" * 10)
    async with active(device, again):
        again.listen(100)
        assert await again.heard() == b"for the next driver"
        await again.transmit.next_used()
        await device.line.drain(LIMIT_S)
    assert bytes(sink.got) == b"a" * TX_SIZE + b"b" * 10
    device.close()
    again.close()


async def test_buffers_that_make_no_sense_cost_only_their_driver(guest: Guest) -> None:
    device = device_of(guest, NullSink())
    broken = trio.Event()
    said: list[str] = []

    def note(problem: str) -> None:
        said.append(problem)
        broken.set()

    device.on_broken = note
    async with active(device, guest):
        guest.receive.offer(guest.receive.chain(Descriptor(INPUT, 16)))  # readable, on the receive queue
        guest.receive.ring()
        assert await guest.receive.next_used() == (0, 0)
        guest.transmit.offer(guest.transmit.chain(Descriptor(OUTPUT, 16, WRITE)))
        guest.transmit.ring()
        assert await guest.transmit.next_used() == (0, 0)
        assert guest.memory.read(OUTPUT, 16) == bytes(16)
        guest.transmit.offer(guest.transmit.chain(Descriptor(1 << 40, 16), first=1))
        guest.transmit.ring()
        await broken.wait()
        guest.listen(16, number=1)
        device.line.push_input(b"still")
        assert await guest.heard() == b"still"
    assert said == ["queue 1: buffer outside guest RAM"]
    device.close()


# --- the size ----------------------------------------------------------------------------------------------------


def told(device: ConsoleDevice) -> list[tuple[int, int]]:
    changes: list[tuple[int, int]] = []
    device.on_config_change = lambda: changes.append(device.size)
    return changes


async def test_the_driver_is_told_of_a_new_size(guest: Guest) -> None:
    device = device_of(guest, NullSink())
    changes = told(device)
    assert device.read_config(0, 12) == struct.pack("<HHII", 0, 0, 1, 0)
    device.resize(80, 24)
    assert device.read_config(0, 4) == struct.pack("<HH", 80, 24)
    assert device.read_config(2, 16) == struct.pack("<HII", 24, 1, 0) + b"\xff" * 6
    assert changes == []
    async with active(device, guest):
        assert changes == [(80, 24)]  # Linux looks only when it is told
        device.resize(132, 50)
        device.resize(132, 50)
        device.resize(1 << 20, 7)
        assert changes == [(80, 24), (132, 50), (65535, 7)]
    device.resize(1, 1)
    assert len(changes) == 3
    async with active(device, guest, VERSION_1):  # a driver that did not take F_SIZE
        device.resize(2, 2)
    assert len(changes) == 3
    device.close()


async def test_the_size_is_the_terminals(guest: Guest) -> None:
    ours, other = os.openpty()
    try:
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("<HHHH", 30, 90, 0, 0))
        device = device_of(guest, FdSink(os.dup(other)))
        changes = told(device)
        assert device.size == (90, 30)
        async with active(device, guest):
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("<HHHH", 31, 91, 0, 0))
            device.terminal_resized()
            assert changes == [(90, 30), (91, 31)]
        device.close()
    finally:
        os.close(ours)
        os.close(other)


# --- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"columns": -1},
        {"rows": 1 << 16},
        {"tx_taken": (1 << 30) + 1},
        {"tx_taken": None},
        {"tx": "!"},
        {"rx": "AAAA" * 1400},
        {"more": 0},
    ],
)
def test_hostile_state(guest: Guest, change: dict[str, Any]) -> None:
    device = device_of(guest, None)
    with pytest.raises(ProtocolError):
        sent(device.save(), **change)
    device.close()


async def test_a_half_taken_chain_that_is_shorter_now_is_done(guest: Guest) -> None:
    """A hostile source, or a guest that changed it meanwhile."""
    device = device_of(guest, NullSink())
    device.load(sent(device.save(), tx_taken=1 << 30))
    device.line.thaw()
    async with active(device, guest):
        guest.say(b"short")
        assert await guest.transmit.next_used() == (0, 0)
        guest.say(b"next", first=1)
        assert await guest.transmit.next_used() == (1, 0)
        await until(lambda: device.line.tail() == b"next")
    device.close()


def test_a_description_that_differs_is_refused(guest: Guest) -> None:
    device = device_of(guest, None)
    described = device.describe()
    assert (described.type, described.queue_sizes) == (3, (256, 256))
    device.become(sent(described))
    with pytest.raises(MigrationError, match=r"__console: the sender's features is 0"):
        device.become(sent(described, features=0))
    device.close()


async def test_a_pty_is_the_consoles_too(guest: Guest) -> None:
    sink = PtySink("console")
    assert sink.path is not None
    device = device_of(guest, sink)
    fd = os.open(sink.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    async with active(device, guest):
        guest.say(b"login: ")
        await trio.lowlevel.wait_readable(fd)
        assert os.read(fd, 100) == b"login: "
        os.write(fd, b"root\r")
        guest.listen(100)
        assert await guest.heard() == b"root\r"
    device.close()
    trio.lowlevel.notify_closing(fd)
    os.close(fd)
