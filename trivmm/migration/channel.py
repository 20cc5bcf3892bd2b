"""One connection of a migration, as sender and receiver see it: frames and guest pages, in order.

:class:`SocketChannel` moves pages in C, on a thread, with the GIL released (``ffi/pages.h``); :class:`StreamChannel`
moves them in Python over any trio stream, which is what virtual time and tests use. Both bound every wait for the
peer by the ``stall`` deadline: that long until a frame begins, and that long again until it is whole. A peer that lets
a byte trickle now and then gains nothing, and a link that takes longer for half a megabyte is no good for migrations.

A channel belongs to one task at a time. A *control* frame may be waited for again after a cancelled wait (nothing is
lost). A frame that was cut short on its way out breaks that direction for good; so do pages that were cut short on
their way in, or damaged, in theirs, and who gives up for that can still say so. Each channel numbers what it sends from
0, a frame when it is whole on its way, and checks the numbers of what comes; the C side is given the number at hand and
gives it back.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, MigrationError, ProtocolError
from trivmm.migration.pages import DirtySet, Landing, PageCounts, bad_page, page_frames
from trivmm.migration.wire import (
    FRAME_PAGES,
    HEADER_BYTES,
    PAGE_BYTES,
    VERSION,
    Frame,
    FrameReader,
    MessageType,
    bad_pages_crc,
    numbered,
)

__all__ = ["Channel", "LinkLost", "SocketChannel", "StreamChannel"]

INTAKE_PAGES: Final = 32768  # pages between two progress reports of a receiver: some tenth of a second
GRACE_MS: Final = 200  # how long a cancelled sender may take to end its frame, so that the stream stays usable
RECEIVE_CHUNK: Final = 65536
SILENT: Final = "the peer is silent"
TRICKLES: Final = "the peer's frame does not end"


class LinkLost(MigrationError):
    """The connection ended or broke: the peer closed it, died, or the network did. Which of them, nobody can tell."""


class Channel(Protocol):
    """``name`` says which connection, for messages."""

    name: str

    async def send(self, data: bytes) -> None:
        """Send a whole frame, which gets its number here. :raises LinkLost: / :raises DeadlineError: (stall)."""

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        """Send about ``limit`` dirty pages, discard them from ``dirty`` and count them. True when none is left.

        A cancelled call stops between two frames and leaves the rest in ``dirty``."""

    async def receive(self, landing: Landing | None, report: Callable[[], None] | None = None) -> Frame:
        """The next frame. With ``landing``, page frames are applied to it instead, and ``report`` is called
        now and then. :raises ProtocolError: / :raises LinkLost: / :raises DeadlineError: (stall)."""

    async def aclose(self) -> None:
        """Idempotent, quick, also when cancelled."""


def _lost(name: str, why: object) -> LinkLost:
    return LinkLost(f"{name}: the connection is lost ({why})")


def _closed(name: str, reader: FrameReader) -> LinkLost:
    return _lost(name, "closed by the peer" + (" in the middle of a frame" if reader.pending else ""))


async def _whole_frame(
    reader: FrameReader, more: Callable[[], Awaitable[bytes]], name: str, deadlines: Deadlines
) -> Frame:
    """The next frame: ``stall`` until it begins, and ``stall`` until it is whole. What came stays in the reader."""
    if not reader.pending:
        with deadlines.enter("stall", f"{name}: {SILENT}"):
            reader.feed(await more())
    with deadlines.enter("stall", f"{name}: {TRICKLES}"):
        while (frame := reader.next_frame()) is None:
            reader.feed(await more())
    return frame


async def _with_grace(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work``; when cancelled in the middle, let it go on for GRACE_MS before it is."""
    await trio.lowlevel.checkpoint_if_cancelled()
    failure: Exception | None = None
    scope = trio.CancelScope(shield=True)

    async def hurry_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            scope.deadline = trio.current_time() + GRACE_MS / 1000

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry_when_cancelled)
        with scope:
            try:
                await work()
            except Exception as error:
                failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@attrs.define(eq=False)
