"""Two ports that only tell the host something: 0x80 (progress codes) and 0x402 (text, as Bochs has it).

Owned by the board. Both are also handled in C where a back end does that; here is the form for all back ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from trivmm.bus.space import Effect
from trivmm.errors import one_line
from trivmm.state.platform import DebugPortState

__all__ = ["DEBUG_CONSOLE_PORTS", "DEBUG_PORTS", "DebugConsole", "DebugPort"]

DEBUG_PORTS: Final = (0x80, 1)  # first port and count
DEBUG_CONSOLE_PORTS: Final = (0x402, 1)
LINE_BYTES: Final = 1024  # a guest that never ends its line gets it cut here
ESCAPED: Final = 6  # characters of a byte's longest escape, so that nothing is cut twice


class DebugPort:
    """``last`` is the last code written, ``count`` how many there were."""

    def __init__(self) -> None:
        self.last = 0
        self.count = 0

    def read(self, offset: int, size: int) -> bytes:
        return self.last.to_bytes(1, "little") * size

    def write(self, offset: int, data: bytes) -> Effect:
        self.last = data[-1]
        self.count += len(data)
        return None

    def save(self) -> DebugPortState:
        return DebugPortState(self.last, self.count)

    def check(self, state: DebugPortState, where: str) -> None:
        """Any values will do."""

    def load(self, state: DebugPortState) -> None:
        self.last, self.count = state.last, state.count


class DebugConsole:
    """Gives whole lines to ``log``, from the writing vCPU's thread; ``log`` never blocks. What a terminal would act on
    is escaped."""

    PRESENT: Final = 0xE9  # what a read answers when the port exists

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._line = bytearray()

    def read(self, offset: int, size: int) -> bytes:
        return bytes([self.PRESENT]) * size

    def write(self, offset: int, data: bytes) -> Effect:
        lines: list[bytes] = []
        if not self._lock.acquire(timeout=1.0):  # held for a few byte copies only
            return None
        try:
            for byte in data:
                if byte == 0x0A or len(self._line) >= LINE_BYTES:
                    lines.append(bytes(self._line))
                    self._line.clear()
                if byte != 0x0A:
                    self._line.append(byte)
        finally:
            self._lock.release()
        for line in lines:
            self._log(one_line(line.decode("utf-8", "backslashreplace").rstrip("\r"), ESCAPED * LINE_BYTES))
        return None
