"""virtio-console (virtio 1.2 section 5.3): one port, no multiport, the size of the terminal behind it.

Queue 0 receives what is typed, queue 1 transmits what the guest says; both end in the rings of the device's
:class:`ConsoleLine`. Input without a buffer stays in its ring, output without room stays on the queue.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.config import ConsoleConfig
from trivmm.memory.guest import GuestMemory
from trivmm.platform.line import Line
from trivmm.platform.sinks import FdSink, Sink
from trivmm.state.platform import LineInput, LineOutput
from trivmm.values import U16, Within
from trivmm.virtio.console.line import ConsoleLine
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.setup import DriverSetup

__all__ = ["ConsoleDevice", "ConsoleState"]

F_SIZE: Final = 1 << 0
QUEUE_SIZE: Final = 256
RECEIVE, TRANSMIT = 0, 1
CONFIG: Final = struct.Struct("<HHII")  # section 5.3.4: cols, rows, max_nr_ports, emerg_wr
PORTS: Final = 1
MAX_SIZE: Final = (1 << 16) - 1


@attrs.frozen
class ConsoleState:
    """``tx_taken``: bytes of the chain that the device is at which the output has already."""

    columns: U16
    rows: U16
    tx_taken: Annotated[int, Within(0, 1 << 30)]  # TV_CHAIN_BYTES: no chain is longer
    tx: LineOutput
    rx: LineInput


class ConsoleDevice(WorkerDevice):
    """``sink`` None is for a destination: it gets its own at COMMIT. Owns the sink."""

    device_type = 3
    features = RING_FEATURES | F_SIZE
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)
    state_type = ConsoleState

    def __init__(self, config: ConsoleConfig, memory: GuestMemory, sink: Sink | None, name: str = "__console") -> None:
        super().__init__(config.id or name, memory)
        self._size = 0, 0
        self._sized = False  # the driver has taken F_SIZE and is active
        self._received = self._transmitted = 0  # by workers that have ended
        self.line = ConsoleLine(sink)
        self.terminal_resized()

    # --- size ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """(columns, rows) as the driver is told; zeros where there is no terminal."""
        return self._size

    @property
    def lines(self) -> Mapping[str, Line]:
        return {"console": self.line}

    def terminal_resized(self) -> None:
        """Take the size of the terminal behind the line, if there is one; what it was otherwise stays."""
        sink = self.line.sink
        size = sink.size() if isinstance(sink, FdSink) else (0, 0)
        if any(size):
            self.resize(*size)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now. In the trio thread."""
        size = min(columns, MAX_SIZE), min(rows, MAX_SIZE)
        if size != self._size:
            self._size = size
            if self._sized:
                self.on_config_change()

    def read_config(self, offset: int, size: int) -> bytes:
        return CONFIG.pack(*self._size, PORTS, 0)[offset : offset + size].ljust(size, b"\xff")

    # --- queues ----------------------------------------------------------------------------------------------

    def _shared_out(self, queues: Sequence[int]) -> list[Sequence[int]]:
        """One thread is enough for what people and logs say."""
        return [queues] if queues else []

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_console_worker *")
        lib.tv_console_worker_init(native, self.line.native)
        return native

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        """:raises ValueError: when a queue's rings don't lie in RAM."""
        bells = {index: handles[index].doorbell for index, _ in setup.enabled()}
        lib.tv_console_set_bells(self.line.native, bells.get(RECEIVE, -1), bells.get(TRANSMIT, -1))
        await super().activate(setup, handles, workers)
        self._sized = bool(setup.features & F_SIZE)
        if self._sized and any(self._size):
            self.on_config_change()  # drivers look at the size when they are told to, as Linux's does

    async def stop(self) -> None:
        self._sized = False
        lib.tv_console_set_bells(self.line.native, -1, -1)
        await super().stop()

    def reset(self) -> None:
        super().reset()
        lib.tv_console_reset(self.line.native)

    def _count(self, worker: QueueWorker) -> None:
        self._received += int(worker.native.received)
        self._transmitted += int(worker.native.transmitted)

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> ConsoleState:
        tx_taken, tx, rx = self.line.save()
        return ConsoleState(*self._size, tx_taken, tx, rx)

    def load(self, state: ConsoleState) -> None:
        self.line.load(state.tx_taken, state.tx, state.rx)
        self._size = state.columns, state.rows

    def counters(self) -> dict[str, int]:
        live = [worker.native for worker in self._workers]
        return self.line.counters() | {
            "received_bytes": self._received + sum(int(native.received) for native in live),
            "transmitted_bytes": self._transmitted + sum(int(native.transmitted) for native in live),
        }

    def close(self) -> None:
        self.line.close()
