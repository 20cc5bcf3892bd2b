"""Split virtqueues: the workers that serve them, around the ring walker in ``ffi/ring.c``."""

from trivmm.virtio.queue.worker import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, QueueWorker

__all__ = ["F_EVENT_IDX", "F_INDIRECT_DESC", "F_VERSION_1", "QueueWorker"]
