"""What a driver has set up, as plain data, and what a device allows: checked where one is taken over by the other.

A :class:`DriverSetup` comes from registers that a guest wrote, or from a state that a peer sent; both are as hostile.
At DRIVER_OK it is checked against the device's :class:`DeviceLimits` and goes to the device's actor; since all of it is
frozen, what the guest writes later does not reach it. What only this process has of a queue is kept apart, in
``trivmm.virtio.handles``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

from trivmm.state.virtio import NO_VECTOR, QueueState

__all__ = [
    "VERSION_1",
    "DeviceLimits",
    "DriverSetup",
    "Fault",
    "features_fit",
    "positions_fault",
    "queue_fault",
    "setup_fault",
]

VERSION_1: Final = 1 << 32
ALIGNMENT: Final = (("desc_gpa", 16), ("avail_gpa", 2), ("used_gpa", 4))  # virtio 1.2 section 2.7


@attrs.frozen
class DeviceLimits:
    """``features`` offered, the largest size of each queue, and how many interrupt vectors there are."""

    features: int
    queue_sizes: tuple[int, ...]
    vectors: int


@attrs.frozen
class DriverSetup:
    """``features`` as the driver acknowledged them; every queue of the device, enabled or not."""

    features: int
    queues: tuple[QueueState, ...]

    def enabled(self) -> Iterator[tuple[int, QueueState]]:
        """(index, queue) of those that the driver uses."""
        return ((index, queue) for index, queue in enumerate(self.queues) if queue.enabled)


@attrs.frozen
class Fault:
    """What is wrong: ``field`` (a path below the setup), what it is and what belongs there."""

    field: str
    value: object
    wanted: str

    def __str__(self) -> str:
        return f"{self.field} is {self.value}, not {self.wanted}"


def features_fit(features: int, limits: DeviceLimits) -> bool:
    """A legal subset of the offer that takes VERSION_1 (virtio 1.2 sections 2.2 and 6.1)."""
    return not features & ~limits.features and bool(features & VERSION_1)


def queue_fault(index: int, queue: QueueState, limits: DeviceLimits) -> Fault | None:
    """What no register ever holds, whatever a driver writes."""
    where, most = f"queues[{index}]", limits.queue_sizes[index]
    if not 0 < queue.size <= most or queue.size & (queue.size - 1):
        return Fault(f"{where}.size", queue.size, f"a power of two up to {most}")
    if queue.vector >= limits.vectors and queue.vector != NO_VECTOR:
        return Fault(f"{where}.vector", queue.vector, f"below {limits.vectors}, or {NO_VECTOR}")
    return None


def setup_fault(setup: DriverSetup, limits: DeviceLimits) -> Fault | None:
    """Why a device can't work with this; None when it can, as far as registers tell: rings may lie outside of RAM."""
    if not features_fit(setup.features, limits):
        return Fault("features", setup.features, f"a subset of {limits.features} with VERSION_1")
    if len(setup.queues) != len(limits.queue_sizes):
        return Fault("queues", len(setup.queues), f"{len(limits.queue_sizes)} of them")
    for index, queue in enumerate(setup.queues):
        fault = queue_fault(index, queue, limits) or _ring_fault(index, queue)
        if fault is not None:
            return fault
    return None


def _ring_fault(index: int, queue: QueueState) -> Fault | None:
    if not queue.enabled:
        return _position_fault(index, queue)
    for field, alignment in ALIGNMENT:
        gpa = getattr(queue, field)
        if gpa % alignment:
            return Fault(f"queues[{index}].{field}", gpa, f"a multiple of {alignment} (virtio 1.2 section 2.7)")
    if (queue.next_avail - queue.next_used) & 0xFFFF > queue.size:
        return Fault(f"queues[{index}].next_avail", queue.next_avail, f"at most {queue.size} after next_used")
    return None


def positions_fault(setup: DriverSetup) -> Fault | None:
    """Of a device that does not work: none of its queues has come anywhere."""
    faults = (_position_fault(index, queue) for index, queue in enumerate(setup.queues))
    return next((fault for fault in faults if fault is not None), None)


def _position_fault(index: int, queue: QueueState) -> Fault | None:
    for field in ("next_avail", "next_used"):
        if getattr(queue, field):
            return Fault(f"queues[{index}].{field}", getattr(queue, field), "0: no device works on this queue")
    return None