class StreamChannel:
    """Over any trio stream; pages go through Python."""

    stream: trio.abc.Stream
    name: str
    deadlines: Deadlines
    _reader: FrameReader = attrs.field(factory=FrameReader)
    _broken: bool = False
    _sequence: int = 0  # of the next frame to be sent

    async def send(self, data: bytes) -> None:
        if self._broken:
            raise _lost(self.name, "a frame was cut short")
        frame = numbered(data, self._sequence)
        await _with_grace(lambda: self._send_frame(frame))

    async def _send_frame(self, data: bytes) -> None:
        self._broken = True
        try:
            with self.deadlines.enter("stall", f"{self.name}: the peer takes no data"):
                await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(self.name, error.__cause__ or "closed by the peer") from error
        self._broken = False
        self._sequence += 1

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        for frame, pages, zero in page_frames(dirty, limit):
            before = self._sequence
            try:
                await self.send(frame)
            finally:
                if self._sequence > before:  # whole on its way, also when the call was cancelled meanwhile
                    for page in pages:
                        dirty.discard(page)
                    counts.bytes += len(frame)
                    counts.pages += len(pages) - zero
                    counts.zero_pages += zero
        return dirty.count == 0

    async def receive(self, landing: Landing | None, report: Callable[[], None] | None = None) -> Frame:
        while True:
            frame = await _whole_frame(self._reader, self._receive_some, self.name, self.deadlines)
            if landing is None or frame.type not in (MessageType.PAGES, MessageType.ZERO):
                return frame
            landing.take(frame)
            if report:
                report()

    async def _receive_some(self) -> bytes:
        try:
            data = bytes(await self.stream.receive_some(RECEIVE_CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _lost(self.name, error.__cause__ or "closed by the peer") from error
        if not data:
            raise _closed(self.name, self._reader)
        return data

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self.stream)


def _staging() -> Any:
    """FRAME_PAGES pages, a mapping of their own: the host has them back with the channel. From the heap half a MiB a
    channel would stay with the process, in pieces."""
    return ffi.from_buffer("uint8_t[]", mmap.mmap(-1, FRAME_PAGES * PAGE_BYTES))


class SocketChannel:
    """Over a connected stream socket; pages go through C on one thread of this channel's own."""

    def __init__(self, sock: trio.socket.SocketType, name: str, deadlines: Deadlines) -> None:
        self.name = name
        self.deadlines = deadlines
        self._sock = sock
        self._reader = FrameReader()
        self._sequence = 0  # of the next frame to be sent
        self._broken = False  # a frame that was sent was cut short
        self._deaf = False  # pages that came were cut short, or nonsense
        self._closed = False
        self._limiter = trio.CapacityLimiter(1)
        self._staging: Any = _staging()
        self._inbox: Any = None  # only with pages to receive
        self._kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    async def send(self, data: bytes) -> None:
        if self._broken:
            raise _lost(self.name, "a frame was cut short")
        frame = numbered(data, self._sequence)
        await _with_grace(lambda: self._send_frame(frame))

    async def _send_frame(self, data: bytes) -> None:
        self._broken = True
        rest = memoryview(data)
        with self.deadlines.enter("stall", f"{self.name}: the peer takes no data"):
            while rest:
                try:
                    rest = rest[await self._sock.send(rest) :]
                except (OSError, trio.ClosedResourceError) as error:
                    raise _lost(self.name, error) from error
        self._broken = False
        self._sequence += 1

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        if self._broken:
            raise _lost(self.name, "a frame was cut short")
        region = dirty.region
        job, staging = ffi.new("struct tv_page_send *"), self._staging  # held until the thread is done with it
        job.fd, job.kick_fd = self._sock.fileno(), self._kick
        job.stall_ms, job.grace_ms = self._stall_ms, GRACE_MS
        job.version, job.slot, job.pages = VERSION, region.slot, region.pages
        job.hva, job.dirty, job.staging = ffi.cast("uint8_t *", region.hva), dirty.bits, staging
        job.max_pages, job.sequence = limit, self._sequence
        try:
            await self._in_thread(lib.tv_pages_send, job)
        finally:
            self._sequence = job.sequence
            self._broken = bool(job.broken)
            counts.bytes += job.bytes
            counts.pages += job.sent_pages
            counts.zero_pages += job.zero_pages
        self._check(job, "the peer takes no data")
        return bool(job.reason == lib.TV_PAGES_DONE)

    async def receive(self, landing: Landing | None, report: Callable[[], None] | None = None) -> Frame:
        if landing is not None and not self._reader.pending:
            await self._receive_pages(landing, report)
        frame = await _whole_frame(self._reader, self._receive_some, self.name, self.deadlines)
        if landing is not None and frame.type in (MessageType.PAGES, MessageType.ZERO):
            raise ProtocolError(f"{frame.type.name} in pieces")  # pragma: no cover - the C side takes all of these
        return frame

    async def _receive_some(self) -> bytes:
        # Never more than the frame at hand: what follows may be pages, which the C side reads from the socket.
        try:
            data = await self._sock.recv(min(self._reader.wanted, RECEIVE_CHUNK))
        except (OSError, trio.ClosedResourceError) as error:
            raise _lost(self.name, error) from error
        if not data:
            raise _closed(self.name, self._reader)
        return data

    async def _receive_pages(self, landing: Landing, report: Callable[[], None] | None) -> None:
        """Take page frames until another one comes, whose header then is in the reader."""
        if self._deaf:
            raise _lost(self.name, "pages were cut short")
        if self._inbox is None:
            self._inbox = ffi.gc(lib.tv_inbox_new(), lib.tv_inbox_free)
        inbox = self._inbox  # held until the thread is done with it
        if inbox == ffi.NULL:
            raise _lost(self.name, os.strerror(ffi.errno))
        while True:
            job = ffi.new("struct tv_page_intake *")
            job.fd, job.kick_fd, job.stall_ms, job.version = self._sock.fileno(), self._kick, self._stall_ms, VERSION
            job.landing, job.inbox = landing.native, inbox
            job.max_pages, job.sequence = INTAKE_PAGES, self._reader.due
            self._deaf = True
            try:
                await self._in_thread(lib.tv_pages_receive, job)
            finally:
                self._reader.due = job.sequence
            if job.reason == lib.TV_PAGES_BAD:
                raise self._nonsense(job)
            self._check(job, TRICKLES if job.until_ms else SILENT)
            self._deaf = False
            if report:
                report()
            if job.reason == lib.TV_PAGES_DONE:
                self._reader.feed(bytes(ffi.buffer(job.header, HEADER_BYTES)))
                return

    @property
    def _stall_ms(self) -> int:
        return max(1, min(int(self.deadlines.stall * 1000), 0xFFFF_FFFF))

    async def _in_thread(self, call: Callable[[Any], int], job: Any) -> None:
        """Run a page job on a thread; a cancellation kicks it and waits for its end, which is GRACE_MS away."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kick_on_cancel)
                try:
                    await trio.to_thread.run_sync(call, job, limiter=self._limiter)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            os.eventfd_read(self._kick)  # the kicker writes once at its end, whatever ended it

    async def _kick_on_cancel(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            os.eventfd_write(self._kick, 1)

    def _check(self, job: Any, silence: str) -> None:
        if job.reason == lib.TV_PAGES_STALLED:
            raise DeadlineError("stall", self.deadlines.stall, f"{self.name}: {silence}")
        if job.reason == lib.TV_PAGES_EOF:
            raise _lost(self.name, os.strerror(job.error) if job.error else "closed by the peer")
        if job.reason not in (lib.TV_PAGES_DONE, lib.TV_PAGES_BUDGET):
            raise _lost(self.name, os.strerror(job.error or errno.ECANCELED))

    def _nonsense(self, job: Any) -> ProtocolError:
        match job.problem:
            case lib.TV_BAD_BODY_CRC:
                return ProtocolError(f"bad CRC of the page list in frame {job.sequence}: the stream is damaged")
            case lib.TV_BAD_PAGES_CRC:
                return bad_pages_crc(job.sequence, job.bad_slot)
            case lib.TV_BAD_SLOT:
                return ProtocolError(f"there is no memory slot {job.bad_slot}")
            case lib.TV_BAD_PAGE:
                return bad_page(job.bad_slot, job.bad_page)
            case _:
                return ProtocolError("bad length of a page frame")

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._sock.close()
            os.close(self._kick)
            self._staging = self._inbox = None  # a channel may be kept as long as the machine that came through it
        await trio.lowlevel.checkpoint()
