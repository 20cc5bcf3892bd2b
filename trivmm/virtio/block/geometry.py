"""What a disk tells its driver of the medium behind it: block sizes, and what a discard can give back."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Annotated, Final

import attrs

from trivmm.values import Within

__all__ = ["MAX_BLOCK", "Geometry", "geometry_of"]

SECTOR: Final = 512
MAX_BLOCK: Final = 1 << 16  # the largest logical block that Linux has, and what a physical one is cut to
MAX_DISCARD: Final = 1 << 30  # bytes
BLKSSZGET: Final = 0x1268
BLKIOMIN: Final = 0x1278
BLKIOOPT: Final = 0x1279
BLKPBSZGET: Final = 0x127B


@attrs.frozen
class Geometry:
    """Bytes. ``logical`` and ``physical`` are powers of two; ``minimum`` and ``optimal`` of an I/O are 0 where nobody
    knows; ``discard`` is what a hole has at least."""

    logical: Annotated[int, Within(SECTOR, MAX_BLOCK)] = SECTOR
    physical: Annotated[int, Within(SECTOR, MAX_BLOCK)] = SECTOR
    minimum: Annotated[int, Within(0, 0xFFFF * SECTOR)] = 0
    optimal: Annotated[int, Within(0, 0xFFFFFFFF)] = 0
    discard: Annotated[int, Within(SECTOR, MAX_DISCARD)] = SECTOR

    @property
    def exponent(self) -> int:
        """Logical blocks in a physical one, as a power of two."""
        return max(0, self.physical.bit_length() - self.logical.bit_length())


def geometry_of(fd: int) -> Geometry:
    """Of a raw file or block device. A file has sectors, whatever it lies on: what is in it was made elsewhere.

    :raises OSError: a block device does not answer."""
    about = os.fstat(fd)
    if not stat.S_ISBLK(about.st_mode):
        block = _fitting(about.st_blksize)
        return Geometry(physical=block, discard=block)
    logical = _fitting(_asked(fd, BLKSSZGET))
    physical = max(logical, _fitting(_asked(fd, BLKPBSZGET)))
    minimum = min(_asked(fd, BLKIOMIN), 0xFFFF * SECTOR)
    return Geometry(logical, physical, minimum, _asked(fd, BLKIOOPT), _discard_granularity(about.st_rdev, logical))


def _asked(fd: int, request: int) -> int:
    answer = bytearray(4)
    fcntl.ioctl(fd, request, answer)
    return int.from_bytes(answer, "little")


def _fitting(size: int) -> int:
    """The next power of two below, within limits."""
    return min(max(1 << max(size, 1).bit_length() - 1, SECTOR), MAX_BLOCK)


def _discard_granularity(rdev: int, logical: int) -> int:
    """As the kernel says in /sys; a partition's is that of its disk."""
    device = Path(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}")
    for folder in (device, device / ".."):
        try:
            found = int((folder / "queue/discard_granularity").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        return min(max(found, logical), MAX_DISCARD)
    return logical
