"""What every virtio device with C queue workers shares: starting them, stopping them, where their queues stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import trio

from trivmm.bus.space import GuestRequest
from trivmm.errors import MigrationError, NotSupported, shown
from trivmm.memory.device_memory import DeviceMemory
from trivmm.memory.guest import GuestMemory
from trivmm.platform.line import Line
from trivmm.state.virtio import QueueState
from trivmm.values import U16, U64
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.port import Storage
from trivmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, QueueWorker
from trivmm.virtio.setup import DriverSetup

__all__ = ["RING_FEATURES", "DeviceDescription", "NoState", "WorkerDevice"]

RING_FEATURES: Final = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


@attrs.frozen
class NoState:
    """Of a device that has nothing of its own to save."""


@attrs.frozen
class DeviceDescription:
    """What a driver was told: the device's type, the features offered, the largest size of each queue."""

    type: U16
    features: U64
    queue_sizes: tuple[U16, ...]


class WorkerDevice:
    """Base of the devices. Implements what it can of ``DeviceBackend``; subclasses say what a worker is made of.

    Set by the board: ``on_broken`` tells the actor that a queue's driver is at fault, ``on_config_change`` tells
    the driver that the configuration space has changed, ``on_event(event, **properties)`` the VM's observers of
    something that happened to the device, ``on_request`` the machine what is to become of it (a reset, or its end). All
    are called in the trio thread."""

    device_type: int
    features: int
    queue_sizes: tuple[int, ...]
    storage: Storage | None = None
    state_type: type = NoState
    description_type: type = DeviceDescription

    def __init__(self, name: str, memory: GuestMemory) -> None:
        self.name = name
        self.memory = memory
        self.on_broken: Callable[[str], None] = lambda problem: None
        self.on_config_change: Callable[[], None] = lambda: None
        self.on_request: Callable[[GuestRequest], None] = lambda request: None
        self.on_event: Callable[..., None] = lambda event, **properties: None
        self._workers: list[QueueWorker] = []
        self._queues: list[QueueState] = []

    def _shared_out(self, queues: Sequence[int]) -> list[Sequence[int]]:
        """Which queues, by index, have a worker in common. Each has its own unless a subclass says otherwise."""
        return [(queue,) for queue in queues]

    def _make_worker(self, features: int) -> Any:
        """The C struct of a new worker, initialised."""
        raise NotImplementedError

    def _worker_of(self, queues: Sequence[int], features: int) -> Any:
        """The same, of the worker that these queues, by index, have in common."""
        return self._make_worker(features)

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        """:raises ValueError: when a queue's rings don't lie in RAM."""
        self._queues = list(setup.queues)
        for indices in self._shared_out([index for index, _ in setup.enabled()]):
            native = self._worker_of(indices, setup.features)
            name = f"{self.name}_q{'+'.join(map(str, indices))}"
            queues = {index: setup.queues[index] for index in indices}
            worker = QueueWorker(name, native, self.memory, queues, handles, setup.features, self._broken, self._news)
            self._workers.append(worker)
            # Not ``start``: cancelled at the wrong moment it would wait for the worker, which shields itself.
            workers.start_soon(worker.run, name=name)
        await trio.lowlevel.checkpoint()

    def _news(self, worker: QueueWorker) -> None:
        """A worker's thread is back, and before it goes on: what its handler set ``news`` for, if it did."""

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
                for index, queue in worker.queues.items():
                    self._queues[index] = queue
                self._count(worker)

    def _count(self, worker: QueueWorker) -> None:
        """Add a stopped worker's counters to the device's."""

    @property
    def queues(self) -> tuple[QueueState, ...]:
        return tuple(self._queues)

    def reset(self) -> None:
        self._queues = []

    def read_config(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write_config(self, offset: int, data: bytes) -> None:
        return None

    def save(self) -> Any:
        return NoState()

    def load(self, state: Any) -> None:
        return None

    def guest_runs(self, running: bool) -> None:
        """The guest runs from now on, or stands still (paused, in a switchover, before its start). In the trio
        thread."""

    # --- its place in the machine --------------------------------------------------------------------------------

    def plug(self, room: DeviceMemory) -> None:
        """It is on the bus next: what it has of its own for the guest's memory is mapped there. Waits for the kernel.

        :raises TrivmmError: it can't be."""

    def unplug(self) -> None:
        """The guest has let go of it: what :meth:`plug` did is taken back. Waits for the kernel. Idempotent."""

    @property
    def resources(self) -> list[dict[str, Any]]:
        """What the device tree has of it, beside its BAR."""
        return []

    def describe(self) -> DeviceDescription:
        return DeviceDescription(self.device_type, self.features, self.queue_sizes)

    def become(self, described: Any) -> None:
        mine = WorkerDevice.describe(self)
        for field in attrs.fields(DeviceDescription):
            theirs, here = getattr(described, field.name), getattr(mine, field.name)
            if theirs != here:
                raise MigrationError(
                    f"{self.name}: the sender's {field.name} is {shown(theirs)}, here it is {shown(here)}"
                )

    @property
    def lines(self) -> Mapping[str, Line]:
        """Its console lines, by name."""
        return {}

    def terminal_resized(self) -> None:
        """The terminal behind a line of it, if there is one, may have another size now."""

    def counters(self) -> dict[str, int]:
        return {}

    def set_capacity(self, capacity: int) -> None:
        """Of a device with a capacity in bytes: make what is behind it so large. In a thread; :meth:`capacity_changed`
        goes on.

        :raises NotSupported: it has none, or not one that changes. :raises ConfigError: not so large."""
        raise NotSupported("id", self.name, "a device without a capacity of its own", "give a disk")

    def capacity_changed(self) -> None:
        """In the trio thread, after :meth:`set_capacity`: tell the driver."""

    def close(self) -> None:
        return None
