"""The two halves over a connected stream socket: pages go through C (``ffi/pages.h``), with the GIL released.

A half that moves pages has a thread for it, a kick that ends the thread's call, and a buffer; one that never does costs
none of them. The C side is given the number of the frame at hand and gives it back.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, ProtocolError
from trivmm.migration.link.halves import (
    GRACE_MS,
    SILENT,
    TAKES_NOTHING,
    TRICKLES,
    Connection,
    ReceivingHalf,
    SendingHalf,
    lost,
)
from trivmm.migration.pages.frames import PAGE_FRAMES, bad_page
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.wire.frame import FRAME_PAGES, HEADER_BYTES, PAGE_BYTES, VERSION, Frame, bad_pages_crc

__all__ = ["PageThread", "socket_connection"]

INTAKE_PAGES: Final = 32768  # pages between two progress reports of a receiver: some tenth of a second
RECEIVE_CHUNK: Final = 65536


def socket_connection(sock: trio.socket.SocketType, name: str, deadlines: Deadlines) -> Connection:
    """Owns ``sock``."""
    sender, receiver = SocketSender(name, deadlines, sock), SocketReceiver(name, deadlines, sock)

    async def aclose() -> None:
        sock.close()
        sender.close()
        receiver.close()
        await trio.lowlevel.checkpoint()

    return Connection(name, sender, receiver, aclose)


@attrs.define(eq=False)
class PageThread:
    """Page jobs of one half, one at a time, each in a thread. Costs nothing before the first one.

    ``buffer``: what its jobs need besides, made by ``make_buffer``. It goes when the half is closed, once no job runs:
    a connection may be kept as long as the machine that came through it."""

    name: str
    deadlines: Deadlines
    sock: trio.socket.SocketType
    make_buffer: Callable[[], Any]
    buffer: Any = attrs.field(default=None, init=False)
    _kick: int = attrs.field(default=-1, init=False)
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False)

    def job(self, kind: str) -> Any:
        """A ``kind`` (``struct tv_page_…``) with what every job has."""
        if self.buffer is None:
            made = self.make_buffer()
            if made == ffi.NULL:
                raise lost(self.name, os.strerror(ffi.errno))
            self.buffer, self._kick = made, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        job = ffi.new(f"struct {kind} *")
        job.fd, job.kick_fd, job.version = self.sock.fileno(), self._kick, VERSION
        job.stall_ms = max(1, min(int(self.deadlines.stall * 1000), 0xFFFF_FFFF))
        return job

    async def run(self, call: Callable[[Any], int], job: Any) -> None:
        """A cancellation kicks it and waits for its end, which is GRACE_MS away."""
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

    def check(self, job: Any, silence: str) -> None:
        """:raises LinkLost: / :raises DeadlineError: why the job ended, unless it is done, or done for now."""
        if job.reason == lib.TV_PAGES_STALLED:
            raise DeadlineError("stall", self.deadlines.stall, f"{self.name}: {silence}")
        if job.reason == lib.TV_PAGES_EOF:
            raise lost(self.name, os.strerror(job.error) if job.error else "closed by the peer")
        if job.reason not in (lib.TV_PAGES_DONE, lib.TV_PAGES_BUDGET):
            raise lost(self.name, os.strerror(job.error or errno.ECANCELED))

    def close(self) -> None:
        """Idempotent."""
        if self.buffer is not None:
            os.close(self._kick)
            self.buffer = None


def _staging() -> Any:
    """FRAME_PAGES pages, a mapping of their own: the host has them back afterwards. From the heap half a MiB a
    connection would stay with the process, in pieces."""
    return ffi.from_buffer("uint8_t[]", mmap.mmap(-1, FRAME_PAGES * PAGE_BYTES))


def _inbox() -> Any:
    return ffi.gc(lib.tv_inbox_new(), lib.tv_inbox_free)


def _thread_of(half: SocketSender | SocketReceiver) -> PageThread:
    make_buffer = _staging if isinstance(half, SocketSender) else _inbox
    return PageThread(half.name, half.deadlines, half._sock, make_buffer)


@attrs.define(eq=False)
class SocketSender(SendingHalf):
    _sock: trio.socket.SocketType
    _thread: PageThread = attrs.field(default=attrs.Factory(_thread_of, takes_self=True), init=False)

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[await self._sock.send(rest) :]
            except (OSError, trio.ClosedResourceError) as error:
                raise lost(self.name, error) from error

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        self.check_whole()
        region = dirty.region
        job = self._thread.job("tv_page_send")
        job.grace_ms, job.slot, job.pages = GRACE_MS, region.slot, region.pages
        job.hva, job.dirty = ffi.cast("uint8_t *", region.hva), dirty.bits
        job.memfd = region.memfd if region.given_back else -1
        job.staging, job.max_pages, job.sequence = self._thread.buffer, limit, self.sequence
        try:
            await self._thread.run(lib.tv_pages_send, job)
        finally:
            self.sequence = job.sequence
            self.broken = bool(job.broken)
            counts.add(PageCounts(job.bytes, job.sent_pages, job.zero_pages))
        self._thread.check(job, TAKES_NOTHING)
        return bool(job.reason == lib.TV_PAGES_DONE)

    def close(self) -> None:
        self._thread.close()


@attrs.define(eq=False)
class SocketReceiver(ReceivingHalf):
    _sock: trio.socket.SocketType
    _broken: bool = attrs.field(default=False, init=False)  # pages were cut short
    _thread: PageThread = attrs.field(default=attrs.Factory(_thread_of, takes_self=True), init=False)

    async def receive(self, sink: PageSink | None = None) -> Frame:
        if sink is not None and not self.reader.pending:
            await self._receive_pages(sink)
        frame = await self.whole_frame()
        if sink is not None and frame.type in PAGE_FRAMES:
            raise ProtocolError(f"{frame.type.name} in pieces")  # pragma: no cover - the C side takes all of these
        return frame

    async def read(self) -> bytes:
        # Never more than the frame at hand: what follows may be pages, which the C side reads from the socket.
        try:
            return await self._sock.recv(min(self.reader.wanted, RECEIVE_CHUNK))
        except (OSError, trio.ClosedResourceError) as error:
            raise lost(self.name, error) from error

    async def _receive_pages(self, sink: PageSink) -> None:
        """Take page frames until another one comes, whose header then is in the reader."""
        if self._broken:
            raise lost(self.name, "pages were cut short")
        while True:
            job = self._thread.job("tv_page_intake")
            job.landing, job.inbox = sink.native, self._thread.buffer
            job.max_pages, job.sequence = INTAKE_PAGES, self.reader.due
            self._broken = True
            try:
                await self._thread.run(lib.tv_pages_receive, job)
            finally:
                self.reader.due = job.sequence
            if job.reason == lib.TV_PAGES_BAD:
                raise _nonsense(job)
            self._thread.check(job, TRICKLES if job.until_ms else SILENT)
            self._broken = False
            sink.report()
            if job.reason == lib.TV_PAGES_DONE:
                self.reader.feed(bytes(ffi.buffer(job.header, HEADER_BYTES)))
                return

    def close(self) -> None:
        self._thread.close()


def _nonsense(job: Any) -> ProtocolError:
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
