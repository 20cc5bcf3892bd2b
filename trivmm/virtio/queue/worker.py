"""A queue worker: one task around one long-lived C thread that serves one virtqueue.

Started by a device's ``activate`` in the device nursery, ended by :meth:`QueueWorker.request_stop` (a device's
``stop``) or by breaking its queue. The task shields itself, since the order in which a machine ends is built, not
inherited; the kicker of its thread is an eventfd that the C loop polls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

import trio

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.virtio.port import QueueConfig

__all__ = ["BROKEN", "F_EVENT_IDX", "F_INDIRECT_DESC", "F_VERSION_1", "QueueWorker"]

F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32

BROKEN: Final = {
    1: "avail index runs further ahead than the queue is long",
    2: "head index outside the descriptor table",
    3: "next index outside the descriptor table",
    4: "descriptor chain longer than the queue",
    5: "buffer outside guest RAM",
    6: "bad indirect table",
    7: "readable buffer after a writable one",
    8: "chain of more than 1 GiB",
    9: "request without room for its answer",
}


class QueueWorker:
    """``native`` is the device's C struct, whose first member is ``struct tv_worker``; its own fields are set and
    its ``init`` called by the device. ``on_broken`` is called in the trio thread."""

    def __init__(
        self,
        name: str,
        native: Any,
        memory: GuestMemory,
        queue: QueueConfig,
        features: int,
        on_broken: Callable[[str], None],
    ) -> None:
        """:raises ValueError: when the queue's rings don't lie in RAM."""
        self.name = name
        self.native = native
        self.index = queue.index
        self.done = trio.Event()
        self._on_broken = on_broken
        self._memory = memory
        self._kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        worker = self._worker = native.worker
        worker.doorbell_fd, worker.kick_fd = queue.doorbell, self._kick_fd
        ring = worker.queue
        ring.memory, ring.irq = memory.native, queue.irq
        ring.desc_gpa, ring.avail_gpa, ring.used_gpa = queue.desc_gpa, queue.avail_gpa, queue.used_gpa
        ring.size, ring.next_avail, ring.next_used = queue.size, queue.next_avail, queue.next_used
        ring.event_idx = bool(features & F_EVENT_IDX)
        ring.indirect = bool(features & F_INDIRECT_DESC)
        self._irq = queue.irq  # kept alive as long as C may use it
        if lib.tv_queue_open(ffi.addressof(ring)):
            self.close()
            raise ValueError(f"{name}: rings outside guest RAM or misaligned")

    @property
    def position(self) -> tuple[int, int, int]:
        """(queue index, next_avail, next_used); valid once ``done``."""
        ring = self._worker.queue
        return self.index, int(ring.next_avail), int(ring.next_used)

    def request_stop(self) -> None:
        """Idempotent; before the start too. ``done`` says when it has taken effect."""
        if self._kick_fd >= 0:
            lib.tv_worker_stop(ffi.addressof(self._worker))

    async def run(self) -> None:
        """Start with ``start_soon``; ``done`` is set at the end, whatever happens."""
        self._memory.hold()  # a thread stuck in the kernel keeps guest memory until it returns
        try:
            with trio.CancelScope(shield=True):
                broken = await trio.to_thread.run_sync(
                    lib.tv_worker_run,
                    ffi.addressof(self._worker),
                    thread_name=self.name,
                    limiter=trio.CapacityLimiter(1),
                    abandon_on_cancel=False,
                )
        finally:
            self.done.set()
            self.close()
            self._memory.close()
        if broken:
            why = BROKEN.get(int(self._worker.queue.broken), "broken ring")
            self._on_broken(f"queue {self.index}: {why}")

    def close(self) -> None:
        fd, self._kick_fd = self._kick_fd, -1
        if fd >= 0:
            os.close(fd)
