"""The console's rings of ``ffi/console.c`` as a :class:`~trivmm.platform.line.Line`."""

from __future__ import annotations

from trivmm._native import ffi, lib
from trivmm.platform.line import Line, dump_rings, load_rings
from trivmm.platform.sinks import Sink

__all__ = ["ConsoleLine"]


class ConsoleLine(Line):
    def __init__(self, sink: Sink | None = None) -> None:
        """:raises MemoryError:"""
        super().__init__("console", sink, lib.tv_console_new, lib.tv_console_free, lib.tv_console_line)

    def save(self) -> tuple[int, bytes, bytes]:
        """(bytes taken of the chain that the device is at, output, input), with the workers ended. What is in the rings
        stays unsent and untyped here until :meth:`thaw`."""
        native = ffi.new("struct tv_console_state *")
        lib.tv_console_save(self.native, native, self.hold())
        tx, rx = dump_rings(native.line)
        return int(native.tx_taken), tx, rx

    def load(self, tx_taken: int, tx: bytes, rx: bytes) -> None:
        native = ffi.new("struct tv_console_state *")
        native.tx_taken = tx_taken
        load_rings(native.line, tx, rx)
        lib.tv_console_load(self.native, native)
