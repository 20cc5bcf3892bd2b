"""The port between three parts that must not know each other: transport, lifecycle and device.

- The *transport* (``virtio/pci``) turns a guest's register accesses into calls. It runs on vCPU threads.
- The *lifecycle* (``nursery/activation.py``, one per device) owns the device status, the generation and the
  barrier; its actor runs in the device nursery and lives as long as the VM.
- The *device* (``virtio/rng``, ``virtio/block``) does the work of its queues.

All values here are plain data or protocols; nothing imports trio at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from trivmm.bus.ticket import Ticket

if TYPE_CHECKING:
    import trio

__all__ = [
    "ACKNOWLEDGE",
    "DRIVER",
    "DRIVER_OK",
    "FAILED",
    "FEATURES_OK",
    "NEEDS_RESET",
    "Activation",
    "DeviceBackend",
    "DeviceStatusPort",
    "QueueConfig",
    "TransportPort",
]

# Device status bits, virtio 1.2 section 2.1.
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64
FAILED = 128


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


class DeviceBackend(Protocol):
    """A device as its lifecycle and transport see it. All ``async`` methods run in the device nursery's actor."""

    name: str  # unique in the VM and stable: "_disk0", "__rng"
    device_type: int  # virtio 1.2 section 5: 2 block, 4 entropy
    features: int  # offered bits, VERSION_1 included
    queue_sizes: tuple[int, ...]  # maximum size of each queue
    config_size: int

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

    def save(self) -> dict[str, Any]:
        """After ``stop``: what is the device's own and not in queues or transport; JSON-able."""

    def load(self, state: dict[str, Any]) -> None: ...

    def release_locks(self) -> None:
        """Give up host-side exclusivity (image locks), for a migration's COMMIT."""

    def take_locks(self) -> None:
        """:raises ConfigError: when another process has them."""

    def describe(self) -> dict[str, Any]:
        """What the driver was told of the device and may count on wherever it moves to; JSON-able."""

    def become(self, described: dict[str, Any]) -> None:
        """Before its first activation: be the device that a sender described.

        :raises TrivmmError: where it can't, naming what differs."""

    def counters(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class TransportPort(Protocol):
    """What the lifecycle asks of the transport. Called in the trio thread."""

    def reset_registers(self) -> bool:
        """The reset is complete: queue and feature registers take their reset values (section 4.1.4.3.1). False when
        a vCPU is at them this moment, perhaps waiting for the kernel: try again soon."""

    def signal_config_change(self) -> None:
        """Raise the configuration-change interrupt (after NEEDS_RESET is set)."""

    def bump_config_generation(self) -> None: ...


class DeviceStatusPort(Protocol):
    """What the transport asks of the lifecycle. Called from vCPU threads, never blocks."""

    def read_status(self) -> int: ...

    def write_status(
        self, value: int, accept_features: Callable[[], bool], snapshot: Callable[[int], Activation]
    ) -> Ticket | None:
        """A guest's write of device_status.

        ``accept_features()`` says whether the acked features are a legal subset (asked at FEATURES_OK);
        ``snapshot(generation)`` takes the validated private copy at DRIVER_OK and raises ValueError where a
        queue's registers make no sense. The ticket, if any, is where the writing vCPU must park.
        """
