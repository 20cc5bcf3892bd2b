"""COM1: the 16550 of ``ffi/uart.c``, the task that carries its output to a sink, and a tail for those who watch.

Owned by the board; :meth:`Serial.run` is a task of the device nursery. vCPU threads touch only the C object, most of
them without Python (``tv_uart_pio`` is a hook of the KVM run loop; ``Serial.native`` is its argument).

Nothing is lost: a byte leaves the ring only when the sink has taken it, a slow sink fills the ring, LSR.THRE goes
away and the guest waits. A sink that fails (disk full, reader gone) is logged, named in ``sink_error`` and replaced by
none.
"""

from __future__ import annotations

import base64
import binascii
import errno
import logging
import os
import stat
from typing import Any, Final, Protocol

import trio

from trivmm._native import ffi, lib
from trivmm.config import SerialConfig
from trivmm.errors import ConfigError, ProtocolError
from trivmm.machine.bus import Outcome
from trivmm.migration.fields import Fields

__all__ = ["COM1", "COM1_IRQ", "FdSink", "NullSink", "Serial", "Sink", "open_sink"]

logger = logging.getLogger(__name__)

COM1: Final = (0x3F8, 8)  # first port and count
COM1_IRQ: Final = 4
TAIL_BYTES: Final = 1 << 20
CHUNK: Final = 16384  # bytes a sink gets at once: small enough that a drain's deadline is looked at in between
TX_SIZE: Final = 65536
RX_SIZE: Final = 4096
_BYTE_FIELDS: Final = ("ier", "fcr", "lcr", "mcr", "msr", "scr", "dll", "dlm", "thre_pending", "overrun")


class Sink(Protocol):
    async def send(self, data: bytes) -> int:
        """Take some of ``data``; gives how many bytes, at least one. Once begun, a write that a thread makes is
        not abandoned: cancellation takes effect before it or at the next. :raises OSError: when it cannot."""

    def close(self) -> None: ...


class NullSink:
    async def send(self, data: bytes) -> int:
        await trio.lowlevel.checkpoint()
        return len(data)

    def close(self) -> None:
        return None


