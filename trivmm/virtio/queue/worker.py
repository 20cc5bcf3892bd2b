"""A queue worker: one task around one long-lived C thread (``ffi/worker.c``) that serves some virtqueues of a device.

Started by a device's ``activate`` in the device nursery, ended by :meth:`QueueWorker.request_stop` (a device's
``stop``). A queue that breaks is told of and left alone; the others go on. The task shields itself, since the order in
which a machine ends is built, not inherited; the kicker of its thread is an eventfd that the C loop polls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import QueueState
from trivmm.virtio.handles import QueueHandle

__all__ = ["BROKEN", "F_EVENT_IDX", "F_INDIRECT_DESC", "F_VERSION_1", "QueueWorker"]

F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32

BROKEN: Final = {
    lib.TV_BROKEN_AVAIL_JUMP: "avail index runs further ahead than the queue is long",
    lib.TV_BROKEN_HEAD: "head index outside the descriptor table",
    lib.TV_BROKEN_NEXT: "next index outside the descriptor table",
    lib.TV_BROKEN_LOOP: "descriptor chain longer than the queue",
    lib.TV_BROKEN_ADDRESS: "buffer outside guest RAM",
    lib.TV_BROKEN_INDIRECT: "bad indirect table",
    lib.TV_BROKEN_ORDER: "readable buffer after a writable one",
    lib.TV_BROKEN_TOO_LONG: "chain of more than 1 GiB",
    lib.TV_BROKEN_REQUEST: "request without room for its answer",
}


class QueueWorker:
    """``native`` is the device's C struct, whose first member is ``struct tv_worker``; its own fields are set and
    its ``init`` called by the device. ``on_broken`` is called in the trio thread, once for each queue that breaks,
    ``on_news`` there whenever the C thread is back."""

    def __init__(
        self,
        name: str,
        native: Any,
        memory: GuestMemory,
        queues: Mapping[int, QueueState],
        handles: Sequence[QueueHandle],
        features: int,
        on_broken: Callable[[str], None],
        on_news: Callable[[QueueWorker], None] = lambda worker: None,
    ) -> None:
        """``queues`` and ``handles`` by index. :raises ValueError: when a queue's rings don't lie in RAM."""
        self.name = name
        self.native = native
        self.done = trio.Event()
        self._on_broken = on_broken
        self._on_news = on_news
        self._memory = memory
        self._kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._queues = queues
        self._handles = handles  # kept alive as long as C may use their interrupts
        worker = self._worker = native.worker
        worker.kick_fd = self._kick_fd
        for index, queue in queues.items():
            ring = self._ring(index, queue, features)
            if lib.tv_worker_add(ffi.addressof(worker), ring, handles[index].doorbell) < 0:
                self.close()
                raise ValueError(f"{name}: rings of queue {index} outside guest RAM or misaligned")
        self._told: set[int] = set()  # queues that broke

    def _ring(self, index: int, queue: QueueState, features: int) -> Any:
        ring = ffi.new("struct tv_queue *")
        ring.memory, ring.irq, ring.index = self._memory.native, self._handles[index].irq, index
        ring.desc_gpa, ring.avail_gpa, ring.used_gpa = queue.desc_gpa, queue.avail_gpa, queue.used_gpa
        ring.size, ring.next_avail, ring.next_used = queue.size, queue.next_avail, queue.next_used
        ring.event_idx = bool(features & F_EVENT_IDX)
        ring.indirect = bool(features & F_INDIRECT_DESC)
        return ring

    @property
    def _rings(self) -> list[Any]:
        return [self._worker.queues[at] for at in range(self._worker.queue_count)]

    @property
    def queues(self) -> dict[int, QueueState]:
        """Its queues by index, each as far as it has come; valid once ``done``."""
        return {
            int(ring.index): attrs.evolve(
                self._queues[ring.index], next_avail=int(ring.next_avail), next_used=int(ring.next_used)
            )
            for ring in self._rings
        }

    def request_stop(self) -> None:
        """Idempotent; before the start too. ``done`` says when it has taken effect."""
        if self._kick_fd >= 0:
            lib.tv_worker_stop(ffi.addressof(self._worker))

    async def run(self) -> None:
        """Start with ``start_soon``; ``done`` is set at the end, whatever happens."""
        self._memory.hold()  # a thread stuck in the kernel keeps guest memory until it returns
        try:
            with trio.CancelScope(shield=True):
                more = True
                while more:
                    more = await trio.to_thread.run_sync(
                        lib.tv_worker_run,
                        ffi.addressof(self._worker),
                        thread_name=self.name,
                        limiter=trio.CapacityLimiter(1),
                        abandon_on_cancel=False,
                    )
                    if more:
                        self._tell_broken()
                    self._on_news(self)
        finally:
            self.done.set()
            self.close()
            self._memory.close()

    def _tell_broken(self) -> None:
        for ring in self._rings:
            if ring.broken and ring.index not in self._told:
                self._told.add(ring.index)
                self._on_broken(f"queue {ring.index}: {BROKEN[ring.broken]}")

    def close(self) -> None:
        fd, self._kick_fd = self._kick_fd, -1
        if fd >= 0:
            os.close(fd)
