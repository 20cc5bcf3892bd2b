"""The console's rings of ``ffi/console.c`` as a :class:`~trivmm.platform.line.Line`."""

from __future__ import annotations

from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.errors import ProtocolError
from trivmm.platform.line import Line, RingCalls, dump_rings, load_rings
from trivmm.platform.sinks import Sink
from trivmm.state.fields import Fields

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

    def save(self) -> dict[str, Any]:
        """With the workers ended. What is in the rings stays unsent and untyped here until :meth:`thaw`."""
        native = ffi.new("struct tv_console_state *")
        lib.tv_console_save(self.native, native, self.hold())
        return {"tx_taken": native.tx_taken} | dump_rings(native)

    def load(self, fields: Fields) -> None:
        """:raises ProtocolError: when the state is malformed."""
        native = ffi.new("struct tv_console_state *")
        native.tx_taken = fields.integer("tx_taken", 0, lib.TV_CHAIN_BYTES)  # no chain is longer
        load_rings("console", fields, native)
        if lib.tv_console_load(self.native, native):  # pragma: no cover - the lengths were checked above
            raise ProtocolError("console: the saved rings do not fit")

    def close(self) -> None:
        if self._ready_fd >= 0:
            lib.tv_console_close(self.native)
        super().close()
