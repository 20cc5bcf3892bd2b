"""virtio-rng (virtio 1.2 section 5.4): entropy from a file or device of the host."""

from __future__ import annotations

import os
import stat
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.config import RngConfig
from trivmm.errors import ConfigError, reason_of
from trivmm.memory.guest import GuestMemory
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.queue import QueueWorker

__all__ = ["RngDevice"]

QUEUE_SIZE: Final = 256


class RngDevice(WorkerDevice):
    """One request queue. Its source is opened once and read without blocking."""

    device_type = 4
    features = RING_FEATURES
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, config: RngConfig, memory: GuestMemory, name: str = "__rng") -> None:
        """:raises ConfigError: when the source can't be read."""
        super().__init__(config.id or name, memory)
        try:
            self._fd = os.open(config.src, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "rng.src", config.src, f"cannot open it ({reason_of(error)})", "give /dev/urandom"
            ) from error
        about = os.fstat(self._fd)
        empty = stat.S_ISREG(about.st_mode) and about.st_size == 0
        if empty or stat.S_ISDIR(about.st_mode):
            self.close()
            what = "is empty: it has no entropy to give" if empty else "is a directory"
            raise ConfigError("rng.src", config.src, what, "give /dev/urandom")
        self._bytes = 0
        self._errors = 0

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_rng *")
        native.source_fd = self._fd
        lib.tv_rng_init(native)
        return native

    def _count(self, worker: QueueWorker) -> None:
        self._bytes += int(worker.native.bytes)
        self._errors += int(worker.native.errors)

    def counters(self) -> dict[str, int]:
        live = [worker.native for worker in self._workers]
        return {
            "bytes": self._bytes + sum(int(native.bytes) for native in live),
            "source_errors": self._errors + sum(int(native.errors) for native in live),
        }

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
