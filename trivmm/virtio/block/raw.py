"""Raw images: the sectors of a file or block device, as they are."""

from __future__ import annotations

import os
from typing import ClassVar, Final

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError, reason_of
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.block.geometry import MAX_BLOCK, geometry_of
from trivmm.virtio.block.image import Image

__all__ = ["RawImage"]

MEMORY: Final = frozenset({"tmpfs", "ramfs", "hugetlbfs"})  # file systems that are nothing but page cache
UNKNOWN_ALIGN: Final = 4096  # where the kernel does not say: no medium wants more


class RawImage(Image):
    image_type: ClassVar[str] = "Raw"

    def __init__(self, file: ImageFile) -> None:
        """``file`` is its own from now on. :raises ConfigError: a block device that does not answer."""
        super().__init__([file])
        self.owner = ffi.new("struct tv_raw *")
        self.owner.block_device = file.is_block_device
        self.owner.in_memory = not file.is_block_device and _file_system(file.fd) in MEMORY
        # There is no past the page cache where there is nothing behind it.
        direct_fd = -1 if self.owner.in_memory else file.direct_fd
        self.owner.fd, self.owner.direct_fd = file.fd, direct_fd
        try:
            self.geometry = geometry_of(file.fd)
        except OSError as error:
            raise ConfigError("disks.path", file.path, reason_of(error), "look after its storage") from error
        if direct_fd >= 0:
            self.owner.memory_align, self.owner.block_align = self._alignment(direct_fd)
        lib.tv_raw_init(self.owner)
        self.native = ffi.addressof(self.owner.image)
        self.capacity = self.promised = file.size

    def _alignment(self, fd: int) -> tuple[int, int]:
        """What direct I/O wants of memory and of offsets, bytes."""
        memory, block = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        found = lib.tv_raw_alignment(fd, memory, block)
        if found < 0 or not memory[0] or not block[0]:
            known = self.geometry.logical if self.owner.block_device else UNKNOWN_ALIGN
            return known, known
        return min(int(memory[0]), MAX_BLOCK), min(int(block[0]), MAX_BLOCK)

    def resize(self, capacity: int) -> None:
        self.files[0].resize(capacity)
        self.capacity = capacity

    def _reread(self) -> None:
        self.capacity = self.files[0].size


def _file_system(fd: int) -> str:
    """The name of the file system that an open file lies on, or "" where /proc does not say."""
    about = os.fstat(fd)
    device = f"{os.major(about.st_dev)}:{os.minor(about.st_dev)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                fields, _, kind = line.partition(" - ")
                if fields.split()[2] == device:
                    return kind.split()[0]
    except (OSError, IndexError):
        pass
    return ""
