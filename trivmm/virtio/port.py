"""What a virtio device is to those who do not know which one it is: its transport, its actor, the board."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trivmm.state.virtio import QueueState
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.setup import DriverSetup

if TYPE_CHECKING:
    import trio

__all__ = ["DeviceBackend", "Storage"]


class Storage(Protocol):
    """What a device keeps on storage that other hosts may have too, and that one at a time may use: a disk's image. The
    path of a socket that it listens at is one too: the side that runs the VM has it.

    Every call may wait for the storage: they are made in a thread, one at a time."""

    def flush(self) -> None:
        """With the lock held: what the driver wrote is on the storage when this returns, and nothing cached here.

        :raises MigrationError: it may be lost; said again at every later call."""

    def take_lock(self) -> None:
        """Idempotent. :raises ConfigError: when another process has it."""

    def release_lock(self) -> None:
        """Idempotent."""

    def refresh(self) -> None:
        """What was cached here before the lock was taken is read anew.

        :raises ConfigError: there is less of it than the driver was told."""


class DeviceBackend(Protocol):
    """A device as its actor and transport see it. All ``async`` methods run in the device nursery's actor."""

    name: str  # unique in the VM and stable: "_disk0", "__rng"
    device_type: int  # virtio 1.2 section 5: 2 block, 4 entropy
    features: int  # offered bits, VERSION_1 included
    queue_sizes: tuple[int, ...]  # maximum size of each queue
    storage: Storage | None  # None: nothing that another host could have

    def read_config(self, offset: int, size: int) -> bytes:
        """Device configuration space. Any thread, never blocks. Past the end: all-ones."""

    def write_config(self, offset: int, data: bytes) -> None: ...

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        """Start the queue workers with ``workers.start_soon``; every queue is processed once, notified or not.
        ``setup`` is the driver's, checked; ``handles`` by the index of the queue.

        Cancellation leaves nothing running after ``stop``. :raises TrivmmError: → NEEDS_RESET."""

    async def stop(self) -> None:
        """Stop the workers; in-flight requests end and reach the used ring. Returns when nothing of this device
        touches guest memory any more. Keeps where its queues stand: see ``queues``. Safe when not active."""

    @property
    def queues(self) -> tuple[QueueState, ...]:
        """After ``stop``: the queues of the last ``setup``, each as far as it has come. Empty before the first one,
        after ``reset``, and where ``activate`` did not get so far."""

    def reset(self) -> None:
        """After ``stop``: forget the driver (positions, negotiated features)."""

    state_type: type  # of what ``save`` gives: a frozen class, see ``trivmm.state.strict``
    description_type: type  # of what ``describe`` gives

    def save(self) -> Any:
        """After ``stop``: what is the device's own and not in queues or transport."""

    def load(self, state: Any) -> None:
        """Take over a ``state_type`` that a peer sent: its fields are as wide as they say, and no more is known."""

    def describe(self) -> Any:
        """What the driver was told of the device and may count on wherever it moves to."""

    def become(self, described: Any) -> None:
        """Before its first activation: be the device that a sender described.

        :raises TrivmmError: where it can't, naming what differs."""

    def counters(self) -> dict[str, int]: ...

    def close(self) -> None: ...
