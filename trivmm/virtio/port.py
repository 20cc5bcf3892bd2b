"""What a virtio device is to those who do not know which one it is: its transport, its actor, the board.

All values here are plain data or protocols; nothing imports trio at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs

if TYPE_CHECKING:
    import trio

__all__ = ["Activation", "DeviceBackend", "QueueConfig", "Storage"]


@attrs.frozen
class QueueConfig:
    """A validated private copy of one enabled queue's registers (virtio 1.2 section 4.1.4.3).

    ``irq`` is the queue's interrupt as the C worker sees it (cffi ``struct tv_irq *``), ``doorbell`` the eventfd
    that a notification signals. Addresses are guest physical.
    """

    index: int
    size: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int
    doorbell: int
    irq: Any
    next_avail: int = 0
    next_used: int = 0


@attrs.frozen
class Activation:
    """Everything that a device needs to become active; ``features`` is acked & offered."""

    generation: int
    features: int
    queues: tuple[QueueConfig, ...]


class Storage(Protocol):
    """What a device keeps on storage that other hosts may have too, and that one at a time may use: a disk's image.

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

    async def activate(self, activation: Activation, workers: trio.Nursery) -> None:
        """Start the queue workers with ``workers.start_soon``; every queue is processed once, notified or not.

        Cancellation leaves nothing running after ``stop``. :raises TrivmmError: → NEEDS_RESET."""

    async def stop(self) -> None:
        """Stop the workers; in-flight requests end and reach the used ring. Returns when nothing of this device
        touches guest memory any more. Keeps the queue positions: see ``positions``. Safe when not active."""

    def positions(self) -> tuple[tuple[int, int, int], ...]:
        """After ``stop``: (queue index, next_avail, next_used) of each queue of the last activation."""

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
