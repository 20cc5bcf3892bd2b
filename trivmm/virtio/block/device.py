"""virtio-blk (virtio 1.2 section 5.2): an image as a disk."""

from __future__ import annotations

import errno
import struct
from typing import Annotated, Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.config import MAX_SERIAL, DiskConfig
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.values import U64, Exactly
from trivmm.virtio.block.counts import BlockCounts
from trivmm.virtio.block.formats import open_image
from trivmm.virtio.block.geometry import SECTOR, Geometry
from trivmm.virtio.device import RING_FEATURES, DeviceDescription, WorkerDevice
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.queue.limiter import make_limiter

__all__ = ["BlockDevice"]

F_SIZE_MAX: Final = 1 << 1
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

MAX_QUEUES: Final = 16  # worker threads a disk; more than any guest here has vCPUs
MIN_QUEUE_SIZE, MAX_QUEUE_SIZE = 4, 1024  # a request is a header, a segment of data and a status at least
TOLD_AGAIN_NS: Final = 60 * 10**9  # an I/O error of the same kind; as ffi/block.h has it for one worker
OPERATIONS: Final = {
    lib.TV_BLOCK_READ: "read",
    lib.TV_BLOCK_WRITE: "write",
    lib.TV_BLOCK_FLUSH: "flush",
    lib.TV_BLOCK_DISCARD: "discard",
    lib.TV_BLOCK_WRITE_ZEROES: "write-zeroes",
}
# Section 5.2.4: capacity, size_max, seg_max; geometry; blk_size; topology; writeback, num_queues; max_discard_sectors,
# max_discard_seg, discard_sector_alignment; max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
CONFIG: Final = struct.Struct("<QII HBB I BBHI BxH III IIB3x")


@attrs.frozen
class BlockDescription(DeviceDescription):
    """``identity`` is what GET_ID answers."""

    sectors: U64
    identity: Annotated[bytes, Exactly(MAX_SERIAL)]
    geometry: Geometry


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
        self._config = config
        self._limiter = make_limiter(config.rate_limiter_config)
        self.image = open_image(config, lock=lock)
        self.storage = self.image
        self.queue_sizes = (size,) * config.num_queues
        self.features = RING_FEATURES | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        if config.readonly:
            self.features |= F_RO
        elif self.image.can_clear:
            self.features |= F_WRITE_ZEROES | (F_DISCARD if config.sparse else 0)
        if config.num_queues > 1:
            self.features |= F_MQ
        identity = self.image.identity if config.serial is None else config.serial
        self._id = identity.encode(errors="replace")[:MAX_SERIAL].ljust(MAX_SERIAL, b"\0")
        self._sectors, self._geometry = self.image.sectors, self.image.geometry
        self._counted = BlockCounts()  # of the workers that have ended
        self._told: dict[tuple[int, int], int] = {}  # when, of each kind of I/O error; workers forget it at a reset

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_block *")
        native.image = self.image.native
        native.limiter = self._limiter
        native.features = features
        native.readonly = self.image.readonly
        native.keeps_room = not self._config.sparse
        native.no_ring = self._config.disable_io_uring
        native.sectors = self._sectors
        ffi.memmove(native.id, self._id, len(self._id))
        lib.tv_block_init(native)
        return native

    def read_config(self, offset: int, size: int) -> bytes:
        """``size_max`` is what a worker moves between two looks at its stop word, ``seg_max`` what a queue holds beside
        header and status: together the longest request of a driver that keeps to them."""
        told = self._geometry
        seg_max = self.queue_sizes[0] - 2
        clears = (lib.TV_BLOCK_CLEAR_SECTORS, lib.TV_BLOCK_CLEAR_SEGMENTS)
        discards = (*clears, told.discard // SECTOR) if self.features & F_DISCARD else (0, 0, 0)
        zeroes = (*clears, bool(self.features & F_DISCARD)) if self.features & F_WRITE_ZEROES else (0, 0, 0)
        blocks = (told.exponent, 0, told.minimum // told.logical, told.optimal // told.logical)
        space = CONFIG.pack(
            *(self._sectors, lib.TV_BLOCK_PIECE, seg_max, 0, 0, 0, told.logical, *blocks),
            *(1, len(self.queue_sizes), *discards, *zeroes),
        )
        return space[offset : offset + size].ljust(size, b"\xff")

    def describe(self) -> BlockDescription:
        plain = super().describe()
        told = (self._sectors, self._id, self._geometry)
        return BlockDescription(plain.type, plain.features, plain.queue_sizes, *told)

    def become(self, described: Any) -> None:
        """Capacity, identity and geometry are the sender's: this image may be a longer one, with another inode."""
        super().become(described)
        if described.sectors > self.image.sectors:
            raise ConfigError(
                "disks.path",
                self.image.path,
                f"has {self.image.sectors} sectors, the sender's disk has {described.sectors}",
                "give the same image, or a full copy of it",
            )
        self._sectors, self._id, self._geometry = described.sectors, described.identity, described.geometry
        self.image.promised = described.sectors * SECTOR

    def set_capacity(self, capacity: int) -> None:
        """Make the image so many bytes long. Waits for its storage: in a thread. :meth:`capacity_changed` goes on.

        :raises ConfigError: it can't be."""
        if capacity % SECTOR or not capacity:
            raise ConfigError("desired_size", capacity, "not whole sectors", f"give a multiple of {SECTOR}")
        if self.image.readonly:
            raise ConfigError("desired_size", capacity, "the disk is read-only", "leave it as it is")
        self.image.resize(capacity)

    def capacity_changed(self) -> None:
        """The driver is told what the image holds now (section 5.2.5). In the trio thread."""
        self._sectors = self.image.sectors
        self.image.promised = self._sectors * SECTOR
        for worker in self._workers:
            lib.tv_block_set_sectors(worker.native, self._sectors)
        self.on_config_change()

    def _news(self, worker: QueueWorker) -> None:
        """I/O errors of the image: one event for each kind, and again when a minute has passed (ffi/block.h), whichever
        queue has it and however often the driver resets the disk."""
        fault = ffi.new("struct tv_block_fault *")
        while lib.tv_block_next_fault(worker.native, fault):
            kind = fault.op, fault.error
            if kind in self._told and fault.at_ns - self._told[kind] <= TOLD_AGAIN_NS:
                continue
            self._told[kind] = fault.at_ns
            error = errno.errorcode.get(fault.error, str(fault.error))
            self.on_event("io-error", operation=OPERATIONS[fault.op], error=error)

    def _count(self, worker: QueueWorker) -> None:
        self._counted += BlockCounts.of(worker.native)

    def counters(self) -> dict[str, int]:
        """Over all queues, since the machine was built. See :meth:`BlockCounts.shown`."""
        counted = sum((BlockCounts.of(worker.native) for worker in self._workers), self._counted)
        return counted.shown() | self.image.counters()

    def close(self) -> None:
        self.image.close()
