"""What every virtio device with C queue workers shares: starting them, stopping them, where their queues stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from trivmm.errors import MigrationError
from trivmm.memory.guest import GuestMemory
from trivmm.state.fields import Fields
from trivmm.virtio.port import Activation, QueueConfig, Storage
from trivmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, QueueWorker

__all__ = ["RING_FEATURES", "WorkerDevice"]

RING_FEATURES: Final = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


class WorkerDevice:
    """Base of the devices. Implements what it can of ``DeviceBackend``; subclasses say what a worker is made of.

    Set by the board: ``on_broken`` tells the actor that a queue's driver is at fault, ``on_config_change`` tells
    the driver that the configuration space has changed. Both are called in the trio thread."""

    device_type: int
    features: int
    queue_sizes: tuple[int, ...]
    storage: Storage | None = None

    def __init__(self, name: str, memory: GuestMemory) -> None:
        self.name = name
        self.memory = memory
        self.on_broken: Callable[[str], None] = lambda problem: None
        self.on_config_change: Callable[[], None] = lambda: None
        self._workers: list[QueueWorker] = []
        self._positions: dict[int, tuple[int, int, int]] = {}

    def _shared_out(self, queues: Sequence[QueueConfig]) -> list[Sequence[QueueConfig]]:
        """Which queues have a worker in common. Each has its own unless a subclass says otherwise."""
        return [(queue,) for queue in queues]

    def _make_worker(self, features: int) -> Any:
        """The C struct of a new worker, initialised."""
        raise NotImplementedError

    async def activate(self, activation: Activation, workers: trio.Nursery) -> None:
        """:raises ValueError: when a queue's rings don't lie in RAM."""
        self._positions = {queue.index: (queue.index, queue.next_avail, queue.next_used) for queue in activation.queues}
        for queues in self._shared_out(activation.queues):
            native = self._make_worker(activation.features)
            name = f"{self.name}_q{'+'.join(str(queue.index) for queue in queues)}"
            worker = QueueWorker(name, native, self.memory, queues, activation.features, self._broken)
            self._workers.append(worker)
            # Not ``start``: cancelled at the wrong moment it would wait for the worker, which shields itself.
            workers.start_soon(worker.run, name=name)
        await trio.lowlevel.checkpoint()

    def _broken(self, problem: str) -> None:
        self.on_broken(problem)

    async def stop(self) -> None:
        """Bounded by the caller (``device_stop``, ``quiesce``); may be called again after that expired."""
        for worker in self._workers:
            worker.request_stop()
        for worker in list(self._workers):
            await worker.done.wait()
            if worker in self._workers:  # once each, though a call expires in the wait for the next one
                self._workers.remove(worker)
                self._positions |= {position[0]: position for position in worker.positions}
                self._count(worker)

    def _count(self, worker: QueueWorker) -> None:
        """Add a stopped worker's counters to the device's."""

    def positions(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(self._positions.values())

    def reset(self) -> None:
        self._positions = {}

    def read_config(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write_config(self, offset: int, data: bytes) -> None:
        return None

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name}: unknown state {sorted(state)}")

    def describe(self) -> dict[str, Any]:
        return {"type": self.device_type, "features": self.features, "queue_sizes": list(self.queue_sizes)}

    def become(self, described: dict[str, Any]) -> None:
        fields = Fields(self.name, described)
        for key, mine in WorkerDevice.describe(self).items():
            theirs = fields.anything(key)
            if theirs != mine:
                raise MigrationError(f"{self.name}: the sender's {key} is {theirs!r:.80}, here it is {mine}")
        self._become(fields)
        fields.end()

    def _become(self, fields: Fields) -> None:
        """A subclass's share of :meth:`become`."""

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        return None
