"""The C of ffi/pages.h on real sockets against the Python oracle: same frames, same memory, same refusals."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from trivmm._native import ffi, lib
from trivmm.errors import ProtocolError
from trivmm.memory.guest import GuestMemory
from trivmm.migration.pages.land import MemfdLanding, PageSink
from trivmm.migration.pages.send import DirtySet, page_frames
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire.frame import FRAME_PAGES, PAGE_BYTES, MessageType

DONE, BUDGET, KICKED = lib.TV_PAGES_DONE, lib.TV_PAGES_BUDGET, lib.TV_PAGES_KICKED
STALLED, EOF, BAD = lib.TV_PAGES_STALLED, lib.TV_PAGES_EOF, lib.TV_PAGES_BAD
MIB = 1 << 20
KEPT: weakref.WeakKeyDictionary[Any, PageSink] = weakref.WeakKeyDictionary()  # as long as the job that points to it
INBOX = ffi.gc(lib.tv_inbox_new(), lib.tv_inbox_free)
END = wire.encode_frame(MessageType.ROUND_END, b'{"round":1,"pages":0}')
HEADER = wire.HEADER_BYTES


class Pair:
    """Two connected sockets and an eventfd for each side; a thread bounded by join."""

    def __init__(self, family: str) -> None:
        if family == "unix":
            self.a, self.b = socket.socketpair()
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.a = socket.create_connection(listener.getsockname())
            self.b, _ = listener.accept()
            listener.close()
        self.kick_a = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kick_b = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        self.a.close()
        self.b.close()
        os.close(self.kick_a)
        os.close(self.kick_b)


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    made.a.setblocking(False)
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 * MIB), (1 << 32, 2 * MIB)])
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 * MIB), (1 << 32, 2 * MIB)])
    yield made
    made.close()


def contents(memory: GuestMemory) -> list[bytes]:
    return [memory.read(region.gpa, region.size) for region in memory.regions]


def scribble(memory: GuestMemory, seed: int) -> None:
    chance = random.Random(seed)
    for region in memory.regions:
        for page in range(region.pages):
            kind = chance.randrange(4)
            if kind == 0:
                memory.write(region.gpa + page * 4096, chance.randbytes(4096))
            elif kind == 1:
                memory.write(region.gpa + page * 4096 + 4088, b"x" * 8)
            elif kind == 2:
                memory.write(region.gpa + page * 4096, bytes(4096))


def send_job(pair: Pair, dirty: DirtySet, **more: Any) -> tuple[Any, Any]:
    staging = ffi.new("uint8_t[]", FRAME_PAGES * PAGE_BYTES + 64)
    aligned = ffi.cast("uint8_t *", (int(ffi.cast("uintptr_t", staging)) + 63) & ~63)
    job = ffi.new("struct tv_page_send *")
    job.fd, job.kick_fd, job.stall_ms, job.grace_ms = pair.a.fileno(), pair.kick_a, 20_000, 1000
    job.version, job.slot, job.pages = wire.VERSION, dirty.region.slot, dirty.region.pages
    job.hva, job.dirty, job.staging = ffi.cast("uint8_t *", dirty.region.hva), dirty.bits, aligned
    job.max_pages, job.memfd = 1 << 40, -1
    for name, value in more.items():
        setattr(job, name, value)
    return job, staging


def intake(pair: Pair, sink: PageSink, **more: Any) -> Any:
    job = ffi.new("struct tv_page_intake *")
    job.fd, job.kick_fd, job.stall_ms, job.version = pair.b.fileno(), pair.kick_b, 20_000, wire.VERSION
    job.landing, job.inbox, job.max_pages = sink.native, INBOX, 1 << 40
    KEPT[job] = sink
    for name, value in more.items():
        setattr(job, name, value)
    return job


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_c_to_c_and_the_zero_pages_clear_what_landed(pair: Pair, memory: GuestMemory, other: GuestMemory) -> None:
    sink = PageSink(MemfdLanding(other))
    number = sent = zero = 0
    for seed in (1, 2, 3):
        scribble(memory, seed)
        job = intake(pair, sink, sequence=number)
        thread = in_thread(lambda job=job: lib.tv_pages_receive(job))
        for region in memory.regions:
            dirty = DirtySet.of(region)
            dirty.add_touched()
            out, keep = send_job(pair, dirty, sequence=number)
            assert lib.tv_pages_send(out) == DONE
            assert dirty.count == 0
            assert out.sequence > number
            number = out.sequence
            sent, zero = sent + out.sent_pages, zero + out.zero_pages
            del keep
        pair.a.setblocking(True)
        pair.a.sendall(wire.numbered(END, number))
        pair.a.setblocking(False)
        thread.join(60)
        assert not thread.is_alive()
        assert job.reason == DONE
        assert job.sequence == number  # the frame that is not the C side's has it, and is not counted here
        number += 1
        assert bytes(ffi.buffer(job.header)) == wire.numbered(END, job.sequence)[:HEADER]
        assert pair.b.recv(len(END) - HEADER, socket.MSG_WAITALL) == END[HEADER:]
        assert (sink.counts.pages, sink.counts.zero_pages) == (sent, zero)
        assert sent > 500
        assert zero > 100
        assert contents(memory) == contents(other)


def test_c_frames_read_by_the_oracle(pair: Pair, memory: GuestMemory, other: GuestMemory) -> None:
    scribble(memory, 4)
    sink, reader = PageSink(MemfdLanding(other)), wire.FrameReader()

    def read() -> None:
        while data := pair.b.recv(65536):
            reader.feed(data)
            while frame := reader.next_frame():
                sink.take(frame)

    thread = in_thread(read)
    number = 0
    for region in memory.regions:
        dirty = DirtySet.of(region)
        dirty.add_touched()
        out, keep = send_job(pair, dirty, max_pages=100, sequence=number)
        while (reason := lib.tv_pages_send(out)) == BUDGET:
            pass
        assert reason == DONE
        number = out.sequence
        del keep
    pair.a.close()
    thread.join(60)
    assert not thread.is_alive()
    assert reader.due == number
    assert contents(memory) == contents(other)


def test_oracle_frames_read_by_c(pair: Pair, memory: GuestMemory, other: GuestMemory) -> None:
    scribble(memory, 5)
    sink = PageSink(MemfdLanding(other))
    job = intake(pair, sink)
    thread = in_thread(lambda: lib.tv_pages_receive(job))
    pair.a.setblocking(True)
    number = 0
    for region in memory.regions:
        dirty = DirtySet.of(region)
        dirty.add_touched()
        for frame, _, _ in page_frames(dirty, 1 << 40):
            pair.a.sendall(wire.numbered(frame, number))
            number += 1
    pair.a.close()
    thread.join(60)
    assert not thread.is_alive()
    assert job.reason == EOF
    assert job.sequence == number
    assert contents(memory) == contents(other)


def test_only_touched_pages_are_marked(memory: GuestMemory) -> None:
    memory.write(5 * 4096, b"x")
    memory.write(700 * 4096 + 4095, b"yz")
    dirty = DirtySet.of(memory.regions[0])
    dirty.add_touched()
    assert list(dirty) == [5, 700, 701]
    assert dirty.count == 3


def test_a_kick_ends_a_sender_whose_peer_does_not_read(pair: Pair, memory: GuestMemory) -> None:
    scribble(memory, 6)
    dirty = DirtySet.of(memory.regions[0])
    dirty.add_touched()
    before = dirty.count
    out, keep = send_job(pair, dirty, grace_ms=10)
    pair.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pair.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    os.eventfd_write(pair.kick_a, 1)
    assert lib.tv_pages_send(out) == KICKED  # kicked before the start: nothing is broken
    assert not out.broken
    assert out.sequence == 0
    assert dirty.count == before
    os.eventfd_read(pair.kick_a)
    thread = in_thread(lambda: lib.tv_pages_send(out))
    os.eventfd_write(pair.kick_a, 1)
    thread.join(60)
    assert not thread.is_alive()
    assert out.reason == KICKED
    assert dirty.count == before - out.sent_pages - out.zero_pages
    del keep


def test_a_silent_peer_stalls_both_sides(pair: Pair, memory: GuestMemory, other: GuestMemory) -> None:
    scribble(memory, 7)
    assert lib.tv_pages_receive(intake(pair, PageSink(MemfdLanding(other)), stall_ms=20)) == STALLED
    dirty = DirtySet.of(memory.regions[0])
    for word in range(memory.regions[0].bitmap_words):
        dirty.bits[word] = (1 << 64) - 1
    for page in range(memory.regions[0].pages):
        memory.write(page * 4096, b"z")
    out, keep = send_job(pair, dirty, stall_ms=20)
    reason = lib.tv_pages_send(out)
    if reason == DONE:  # the kernel's buffers took all of it
        pytest.skip("socket buffers larger than the memory")
    assert reason == STALLED
    assert out.broken
    del keep


def test_a_peer_that_takes_a_little_now_and_then_stalls_a_sender(pair: Pair, memory: GuestMemory) -> None:
    for page in range(memory.regions[0].pages):
        memory.write(page * 4096, b"z")
    dirty = DirtySet.of(memory.regions[0])
    dirty.add_touched()
    pair.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pair.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    out, keep = send_job(pair, dirty, stall_ms=100)
    halt = threading.Event()

    def take_a_little() -> None:
        while not halt.wait(0.005):
            pair.b.recv(100)  # a frame of 512 KiB would take 26 s of this

    thread = in_thread(take_a_little)
    try:
        assert lib.tv_pages_send(out) == STALLED
        assert out.broken
    finally:
        halt.set()
        thread.join(60)
    assert not thread.is_alive()
    del keep


def test_a_closed_peer_is_eof(pair: Pair, memory: GuestMemory, other: GuestMemory) -> None:
    scribble(memory, 8)
    pair.b.close()
    dirty = DirtySet.of(memory.regions[0])
    dirty.add_touched()
    out, keep = send_job(pair, dirty)
    assert lib.tv_pages_send(out) == EOF
    del keep


def test_a_kick_ends_a_receiver(pair: Pair, other: GuestMemory) -> None:
    job = intake(pair, PageSink(MemfdLanding(other)))
    thread = in_thread(lambda: lib.tv_pages_receive(job))
    os.eventfd_write(pair.kick_b, 1)
    thread.join(60)
    assert job.reason == KICKED


def pages_frame(slot: int, numbers: list[int], payload: bytes | None = None, count: int | None = None) -> bytes:
    good = b"q" * 4096
    body = struct.pack(f"<II{len(numbers)}I", slot, len(numbers) if count is None else count, *numbers)
    return wire.encode_frame(MessageType.PAGES, body, good * len(numbers) if payload is None else payload)


def zero_frame(slot: int, runs: list[tuple[int, int]], count: int | None = None) -> bytes:
    body = struct.pack("<II", slot, len(runs) if count is None else count)
    return wire.encode_frame(MessageType.ZERO, body + b"".join(struct.pack("<II", *run) for run in runs))


@pytest.mark.parametrize(
    "frame",
    [
        pages_frame(2, [0]),
        pages_frame(0, [1024]),
        pages_frame(0, [2**32 - 1]),
        pages_frame(0, [3, 3]),
        pages_frame(0, [4, 3]),
        pages_frame(0, []),
        pages_frame(0, [0], count=2),
        pages_frame(0, [0, 1], payload=b"q" * 4096),
        zero_frame(2, [(0, 1)]),
        zero_frame(0, [(0, 1025)]),
        zero_frame(0, [(1023, 2**32 - 1)]),
        zero_frame(0, [(5, 2), (6, 1)]),
        zero_frame(0, [(5, 0)]),
        zero_frame(0, [(5, 1)], count=2),
        zero_frame(0, []),
        wire.encode_frame(MessageType.ZERO, b"1234"),
    ],
    ids=range(16),
)
def test_nonsense_is_refused_by_both(frame: bytes, memory: GuestMemory) -> None:
    made = Pair("unix")
    try:
        made.a.sendall(frame)
        job = intake(made, PageSink(MemfdLanding(memory)))
        assert lib.tv_pages_receive(job) == BAD
        assert job.problem
    finally:
        made.close()
    reader = wire.FrameReader()
    reader.feed(frame)
    got = reader.next_frame()
    assert got is not None
    with pytest.raises(ProtocolError):
        PageSink(MemfdLanding(memory)).take(got)


def test_pages_that_landed_before_are_filled_in_place_and_checked_all_the_same(memory: GuestMemory) -> None:
    numbers = [0, 1, 2, 7, 8, 100]
    frames = [pages_frame(0, numbers)]
    new = [bytes([number]) * 4096 for number in numbers]
    frames.append(wire.numbered(pages_frame(0, numbers, b"".join(new)), 1))
    bad = bytearray(wire.numbered(frames[1], 2))
    bad[-1] ^= 1
    made = Pair("unix")
    try:
        made.a.sendall(b"".join(frames))
        sink = PageSink(MemfdLanding(memory))
        assert lib.tv_pages_receive(intake(made, sink, max_pages=2 * len(numbers))) == BUDGET
        assert [memory.read(number * 4096, 4096) for number in numbers] == new
        assert memory.read(3 * 4096, 4096) == bytes(4096)
        made.a.sendall(bad)
        job = intake(made, sink, sequence=2)
        assert lib.tv_pages_receive(job) == BAD
        assert job.problem == lib.TV_BAD_PAGES_CRC
        assert job.bad_slot == 0
        assert job.sequence == 2  # the one at fault
    finally:
        made.close()


@pytest.mark.parametrize("landed", [False, True], ids=["fresh", "landed"])
def test_a_damaged_byte_anywhere_and_pages_that_changed_places_are_noticed(memory: GuestMemory, landed: bool) -> None:
    numbers = [3, 4, 5, 9]
    payload = b"".join(bytes([number]) * 4096 for number in numbers)
    good = pages_frame(1, numbers, payload)
    start = len(good) - len(payload)
    frames = [
        good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :]
        for place in [*range(start), *range(start, len(good), 501), len(good) - 1]
    ]
    frames.append(good[:start] + payload[4096:8192] + payload[:4096] + payload[8192:])
    frames.append(good[:start] + payload[4096:] + payload[-4096:])
    zero = zero_frame(1, [(0, 9)])
    frames.append(wire.numbered(zero[:28] + b"\1" + zero[29:], 0))  # a good header, and a CRC of pages that it has not
    for frame in frames:
        made = Pair("unix")
        try:
            sink = PageSink(MemfdLanding(memory))
            if landed:
                for number in numbers:
                    sink.landing.landed[1][0] |= 1 << number
            made.a.sendall(frame)
            job = intake(made, sink)
            reason = lib.tv_pages_receive(job)
            assert reason in (BAD, DONE)
            if reason == DONE:  # a header that is none of pages any more is its other reader's
                reader = wire.FrameReader()
                reader.feed(bytes(ffi.buffer(job.header)))
                with pytest.raises(ProtocolError):
                    reader.next_frame()
            assert job.sequence == 0
        finally:
            made.close()


def test_a_guest_that_writes_while_its_pages_are_sent_is_no_damage(
    pair: Pair, memory: GuestMemory, other: GuestMemory
) -> None:
    """Every CRC is that of the copy that went out, however often the page changed meanwhile."""
    region, sink, halt = memory.regions[0], PageSink(MemfdLanding(other)), threading.Event()
    for page in range(region.pages):
        memory.write(page * 4096, b"\1" * 4096)

    def write() -> None:
        ram = ffi.buffer(ffi.cast("uint8_t *", region.hva), region.size)
        patterns = [bytes([i]) * region.size for i in (2, 3)]
        while not halt.is_set():
            for pattern in patterns:
                ram[:] = pattern

    writer = in_thread(write)
    job = intake(pair, sink)
    receiver = in_thread(lambda: lib.tv_pages_receive(job))
    try:
        number = 0
        for _ in range(20):
            dirty = DirtySet.of(region)
            dirty.add_touched()
            out, keep = send_job(pair, dirty, sequence=number)
            assert lib.tv_pages_send(out) == DONE
            number = out.sequence
            del keep
        pair.a.setblocking(True)
        pair.a.sendall(wire.numbered(END, number))
    finally:
        halt.set()
        writer.join(60)
        receiver.join(60)
    assert not receiver.is_alive()
    assert (job.reason, job.problem) == (DONE, 0)
    assert job.sequence == number


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def only(before: int) -> bool:
    """Whether there are no more threads than ``before``. A joined one leaves the list a moment later."""
    until = time.monotonic() + 10
    while threads() > before and time.monotonic() < until:
        os.sched_yield()
    return threads() <= before


def run_frames(sink: PageSink, frames: list[bytes], **more: Any) -> Any:
    """Send them, numbered, to an intake, and close; gives the job."""
    made = Pair("unix")
    job = intake(made, sink, **more)

    def receive() -> None:
        lib.tv_pages_receive(job)
        made.b.close()  # or a sender that is not read from waits for ever

    thread = in_thread(receive)
    try:
        stream = b"".join(wire.numbered(frame, number) for number, frame in enumerate(frames))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            made.a.sendall(stream)
        made.a.close()
        thread.join(60)
        assert not thread.is_alive()
        return job
    finally:
        made.close()


def test_frames_land_in_the_order_in_which_they_came(memory: GuestMemory, other: GuestMemory) -> None:
    """Full and zero frames over the same few pages again and again, some received in place and some landed by the other
    thread, into huge pages and into small ones: at the end memory is what the oracle says."""
    chance, frames = random.Random(11), list[bytes]()
    for _ in range(400):
        slot, first = chance.randrange(2), chance.choice((0, 16, 300))
        if chance.randrange(3):
            numbers = range(first, first + FRAME_PAGES)
            if not chance.randrange(3):
                numbers = sorted(chance.sample(range(512), chance.randrange(1, FRAME_PAGES)))  # type: ignore[assignment]
            payload = b"".join(bytes([chance.randrange(256)]) * 4096 for _ in numbers)
            frames.append(pages_frame(slot, list(numbers), payload))
        else:
            frames.append(zero_frame(slot, [(first, chance.randrange(1, 100)), (first + 120, 3)]))
    sink, oracle, reader = PageSink(MemfdLanding(memory)), PageSink(MemfdLanding(other)), wire.FrameReader()
    job = run_frames(sink, frames)
    assert job.reason == EOF
    assert job.sequence == len(frames)
    for number, frame in enumerate(frames):
        reader.feed(wire.numbered(frame, number))
        got = reader.next_frame()
        assert got is not None
        oracle.take(got)
    assert contents(memory) == contents(other)
    assert (sink.counts.pages, sink.counts.zero_pages) == (oracle.counts.pages, oracle.counts.zero_pages)


def test_what_is_received_in_place_never_overtakes_what_waits_to_land() -> None:
    """Of each pair of frames the first waits, since it has fresh pages too; the second has a page of it alone."""
    count = 50
    memory = GuestMemory([(0, 32 * MIB)])
    try:
        sink = PageSink(MemfdLanding(memory))
        assert run_frames(sink, [pages_frame(0, list(range(count)))]).sequence == 1
        frames = []
        for page in range(count):
            start = 64 + 127 * page
            frames.append(pages_frame(0, [page, *range(start, start + 127)]))
            frames.append(pages_frame(0, [page], bytes([page]) * 4096))
        assert run_frames(sink, frames).sequence == len(frames)
        assert memory.read(0, count * 4096) == b"".join(bytes([page]) * 4096 for page in range(count))
    finally:
        memory.close()


def test_a_chunk_that_began_with_small_pages_keeps_them_when_it_becomes_huge() -> None:
    """In each chunk a frame too thin to ask for a huge page, with the chunk's first page in it, and then a full one."""
    size = 32 * MIB
    memory = GuestMemory([(0, size)])
    try:
        sink, frames = PageSink(MemfdLanding(memory)), list[bytes]()
        for start in range(0, size // 4096, 512):
            frames.append(pages_frame(0, list(range(start, start + 90))))
            frames.append(pages_frame(0, list(range(start + 128, start + 256))))
        assert run_frames(sink, frames).sequence == len(frames)
        for start in range(0, size, 2 * MIB):
            assert memory.read(start, 128 * 4096) == b"q" * 90 * 4096 + bytes(38 * 4096)
            assert memory.read(start + 128 * 4096, 384 * 4096) == b"q" * 128 * 4096 + bytes(256 * 4096)
    finally:
        memory.close()


@pytest.mark.parametrize("followers", [0, 1, 7, 40])
def test_the_frame_at_fault_is_named_however_many_came_after_it(memory: GuestMemory, followers: int) -> None:
    before = threads()
    frames = [pages_frame(0, [page]) for page in range(3)]
    frames.append(pages_frame(1, [7], b"q" * 4096)[:-1] + b"r")
    frames += [pages_frame(0, list(range(128 * (i % 7) + 8, 128 * (i % 7) + 136))) for i in range(followers)]
    sink = PageSink(MemfdLanding(memory))
    job = run_frames(sink, frames)
    assert (job.reason, job.problem, job.bad_slot, job.sequence) == (BAD, lib.TV_BAD_PAGES_CRC, 1, 3)
    assert sink.counts.pages == 3  # nothing that came after it counts
    assert only(before)


@pytest.mark.parametrize("followers", [0, 40])
def test_memory_that_can_not_be_written_is_an_error_with_its_number(memory: GuestMemory, followers: int) -> None:
    """As when the host's memory ran out: the landing thread fails while the other one waits for the socket."""
    before = threads()
    sink, made = PageSink(MemfdLanding(memory)), Pair("unix")
    deaf = os.open(f"/proc/self/fd/{memory.regions[0].memfd}", os.O_RDONLY | os.O_CLOEXEC)
    frames = [pages_frame(0, list(range(128 * (i % 8), 128 * (i % 8 + 1)))) for i in range(1 + followers)]

    def send() -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number, frame in enumerate(frames):
                made.a.sendall(wire.numbered(frame, number))

    thread = in_thread(send)
    try:
        sink.native.memfd[0] = deaf
        job = intake(made, sink, stall_ms=100)
        assert lib.tv_pages_receive(job) == lib.TV_PAGES_ERRNO
        assert os.strerror(job.error) == os.strerror(errno.EBADF)
        assert sink.counts.pages == 0
    finally:
        made.b.close()
        thread.join(60)
        os.close(deaf)
        made.close()
    assert only(before)


def test_no_thread_stays_however_a_call_ends(memory: GuestMemory) -> None:
    before = threads()
    frame = pages_frame(0, list(range(128)))
    for cut, wanted in ((len(frame), EOF), (len(frame) - 1, EOF), (len(frame), STALLED), (len(frame), KICKED)):
        for _ in range(20):
            made = Pair("unix")
            try:
                job = intake(made, PageSink(MemfdLanding(memory)), stall_ms=20 if wanted == STALLED else 20_000)
                thread = in_thread(lambda job=job: lib.tv_pages_receive(job))
                made.a.sendall(frame[:cut])
                if wanted == KICKED:
                    os.eventfd_write(made.kick_b, 1)
                elif wanted == EOF:
                    made.a.close()
                thread.join(60)
                assert job.reason == wanted
            finally:
                made.close()
    job = run_frames(PageSink(MemfdLanding(memory)), [frame] * 3, max_pages=256)
    assert job.reason == BUDGET
    assert only(before)


def host_gives_huge_pages() -> bool:
    """Whether MADV_COLLAPSE works on a memfd: what the C side asks for."""
    size, libc = 2 * MIB, ctypes.CDLL(None, use_errno=True)
    memory = GuestMemory([(0, size)])
    try:
        memory.write(0, b"x")
        return libc.madvise(ctypes.c_void_p(memory.regions[0].hva), ctypes.c_size_t(size), 25) == 0
    finally:
        memory.close()


def allocated(memory: GuestMemory) -> int:
    """Bytes of host memory."""
    return sum(os.fstat(region.memfd).st_blocks * 512 for region in memory.regions)


def chunks(sink: PageSink) -> list[int]:
    native = sink.native
    return [native.chunks[slot][i] for slot in range(len(sink.landing.landed)) for i in range(native.chunk_count[slot])]


def test_mappings_are_aligned_for_huge_pages() -> None:
    for size in (4096, MIB, 2 * MIB, 5 * MIB + 4096):
        memory = GuestMemory([(0, size)])
        assert memory.regions[0].hva % lib.TV_HUGE_SIZE == 0
        memory.write(size - 4, b"last")
        assert memory.read(size - 4, 4) == b"last"
        memory.close()


@pytest.mark.parametrize("refused", [False, True], ids=["offered", "refused"])
def test_a_guest_of_full_pages_gets_huge_ones_where_the_host_has_them(refused: bool) -> None:
    size = 16 * MIB
    source, target = GuestMemory([(0, size)]), GuestMemory([(0, size)])
    try:
        source.write(0, b"f" * size)
        sink = PageSink(MemfdLanding(target))
        sink.native.no_huge = refused
        dirty = DirtySet.of(source.regions[0])
        dirty.add_touched()
        frames = [frame for frame, _, _ in page_frames(dirty, 1 << 40)]
        for _ in range(2):
            job = run_frames(sink, frames)
            assert (job.reason, job.sequence) == (EOF, len(frames))
            assert contents(target) == contents(source)
        known = chunks(sink)
        assert set(known) <= {lib.TV_CHUNK_HUGE, lib.TV_CHUNK_SMALL}
        assert (lib.TV_CHUNK_HUGE in known) == (host_gives_huge_pages() and not refused)
        assert allocated(target) == size
    finally:
        source.close()
        target.close()


def test_a_guest_of_few_pages_takes_no_more_memory_than_them(memory: GuestMemory) -> None:
    frames = [pages_frame(0, list(range(first, 1024, 8))) for first in (0, 3)]
    frames += [pages_frame(1, list(range(10, 100)))]  # many in a row, and still not most of a frame
    sink = PageSink(MemfdLanding(memory))
    assert run_frames(sink, frames).sequence == 3
    assert set(chunks(sink)) == {lib.TV_CHUNK_UNKNOWN}
    assert allocated(memory) == (256 + 90) * 4096


def test_what_a_huge_page_holds_beyond_the_guests_own_travels_as_zero(other: GuestMemory) -> None:
    """A machine that moved once, and moves again."""
    size = 4 * MIB
    memory = GuestMemory([(0, size)])
    try:
        sink = PageSink(MemfdLanding(memory))
        assert run_frames(sink, [pages_frame(0, list(range(128)))]).sequence == 1
        dirty = DirtySet.of(memory.regions[0])
        dirty.add_touched()
        frames = list(page_frames(dirty, 1 << 40))
        assert sum(len(pages) - zero for _, pages, zero in frames) == 128
        sink, made = PageSink(MemfdLanding(other)), Pair("unix")
        try:
            made.a.setblocking(False)
            job = intake(made, sink)
            thread = in_thread(lambda: lib.tv_pages_receive(job))
            out, keep = send_job(made, dirty)
            assert lib.tv_pages_send(out) == DONE
            made.a.close()
            thread.join(60)
            assert (out.sent_pages, out.zero_pages) == (128, sum(zero for _, _, zero in frames))
            assert out.bytes < 129 * 4096  # all of it in one run
            del keep
        finally:
            made.close()
        assert other.read(0, size) == memory.read(0, size)
    finally:
        memory.close()


def give_back(memory: GuestMemory, first: int, pages: int, slot: int = 0) -> None:
    """As a balloon does it: the memory goes, then the pages are dirty."""
    assert lib.tv_memory_give_back(memory.regions[slot].native, first * 4096, pages * 4096) == 0
    for page in range(first, first + pages):
        memory.regions[slot].dirty[page // 64] |= 1 << page % 64


def send_over(dirty: DirtySet, sink: PageSink, **more: Any) -> Any:
    """All of the set, to its end: the job, sent."""
    made = Pair("unix")
    try:
        made.a.setblocking(False)
        job = intake(made, sink)
        thread = in_thread(lambda: lib.tv_pages_receive(job))
        out, keep = send_job(made, dirty, **more)
        assert lib.tv_pages_send(out) == DONE
        made.a.close()
        thread.join(60)
        assert job.reason == EOF
        del keep
        return out
    finally:
        made.close()


def test_pages_that_were_given_back_travel_as_zero_and_cost_no_memory_on_either_side() -> None:
    """Given back after they were sent: what the destination has of them is old."""
    size = 4 * MIB
    memory, other = GuestMemory([(0, size)]), GuestMemory([(0, size)])
    try:
        memory.write(0, b"a" * size)
        sink = PageSink(MemfdLanding(other))
        sink.native.no_huge = True
        dirty = DirtySet.of(memory.regions[0])
        dirty.add_touched()
        region = memory.regions[0]
        assert not region.given_back
        lib.tv_dirty_take(region.dirty, dirty.bits, region.bitmap_words)
        send_over(dirty, sink)
        give_back(memory, 100, 500)
        give_back(memory, 700, 3)
        memory.write(300 * 4096, b"b")  # touched again
        assert region.given_back
        lib.tv_dirty_take(region.dirty, dirty.bits, region.bitmap_words)
        assert dirty.count == 503
        before = allocated(memory)
        out = send_over(dirty, sink, memfd=region.memfd)
        assert (out.sent_pages, out.zero_pages) == (1, 502)
        assert allocated(memory) == before == size - 502 * 4096
        assert allocated(other) == size - (500 - 1) * 4096  # of three in a row it keeps the memory
        assert contents(other) == contents(memory)
        assert other.regions[0].given_back  # for its own next move
    finally:
        memory.close()
        other.close()


def test_a_hole_in_a_huge_page_of_the_destination_is_cleared_in_place() -> None:
    size = 2 * MIB
    if not host_gives_huge_pages():
        pytest.skip("this host gives no huge page (madvise(MADV_COLLAPSE) on a memfd failed)")
    memory, other = GuestMemory([(0, size)]), GuestMemory([(0, size)])
    try:
        memory.write(0, b"a" * size)
        sink = PageSink(MemfdLanding(other))
        dirty = DirtySet.of(memory.regions[0])
        lib.tv_dirty_take(memory.regions[0].dirty, dirty.bits, memory.regions[0].bitmap_words)
        send_over(dirty, sink)
        assert chunks(sink) == [lib.TV_CHUNK_HUGE]
        give_back(memory, 3, 400)
        lib.tv_dirty_take(memory.regions[0].dirty, dirty.bits, memory.regions[0].bitmap_words)
        send_over(dirty, sink, memfd=memory.regions[0].memfd)
        assert contents(other) == contents(memory)
        memory.write(0, b"c" * size)  # what lands there next finds its memory
        dirty.add_touched()
        send_over(dirty, sink, memfd=memory.regions[0].memfd)
        assert contents(other) == contents(memory)
    finally:
        memory.close()
        other.close()


def test_fuzzed_streams_never_crash_the_receiver(memory: GuestMemory) -> None:
    chance = random.Random(9)
    good = pages_frame(0, [1, 2, 9]) + wire.numbered(zero_frame(0, [(1, 2)]), 1)
    for _ in range(300):
        made = Pair("unix")
        try:
            raw = bytearray(good)
            for _ in range(chance.randrange(1, 4)):
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            made.a.sendall(bytes(raw)[: chance.randrange(1, len(raw) + 1)])
            made.a.close()
            assert lib.tv_pages_receive(intake(made, PageSink(MemfdLanding(memory)))) in (DONE, EOF, BAD)
        finally:
            made.close()


def test_frames_lost_repeated_or_moved_are_not_taken() -> None:
    """Whatever order they come in: what landed is what the frames up to the first wrong number say."""
    chance = random.Random(10)
    for _ in range(200):
        made, memory = Pair("unix"), GuestMemory([(0, MIB)])
        try:
            frames = [wire.numbered(pages_frame(0, [i, i + 100]), i) for i in range(5)]
            order = list(range(5))
            match chance.randrange(4):
                case 0:
                    del order[chance.randrange(4)]
                case 1:
                    order.insert(chance.randrange(5), chance.randrange(5))
                case 2:
                    a, b = chance.sample(range(5), 2)
                    order[a], order[b] = order[b], order[a]
            good = next((place for place, i in enumerate(order) if place != i), len(order))
            made.a.sendall(b"".join(frames[i] for i in order))
            made.a.close()
            sink = PageSink(MemfdLanding(memory))
            job = intake(made, sink)
            assert lib.tv_pages_receive(job) == (EOF if good == len(order) else DONE)
            assert job.sequence == good
            assert sink.counts.pages == 2 * good
            expected = sorted([*range(good), *range(100, 100 + good)])
            assert [page for page in range(256) if sink.landing.landed[0][page // 64] >> page % 64 & 1] == expected
            if good < len(order):  # handed over, for the other reader to name
                head = wire.parse_header(bytes(ffi.buffer(job.header)))
                assert (head.type, head.sequence) == (MessageType.PAGES, order[good])
                reader = wire.FrameReader()
                reader.due = job.sequence
                reader.feed(bytes(ffi.buffer(job.header)))
                with pytest.raises(ProtocolError, match=f"frame {order[good]} .PAGES. came where {good} was due"):
                    reader.next_frame()
        finally:
            made.close()
            memory.close()


@pytest.mark.parametrize("place", [1, HEADER - 1, HEADER, HEADER + 9, HEADER + 24, HEADER + 24 + 5000])
def test_a_frame_that_trickles_stalls_at_any_place(memory: GuestMemory, place: int) -> None:
    """Bytes that keep coming don't help: the whole frame has one limit."""
    frame = pages_frame(0, [1, 2])
    made, halt = Pair("unix"), threading.Event()

    def trickle() -> None:
        made.a.sendall(frame[:place])
        for each in frame[place:-1]:  # 8,000 bytes at 5 ms each are 40 s
            if halt.wait(0.005):
                return
            made.a.sendall(bytes([each]))

    thread = in_thread(trickle)
    try:
        job = intake(made, PageSink(MemfdLanding(memory)), stall_ms=100)
        assert lib.tv_pages_receive(job) == STALLED
        assert job.until_ms
        assert job.sequence == 0
    finally:
        halt.set()
        thread.join(60)
        made.close()
    assert not thread.is_alive()
