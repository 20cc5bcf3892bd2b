"""COM1: the 16550 of ``ffi/uart.c`` as a :class:`~trivmm.platform.line.Line`.

vCPU threads touch only the C object, most of them without Python (``tv_uart_pio`` is a hook of the KVM run loop;
``Serial.native`` is its argument). A slow sink fills the ring, LSR.THRE goes away and the guest waits.
"""

from __future__ import annotations

import os
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.bus.space import Effect
from trivmm.platform.line import Line, dump_rings, load_rings
from trivmm.platform.sinks import Sink
from trivmm.state.platform import SerialState

__all__ = ["COM1", "COM1_IRQ", "Serial"]

COM1: Final = (0x3F8, 8)  # first port and count
COM1_IRQ: Final = 4
_REGISTERS: Final = ("ier", "fcr", "lcr", "mcr", "msr", "scr", "dll", "dlm")


class Serial(Line):
    """A :class:`~trivmm.bus.space.BusDevice` for the ports :data:`COM1`; ``irq_fd`` is its eventfd for IRQ 4."""

    def __init__(self, sink: Sink | None = None) -> None:
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            super().__init__("serial", sink, self._make, lib.tv_uart_free, lib.tv_uart_line)
        except BaseException:
            os.close(self.irq_fd)
            raise

    def _make(self, ready_fd: int) -> Any:
        return lib.tv_uart_new(self.irq_fd, ready_fd)

    # --- the guest's side ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        data = ffi.new("uint8_t[]", max(size, 1))
        lib.tv_uart_pio(self.native, offset, size, 0, data, 1)
        return bytes(ffi.buffer(data, size))

    def write(self, offset: int, data: bytes) -> Effect:
        # "elements of one byte at successive registers" is what an access wider than a byte is on the ISA bus
        lib.tv_uart_pio(self.native, offset, len(data), 1, ffi.new("uint8_t[]", bytes(data)), 1)
        return None

    # --- state ---------------------------------------------------------------------------------------------

    def save(self) -> SerialState:
        """With the vCPUs stopped. Output still in the ring is part of it and stays unsent here until the guest
        writes again or :meth:`thaw`."""
        native = ffi.new("struct tv_uart_state *")
        lib.tv_uart_save(self.native, native, self.hold())
        tx, rx = dump_rings(native.line)
        registers = {name: getattr(native, name) for name in _REGISTERS}
        return SerialState(
            **registers, thre_pending=bool(native.thre_pending), overrun=bool(native.overrun), tx=tx, rx=rx
        )

    def check(self, state: SerialState, where: str) -> None:
        """Any registers will do: bits that a UART does not have are left out."""

    def load(self, state: SerialState) -> None:
        native = ffi.new("struct tv_uart_state *")
        for name in (*_REGISTERS, "thre_pending", "overrun"):
            setattr(native, name, getattr(state, name))
        load_rings(native.line, state.tx, state.rx)
        lib.tv_uart_load(self.native, native)

    def counters(self) -> dict[str, int]:
        return super().counters() | {"tx_dropped": int(lib.tv_uart_tx_dropped(self.native))}

    def close(self) -> None:
        """After ``run`` has ended. Idempotent."""
        closed = self.closed
        super().close()
        if not closed:
            os.close(self.irq_fd)
