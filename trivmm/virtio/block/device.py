"""virtio-blk (virtio 1.2 section 5.2): an image as a disk."""

from __future__ import annotations

import struct
from typing import Annotated, Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.config import DiskConfig
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.values import U64, Exactly
from trivmm.virtio.block.counts import BlockCounts
from trivmm.virtio.block.file import SECTOR
from trivmm.virtio.block.formats import open_image
from trivmm.virtio.device import RING_FEATURES, DeviceDescription, WorkerDevice
from trivmm.virtio.queue import QueueWorker

__all__ = ["BlockDevice"]

F_SIZE_MAX: Final = 1 << 1
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_MQ: Final = 1 << 12

MAX_QUEUES: Final = 16  # worker threads a disk; more than any guest here has vCPUs
MIN_QUEUE_SIZE, MAX_QUEUE_SIZE = 4, 1024  # a request is a header, a segment of data and a status at least
ID_BYTES: Final = 20  # section 5.2.6.2: what GET_ID gives
CONFIG: Final = struct.Struct("<QII HBB I BBH I BBH")  # section 5.2.4 up to num_queues and padding


@attrs.frozen
class BlockDescription(DeviceDescription):
    """``identity`` is what GET_ID answers."""

    sectors: U64
    identity: Annotated[bytes, Exactly(ID_BYTES)]


class BlockDevice(WorkerDevice):
    """``lock`` False is for a destination: it takes the image's lock at COMMIT."""

    device_type = 2
    description_type = BlockDescription

    def __init__(self, config: DiskConfig, memory: GuestMemory, name: str, *, lock: bool = True) -> None:
        """:raises ConfigError: naming what is wrong with the disk."""
        super().__init__(config.id or name, memory)
        if not 1 <= config.num_queues <= MAX_QUEUES:
            raise ConfigError("disks.num_queues", config.num_queues, "out of range", f"give 1 to {MAX_QUEUES}")
        size = config.queue_size
        if not MIN_QUEUE_SIZE <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            limits = f"{MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"
            raise ConfigError("disks.queue_size", size, "not a queue size", f"give a power of two, {limits}")
        self.image = open_image(config, lock=lock)
        self.storage = self.image
        self.queue_sizes = (size,) * config.num_queues
        self.features = RING_FEATURES | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        if config.readonly:
            self.features |= F_RO
        if config.num_queues > 1:
            self.features |= F_MQ
        self._id = self._identity(config.serial)
        self._sectors = self.image.sectors
        self._counted = BlockCounts()  # of the workers that have ended

    def _identity(self, serial: str | None) -> bytes:
        """What GET_ID answers: the configured serial, or something stable about the file."""
        text = self.image.identity if serial is None else serial
        return text.encode(errors="replace")[:ID_BYTES].ljust(ID_BYTES, b"\0")

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_block *")
        native.image = self.image.native
        native.readonly = self.image.readonly
        native.write_through = not features & F_FLUSH
        native.sectors = self._sectors
        ffi.memmove(native.id, self._id, len(self._id))
        lib.tv_block_init(native)
        return native

    def read_config(self, offset: int, size: int) -> bytes:
        """``size_max`` is what a worker moves between two looks at its stop word, ``seg_max`` what a queue holds beside
        header and status: together the longest request of a driver that keeps to them."""
        size_max, seg_max = int(lib.TV_BLOCK_PIECE), self.queue_sizes[0] - 2
        space = CONFIG.pack(self._sectors, size_max, seg_max, 0, 0, 0, SECTOR, 0, 0, 0, 0, 0, 0, len(self.queue_sizes))
        return space[offset : offset + size].ljust(size, b"\xff")

    def describe(self) -> BlockDescription:
        plain = super().describe()
        return BlockDescription(plain.type, plain.features, plain.queue_sizes, self._sectors, self._id)

    def become(self, described: Any) -> None:
        """Capacity and identity are the sender's: this image may be a longer one, with another inode."""
        super().become(described)
        if described.sectors > self.image.sectors:
            raise ConfigError(
                "disks.path",
                self.image.path,
                f"has {self.image.sectors} sectors, the sender's disk has {described.sectors}",
                "give the same image, or a full copy of it",
            )
        self._sectors, self._id = described.sectors, described.identity
        self.image.promised = described.sectors * SECTOR

    def _count(self, worker: QueueWorker) -> None:
        self._counted += BlockCounts.of(worker.native)

    def counters(self) -> dict[str, int]:
        """Over all queues, since the machine was built. See :meth:`BlockCounts.shown`."""
        return sum((BlockCounts.of(worker.native) for worker in self._workers), self._counted).shown() | (
            self.image.counters()
        )

    def close(self) -> None:
        self.image.close()
