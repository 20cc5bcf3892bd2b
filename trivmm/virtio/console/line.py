"""The console's rings of ``ffi/console.c`` as a :class:`~trivmm.platform.line.Line`."""

from __future__ import annotations

from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.errors import ProtocolError
from trivmm.platform.line import Line, dump_rings, load_rings
from trivmm.platform.sinks import Sink
from trivmm.state.fields import Fields

__all__ = ["ConsoleLine"]

CHAIN_BYTES: Final = 1 << 30  # TV_CHAIN_BYTES: no chain is longer


class ConsoleLine(Line):
    def __init__(self, sink: Sink | None = None) -> None:
        """:raises MemoryError:"""
        super().__init__("console", sink, lib.tv_console_new, lib.tv_console_free, lib.tv_console_line)

    def save(self) -> dict[str, Any]:
        """With the workers ended. What is in the rings stays unsent and untyped here until :meth:`thaw`."""
        native = ffi.new("struct tv_console_state *")
        lib.tv_console_save(self.native, native, self.hold())
        return {"tx_taken": native.tx_taken} | dump_rings(native.line)

    def load(self, fields: Fields) -> None:
        """:raises ProtocolError: when the state is malformed."""
        native = ffi.new("struct tv_console_state *")
        native.tx_taken = fields.integer("tx_taken", 0, CHAIN_BYTES)
        load_rings("console", fields, native.line)
        if lib.tv_console_load(self.native, native):  # pragma: no cover - the lengths were checked above
            raise ProtocolError("console: the saved rings do not fit")
