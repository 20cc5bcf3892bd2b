"""The file behind a disk: opening it without ever creating or truncating, its size, and its lock.

The lock is an *open file description* lock over the whole file: a write lock for a writable disk, a read lock for a
read-only one. It belongs to the descriptor, not the process, so two VMs in one process exclude each other too, and
the kernel drops it when the process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

from trivmm.config import DiskConfig
from trivmm.errors import ConfigError

__all__ = ["SECTOR", "Image", "check_given_once"]

SECTOR: Final = 512
BLKGETSIZE64: Final = 0x80081272
F_OFD_SETLK: Final = 37
FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid


class Image:
    """``fd`` is open from construction to :meth:`close`."""

    def __init__(self, path: str, *, readonly: bool, lock: bool) -> None:
        """:raises ConfigError: naming ``disks.path`` and what is wrong with it."""
        self.path = path
        self.readonly = readonly
        self.locked = False
        flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self.fd = os.open(path, flags)
        except (OSError, ValueError) as error:
            raise self._mistake(error) from error
        try:
            self.size = self._measure()
            os.set_blocking(self.fd, True)
            if lock:
                self.take_lock()
        except BaseException:
            self.close()
            raise

    def _mistake(self, error: OSError | ValueError) -> ConfigError:
        number = getattr(error, "errno", None)
        why = getattr(error, "strerror", None) or str(error)
        remedy = "give a raw image file"
        if number == errno.ENOENT:
            remedy = "create it (truncate -s 1G PATH), or correct the path"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make it readable and writable, or give readonly=on"
        return ConfigError("disks.path", self.path, why, remedy)

    def _measure(self) -> int:
        mode = os.fstat(self.fd).st_mode
        if stat.S_ISREG(mode):
            return os.fstat(self.fd).st_size
        if stat.S_ISBLK(mode):
            size = bytearray(8)
            fcntl.ioctl(self.fd, BLKGETSIZE64, size)
            return int.from_bytes(size, "little")
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise ConfigError("disks.path", self.path, kind, "give a raw image file")

    @property
    def sectors(self) -> int:
        """Whole sectors; the bytes of an incomplete last one are out of the guest's reach."""
        return self.size // SECTOR

    def take_lock(self) -> None:
        """Idempotent. :raises ConfigError: when somebody else has it."""
        if self.locked:
            return
        kind = fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    "disks.path", self.path, "in use by another VM or program", "stop that one, or give a copy"
                ) from error
            raise ConfigError(
                "disks.path", self.path, f"cannot lock it ({error.strerror})", "give a local file"
            ) from error
        self.locked = True

    def release_lock(self) -> None:
        """Idempotent."""
        if self.locked:
            fcntl.fcntl(self.fd, F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
            self.locked = False

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            self.locked = False


def check_given_once(disks: Sequence[DiskConfig]) -> None:
    """Two disks on one image would spoil each other's data; the lock would call that "another VM".

    :raises ConfigError: naming both, unless both only read."""
    seen: dict[tuple[object, ...], int] = {}
    for index, disk in enumerate(disks):
        try:
            found = os.stat(disk.path)
        except (OSError, ValueError):  # opening it says what is wrong
            continue
        which = ("device", found.st_rdev) if stat.S_ISBLK(found.st_mode) else ("file", found.st_dev, found.st_ino)
        first = seen.setdefault(which, index)
        if first != index and not (disk.readonly and disks[first].readonly):
            raise ConfigError(
                f"disks[{index}].path",
                disk.path,
                f"the same image as disks[{first}].path",
                "give each disk its own, or give both readonly=on",
            )
