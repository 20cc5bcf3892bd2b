"""What a toy does: one queue of buffers, filled from a file by the C of virtio-rng."""

from __future__ import annotations

import os
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError, reason_of
from trivmm.memory.guest import GuestMemory
from trivmm.testing.toy.config import ToyConfig
from trivmm.virtio.device import RING_FEATURES, WorkerDevice

__all__ = ["ToyDevice"]

MAGIC: Final = b"toy!"


class ToyDevice(WorkerDevice):
    device_type = 63
    features = RING_FEATURES
    queue_sizes = (64,)

    def __init__(self, config: ToyConfig, memory: GuestMemory, name: str) -> None:
        """:raises ConfigError: when the source can't be read."""
        super().__init__(name, memory)
        try:
            self._fd = os.open(config.src, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise ConfigError("toys.src", config.src, f"cannot open it ({reason_of(error)})", "give a file") from error

    def read_config(self, offset: int, size: int) -> bytes:
        return MAGIC[offset : offset + size].ljust(size, b"\xff")

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_rng *")
        native.source_fd = self._fd
        lib.tv_rng_init(native)
        return native

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