class FdSink:
    """A file, pipe, terminal or socket. Owns ``fd``. Regular files are written in a thread, since a full page cache
    blocks; everything else through non-blocking writes, the open file description being ours alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.threaded = stat.S_ISREG(os.fstat(fd).st_mode)
        self._limiter = trio.CapacityLimiter(1)
        self._waited = False  # somebody may be waiting for it to become writable
        if not self.threaded:
            os.set_blocking(fd, False)

    async def send(self, data: bytes) -> int:
        if self.threaded:
            return await trio.to_thread.run_sync(os.write, self._fd, data, limiter=self._limiter)
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                sent = os.write(self._fd, data)
            except BlockingIOError:
                self._waited = True
                await trio.lowlevel.wait_writable(self._fd)  # bounded by the owner: a slow sink may be slow for ever
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return sent

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._waited:  # else the thread that built it may close it too: trio has never heard of it
                trio.lowlevel.notify_closing(fd)
            os.close(fd)


def open_sink(config: SerialConfig, *, incoming: bool = False) -> Sink:
    """The sink of a ``--serial`` option. A file is truncated, or continued when the VM is ``incoming``.

    :raises ConfigError: when it cannot be opened.
    """
    if config.mode in ("Off", "Null"):
        return NullSink()
    if config.mode == "Tty":
        # An open file description of our own: O_NONBLOCK on a shared one would surprise its other users. A regular file
        # needs none, and with a position of its own our log, or the shell's next line, overwrites what the guest says.
        if stat.S_ISREG(os.fstat(1).st_mode):
            return FdSink(os.dup(1))
        try:
            return FdSink(os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY))
        except OSError:  # a socket, or no /proc
            return FdSink(os.dup(1))
    if config.mode != "File" or not config.file:
        raise ConfigError("serial", config.mode, "no such mode, or no file", "give off, null, tty or file=PATH")
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return FdSink(os.open(config.file, flags | (os.O_APPEND if incoming else os.O_TRUNC), 0o644))
    except (OSError, ValueError) as error:
        why = "a FIFO that nobody reads" if getattr(error, "errno", None) == errno.ENXIO else str(error)
        raise ConfigError("serial.file", config.file, f"cannot open it ({why})", "give a writable path") from error


class Serial:
    """A :class:`~trivmm.machine.bus.BusDevice` for the ports :data:`COM1`; ``irq_fd`` is its eventfd for IRQ 4."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink_error: OSError | None = None
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ready_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.native = lib.tv_uart_new(self.irq_fd, self._ready_fd)
        if self.native == ffi.NULL:
            os.close(self.irq_fd)
            os.close(self._ready_fd)
            raise MemoryError("UART")
        self._sink = sink
        self._buffer = ffi.new("uint8_t[]", CHUNK)
        self._in_flight = 0
        self._tail = bytearray()
        self._total = 0
        self._news = trio.Event()  # set, and replaced, with every piece of output
        self._moved = trio.Event()  # the same with every signal of the ready descriptor or change of sink

    # --- the guest's side ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        data = ffi.new("uint8_t[]", max(size, 1))
        lib.tv_uart_pio(self.native, offset, size, 0, data, 1)
        return bytes(ffi.buffer(data, size))

    def write(self, offset: int, data: bytes) -> Outcome:
        # "elements of one byte at successive registers" is what an access wider than a byte is on the ISA bus
        lib.tv_uart_pio(self.native, offset, len(data), 1, ffi.new("uint8_t[]", bytes(data)), 1)
        return None

    def reset(self) -> None:
        lib.tv_uart_reset(self.native)

    # --- input ---------------------------------------------------------------------------------------------

    def push_input(self, data: bytes) -> int:
        """Give the guest input; gives how many bytes found room."""
        return int(lib.tv_uart_push_rx(self.native, ffi.from_buffer("uint8_t[]", data), len(data)))

    async def feed(self, data: bytes) -> None:
        """All of ``data``, as the guest makes room. Waits for the guest, so the caller bounds it."""
        await trio.lowlevel.checkpoint()
        while data:
            moved = self._moved
            data = data[self.push_input(data) :]
            if data:
                await moved.wait()

    # --- output --------------------------------------------------------------------------------------------

    def attach_sink(self, sink: Sink) -> None:
        """Replace the sink (None at first on the receiving side of a migration: output waits in the ring)."""
        old, self._sink = self._sink, sink
        if old is not None:
            old.close()
        self._signal()

    def _signal(self) -> None:
        os.eventfd_write(self._ready_fd, 1)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The drain task; ends by cancellation. Wakes by the ready descriptor, never by time."""
        task_status.started()
        while True:
            while self._sink is not None and await self._send_piece(self._sink):
                pass
            await trio.lowlevel.wait_readable(self._ready_fd)  # bounded by the device nursery's scope
            try:
                os.eventfd_read(self._ready_fd)
            except BlockingIOError:
                continue
            self._moved, moved = trio.Event(), self._moved
            moved.set()

    async def _send_piece(self, sink: Sink) -> bool:
        """Hand one piece to the sink. False when there is nothing to send."""
        length = lib.tv_uart_peek_tx(self.native, self._buffer, CHUNK)
        if not length:
            return False
        piece = bytes(ffi.buffer(self._buffer, length))
        self._in_flight = length if isinstance(sink, FdSink) and sink.threaded else 0
        try:
            sent = await sink.send(piece)
        except OSError as error:
            self.sink_error = error
            logger.warning("serial: cannot write the output any more (%s); the guest goes on without it", error)
            if self._sink is sink:
                self.attach_sink(NullSink())
            return True
        finally:
            self._in_flight = 0
        lib.tv_uart_consume_tx(self.native, sent)
        self._observe(piece[:sent])
        return True

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
            while lib.tv_uart_tx_used(self.native):
                await self._news.wait()
        return not lib.tv_uart_tx_used(self.native)

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

    async def wait_for(self, text: str | bytes, since: int = 0) -> int:
        """Wait until ``text`` is in the output at or after ``since``; gives the position after it. The caller
        bounds the wait. Sees the last MiB only."""
        wanted = text.encode() if isinstance(text, str) else text
        await trio.lowlevel.checkpoint()
        while True:
            news, found = self._news, self.tail(since).find(wanted)
            if found >= 0:
                return max(since, self._total - len(self._tail)) + found + len(wanted)
            since = max(since, self._total - len(wanted) + 1)
            await news.wait()

    # --- state ---------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """With the vCPUs stopped. Output still in the ring is part of it and stays unsent here until the guest
        writes again or :meth:`thaw`."""
        native = ffi.new("struct tv_uart_state *")
        lib.tv_uart_save(self.native, native, self._in_flight)
        state: dict[str, Any] = {name: getattr(native, name) for name in _BYTE_FIELDS}
        state["tx"] = base64.b64encode(bytes(ffi.buffer(native.tx, native.tx_len))).decode()
        state["rx"] = base64.b64encode(bytes(ffi.buffer(native.rx, native.rx_len))).decode()
        return state

    def thaw(self) -> None:
        """A saved state was not used: go on sending. Idempotent; for an undone switchover and for resume."""
        lib.tv_uart_thaw(self.native)

    def load(self, state: dict[str, Any]) -> None:
        """:raises ProtocolError: when the state is malformed."""
        fields = Fields("serial", state)
        native = ffi.new("struct tv_uart_state *")
        for name in _BYTE_FIELDS:
            setattr(native, name, fields.integer(name, 0, 255))
        for name, limit in (("tx", TX_SIZE), ("rx", RX_SIZE)):
            try:
                data = base64.b64decode(fields.text(name, limit * 4 // 3 + 4), validate=True)
            except (binascii.Error, ValueError) as error:
                raise ProtocolError(f"serial: {name} is not base64") from error
            if len(data) > limit:
                raise ProtocolError(f"serial: {name} has {len(data)} bytes, more than {limit}")
            setattr(native, f"{name}_len", len(data))
            ffi.memmove(getattr(native, name), data, len(data))
        fields.end()
        if lib.tv_uart_load(self.native, native):  # pragma: no cover - the lengths were checked above
            raise ProtocolError("serial: the saved rings do not fit")

    def counters(self) -> dict[str, int]:
        return {"tx_bytes": self._total, "tx_dropped": int(lib.tv_uart_tx_dropped(self.native))}

    def close(self) -> None:
        """After ``run`` and every vCPU thread has ended. Idempotent."""
        native, self.native = self.native, ffi.NULL
        if native == ffi.NULL:
            return
        lib.tv_uart_free(native)
        if self._sink is not None:
            self._sink.close()
        os.close(self.irq_fd)
        os.close(self._ready_fd)


class Subscription:
    """One watcher's position in the output; what it did not fetch in time (a MiB) it does not see."""

    def __init__(self, serial: Serial, position: int) -> None:
        self._serial = serial
        self.position = position

    async def receive(self) -> bytes:
        """The output since the last call, waiting for some. The caller bounds the wait."""
        await trio.lowlevel.checkpoint()
        while self.position >= self._serial.total:
            await self._serial._news.wait()
        data = self._serial.tail(self.position)
        self.position = self._serial.total
        return data
