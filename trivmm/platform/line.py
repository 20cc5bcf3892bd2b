"""A console line: two byte rings of a device in C, the tasks that tie them to a sink, and a tail for those who watch.

The serial port and the virtio console are lines. Owned by the board; :meth:`Line.run` is a task of the device nursery.

Nothing is lost on the way to the sink, and nothing goes there twice: a byte leaves the ring in the step in which the
sink has taken it, and a slow sink fills the ring until the guest waits. A sink that fails (disk full, reader gone) is
logged and replaced by none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Final

import trio

from trivmm._native import ffi, lib
from trivmm.platform.sinks import ClientSink, NullSink, Sink

__all__ = ["Line", "Subscription", "dump_rings", "load_rings"]

logger = logging.getLogger(__name__)

TAIL_BYTES: Final = 1 << 20
CHUNK: Final = 16384  # bytes a sink gets at once: small enough that a drain's deadline is looked at in between


class Line:
    """``native`` is the device's C object and ``rings`` its part that is of ``ffi/line.h``: it signals its ready
    descriptor when there is output, or room again for input that found none."""

    def __init__(
        self,
        name: str,
        sink: Sink | None,
        make: Callable[[int], Any],
        free: Callable[[Any], None],
        rings_of: Callable[[Any], Any],
    ) -> None:
        """``make`` gets the ready descriptor. The C object is freed with the last reference to it, which a thread that
        is stuck keeps. :raises MemoryError:"""
        self.name = name
        self.keeps_sink = False
        """Set where the sink goes on to another machine: neither flushed nor closed with this one."""
        self._ready_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        native = make(self._ready_fd)
        if native == ffi.NULL:
            os.close(self._ready_fd)
            raise MemoryError(name)
        self.native = ffi.gc(native, free)
        self.rings = rings_of(self.native)
        self._sink = sink
        self._buffer = ffi.new("uint8_t[]", CHUNK)
        self._piece = b""  # as last peeked
        self._lent = 0  # bytes of it that a thread is writing
        self._held = False  # saved: input that came now would be lost
        self._tail = bytearray()
        self._total = 0
        self._typed = 0
        self._news = trio.Event()  # set, and replaced, with every piece of output
        self._moved = trio.Event()  # the same with every signal of the ready descriptor, or change of sink
        self._serving: trio.CancelScope | None = None

    # --- input ---------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Bytes that :meth:`push_input` would take now."""
        return 0 if self._held else int(lib.tv_line_rx_room(self.rings))

    async def until_room(self) -> None:
        """Wait until the guest has made room for input. The caller bounds it."""
        await trio.lowlevel.checkpoint()
        while True:
            moved = self._moved
            if self.room:
                return
            await moved.wait()

    def push_input(self, data: bytes) -> int:
        """Give the guest input; gives how many bytes found room."""
        if self._held:
            return 0
        taken = int(lib.tv_line_push_rx(self.rings, ffi.from_buffer("uint8_t[]", data), len(data)))
        self._typed += taken
        return taken

    async def feed(self, data: bytes) -> None:
        """All of ``data``, as the guest makes room. Waits for the guest, so the caller bounds it."""
        await trio.lowlevel.checkpoint()
        while data := data[self.push_input(data) :]:
            await self.until_room()

    # --- output --------------------------------------------------------------------------------------------

    @property
    def sink(self) -> Sink | None:
        return self._sink

    def attach_sink(self, sink: Sink) -> None:
        """Replace the sink (None at first on the receiving side of a migration: output waits in the ring)."""
        old, self._sink = self._sink, sink
        if self._serving is not None:
            self._serving.cancel()
        if old is not None:
            old.close()
        self._signal()

    def _signal(self) -> None:
        os.eventfd_write(self._ready_fd, 1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The line's tasks; end by cancellation. They wake by the ready descriptor, never by time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, name=f"{self.name} ring")
            nursery.start_soon(self._drain, name=f"{self.name} output")
            nursery.start_soon(self._serve, name=f"{self.name} clients")
            task_status.started()

    async def _watch(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._ready_fd)  # bounded by the device nursery's scope
            try:
                os.eventfd_read(self._ready_fd)
            except BlockingIOError:
                continue
            self._moved, moved = trio.Event(), self._moved
            moved.set()

    async def _drain(self) -> None:
        while True:
            moved = self._moved
            while (sink := self._sink) is not None and self.peek():
                await self._take_piece(sink)
            await moved.wait()

    async def _serve(self) -> None:
        """Sinks with clients have tasks of their own, one sink at a time."""
        while True:
            moved, sink = self._moved, self._sink
            if isinstance(sink, ClientSink):
                with trio.CancelScope() as self._serving:
                    await sink.serve(self)
                self._serving = None
                if sink is self._sink:  # it gave up, and said why
                    self.attach_sink(NullSink())
            else:
                await moved.wait()

    async def _take_piece(self, sink: Sink) -> None:
        try:
            await sink.take(self)
        except (OSError, trio.ClosedResourceError) as error:
            if self._sink is not sink:  # another was attached meanwhile, and this one closed
                return
            if not isinstance(error, OSError):
                raise
            logger.warning("%s: cannot write the output any more (%s); the guest goes on without it", self.name, error)
            self.attach_sink(NullSink())

    def peek(self) -> bytes:
        """See :class:`~trivmm.platform.sinks.GuestOutput`."""
        length = int(lib.tv_line_peek_tx(self.rings, self._buffer, CHUNK))
        self._piece = bytes(ffi.buffer(self._buffer, length))
        return self._piece

    def lend(self, count: int) -> None:
        self._lent = count

    def consume(self, count: int) -> None:
        lib.tv_line_consume_tx(self.rings, count)
        self._lent = 0
        self._observe(self._piece[:count])

    def _observe(self, data: bytes) -> None:
        self._tail += data
        self._total += len(data)
        del self._tail[:-TAIL_BYTES]
        self._news, news = trio.Event(), self._news
        news.set()

    async def drain(self, at_most_s: float) -> bool:
        """Wait until the sink has all output, at most ``at_most_s`` seconds; whether it has. ``run`` does the work:
        what is left stays in the ring and is part of the saved state."""
        with trio.move_on_after(at_most_s):
            await trio.lowlevel.checkpoint()
            while lib.tv_line_tx_used(self.rings) and not self._held:
                await self._news.wait()
        return not lib.tv_line_tx_used(self.rings)

    async def flush(self) -> None:
        """At the end of a machine: a client that reads gets what its sink keeps for it. The caller bounds it."""
        await trio.lowlevel.checkpoint()
        if isinstance(self._sink, ClientSink) and not self.keeps_sink:
            await self._sink.flush()

    # --- observers -----------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Bytes of output that the sink has taken since the start: a position in the output."""
        return self._total

    def tail(self, since: int = 0) -> bytes:
        """Output from position ``since`` on, or the last MiB of it."""
        have = self._total - len(self._tail)
        return bytes(self._tail[max(0, since - have) :])

    def subscribe(self, since: int | None = None) -> Subscription:
        """Watch the output from a position on; from here when None."""
        return Subscription(self, self._total if since is None else since)

    # --- a migration ---------------------------------------------------------------------------------------

    def hold(self) -> int:
        """The state is being saved: no more input until :meth:`thaw`. Gives the length of the output that a thread is
        writing this moment, which does not travel."""
        self._held = True
        return self._lent

    def thaw(self) -> None:
        """A saved state was not used, or one was loaded: go on. Idempotent; for an undone switchover and for resume."""
        self._held = False
        lib.tv_line_thaw(self.rings)

    def release(self) -> None:
        """See :meth:`ClientSink.release`."""
        if isinstance(self._sink, ClientSink):
            self._sink.release()

    def retake(self) -> None:
        """:raises ConfigError: see :meth:`ClientSink.retake`."""
        if isinstance(self._sink, ClientSink):
            self._sink.retake()

    def counters(self) -> dict[str, int]:
        counted = {"tx_bytes": self._total, "rx_bytes": self._typed}
        return counted | self._sink.counters() if isinstance(self._sink, ClientSink) else counted

    @property
    def closed(self) -> bool:
        return self._ready_fd < 0

    def close(self) -> None:
        """After ``run`` has ended. Idempotent. Nothing is signalled any more."""
        if self.closed:
            return
        fd, self._ready_fd = self._ready_fd, -1
        if self._sink is not None and not self.keeps_sink:
            self._sink.close()
        lib.tv_line_close(self.rings)
        os.close(fd)


class Subscription:
    """One watcher's position in the output; what it did not fetch in time (a MiB) it does not see."""

    def __init__(self, line: Line, position: int) -> None:
        self._line = line
        self.position = position

    async def receive(self) -> bytes:
        """The output since the last call, waiting for some. The caller bounds the wait."""
        await trio.lowlevel.checkpoint()
        while self.position >= self._line.total:
            await self._line._news.wait()
        data = self._line.tail(self.position)
        self.position = self._line.total
        return data


def dump_rings(native: Any) -> tuple[bytes, bytes]:
    """(output, input) in a ``struct tv_line_state``."""
    tx, rx = (bytes(ffi.buffer(getattr(native, name), getattr(native, f"{name}_len"))) for name in ("tx", "rx"))
    return tx, rx


def load_rings(native: Any, tx: bytes, rx: bytes) -> None:
    """The other way. The rings have room for ``LineOutput`` and ``LineInput`` (``trivmm.state.platform``)."""
    for name, data in (("tx", tx), ("rx", rx)):
        setattr(native, f"{name}_len", len(data))
        ffi.memmove(getattr(native, name), data, len(data))
