"""The console's rings of ``ffi/console.c`` as a :class:`~trivmm.platform.line.Line`."""

from __future__ import annotations

from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.platform.line import Line, RingCalls, dump_rings, load_rings
from trivmm.platform.sinks import Sink

__all__ = ["ConsoleLine"]

_CALLS: Final = RingCalls(
    lib.tv_console_peek_tx,
    lib.tv_console_consume_tx,
    lib.tv_console_tx_used,
    lib.tv_console_push_rx,
    lib.tv_console_rx_room,
    lib.tv_console_thaw,
)


def _make(ready_fd: int) -> Any:
    native = lib.tv_console_new(ready_fd)
    # Freed with the last reference: a worker's task holds one, so a thread that is stuck keeps what it works on.
    return native if native == ffi.NULL else ffi.gc(native, lib.tv_console_free)


class ConsoleLine(Line):
    def __init__(self, sink: Sink | None = None) -> None:
        """:raises MemoryError:"""
        super().__init__("console", _CALLS, _make, sink)

    def save(self) -> tuple[int, bytes, bytes]:
        """(bytes taken of the chain that the device is at, output, input), with the workers ended. What is in the rings
        stays unsent and untyped here until :meth:`thaw`."""
        native = ffi.new("struct tv_console_state *")
        lib.tv_console_save(self.native, native, self.hold())
        tx, rx = dump_rings(native)
        return int(native.tx_taken), tx, rx

    def load(self, tx_taken: int, tx: bytes, rx: bytes) -> None:
        native = ffi.new("struct tv_console_state *")
        native.tx_taken = tx_taken
        load_rings(native, tx, rx)
        lib.tv_console_load(self.native, native)

    def close(self) -> None:
        if self._ready_fd >= 0:
            lib.tv_console_close(self.native)
        super().close()
