"""A file or block device behind a disk: opening it without ever creating or truncating, its size, and its lock.

The lock is an *open file description* lock over the whole file: a write lock for a writable disk, a read lock for a
read-only one. It belongs to the descriptor, not the process, so two VMs in one process exclude each other too, and
the kernel drops it when the process dies, however it dies.

An image on storage that two hosts have (a block device over a network, a shared file system) has a page cache on each.
:meth:`ImageFile.flush` before the lock is given up, and :meth:`ImageFile.refresh` after it was taken, make them one.
Flushes have a descriptor of their own: the kernel tells of a write that it could not do once per open file, and the
guest's next flush is to hear of it too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

from trivmm.errors import ConfigError, MigrationError, reason_of
from trivmm.virtio.block.geometry import SECTOR

__all__ = ["SECTOR", "ImageFile", "check_given_once"]

BLKGETSIZE64: Final = 0x80081272
BLKFLSBUF: Final = 0x1261  # write out and drop the page cache of a block device
F_OFD_SETLK: Final = 37
FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, len, pid


class ImageFile:
    """``fd`` is open from construction to :meth:`close`; ``sync_fd`` is :meth:`flush`'s; ``direct_fd`` is for I/O past
    the page cache, -1 unless it was asked for."""

    def __init__(
        self, path: str, *, readonly: bool, lock: bool, direct: bool = False, field: str = "disks.path"
    ) -> None:
        """:raises ConfigError: naming ``field`` and what is wrong with the file."""
        self.path = path
        self.field = field
        self.readonly = readonly
        self.sync_fd = self.direct_fd = -1
        self._lost: str | None = None  # why what the guest wrote may be lost
        self.fd = self._open()
        try:
            self.size = self._measure()
            self.sync_fd = self._open()
            if direct:
                self.direct_fd = self._open_direct()
            if not all(os.path.sameopenfile(self.fd, fd) for fd in self._fds[1:]):
                raise ConfigError(field, path, "was replaced in this moment", "leave it alone while a VM starts")
            for fd in self._fds:
                os.set_blocking(fd, True)
            if lock:
                self.take_lock()
        except BaseException:
            self.close()
            raise

    @property
    def _fds(self) -> list[int]:
        """Those that are open."""
        return [fd for fd in (self.fd, self.sync_fd, self.direct_fd) if fd >= 0]

    def _open_direct(self) -> int:
        try:
            return self._open(os.O_DIRECT)
        except ConfigError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno != errno.EINVAL:
                raise
            problem = f"{self.path} lies on a file system that has no direct I/O"
            raise ConfigError("disks.direct", True, problem, "leave it out") from cause

    def _open(self, more: int = 0) -> int:
        flags = (os.O_RDONLY if self.readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | more
        try:
            return os.open(self.path, flags)
        except (OSError, ValueError) as error:
            raise self._mistake(error) from error

    def _mistake(self, error: OSError | ValueError) -> ConfigError:
        number = getattr(error, "errno", None)
        why = reason_of(error)
        remedy = "give a raw image file"
        if number == errno.ENOENT:
            remedy = "create it (truncate -s 1G PATH), or correct the path"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "make it readable and writable, or give readonly=on"
        return ConfigError(self.field, self.path, why, remedy)

    def _measure(self) -> int:
        mode = os.fstat(self.fd).st_mode
        if stat.S_ISREG(mode):
            return os.fstat(self.fd).st_size
        if stat.S_ISBLK(mode):
            size = bytearray(8)
            fcntl.ioctl(self.fd, BLKGETSIZE64, size)
            return int.from_bytes(size, "little")
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise ConfigError(self.field, self.path, kind, "give a raw image file")

    def resize(self, size: int) -> None:
        """Of a file; a block device has the size that it has, which is looked at anew.

        :raises ConfigError: it can't be."""
        try:
            if not self.is_block_device:
                os.ftruncate(self.fd, size)
            self.size = self._measure()
        except OSError as error:
            raise ConfigError("desired_size", size, reason_of(error), "give a size that its storage has") from error
        if self.size < size:
            raise ConfigError("desired_size", size, f"the device has {self.size} bytes", "make the device larger first")

    @property
    def is_block_device(self) -> bool:
        return stat.S_ISBLK(os.fstat(self.sync_fd).st_mode)

    @property
    def identity(self) -> str:
        """Something stable about it, for GET_ID."""
        about = os.fstat(self.fd)
        return f"{about.st_dev:x}{about.st_rdev:x}{about.st_ino:x}"

    # --- the lock, and what goes with it: these may wait for the storage ---------------------------------------

    def take_lock(self) -> None:
        """Idempotent. :raises ConfigError: when somebody else has it."""
        kind = fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    self.field, self.path, "in use by another VM or program", "stop that one, or give a copy"
                ) from error
            raise ConfigError(
                self.field, self.path, f"cannot lock it ({error.strerror})", "give a local file"
            ) from error

    def release_lock(self) -> None:
        """Idempotent; after :meth:`close` too, which has given it up."""
        if self.fd >= 0:
            fcntl.fcntl(self.fd, F_OFD_SETLK, FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def flush(self) -> None:
        """What was written is on the storage when this returns, and nothing cached here.

        :raises MigrationError: it may be lost; said again at every later call."""
        try:
            if self._lost is None and not self.readonly:
                os.fdatasync(self.sync_fd)
            if self._lost is None:
                self._drop_cache()
        except OSError as error:
            self._lost = reason_of(error)
        if self._lost is not None:
            raise MigrationError(f"{self.field} = {self.path}: what the guest wrote can't be flushed ({self._lost})")

    def refresh(self) -> None:
        """What was cached here before the lock was taken is read anew; ``size`` too.

        :raises ConfigError: it can't be looked at."""
        try:
            self.size = self._measure()
            self._drop_cache()
        except OSError as error:
            raise ConfigError(self.field, self.path, reason_of(error), "look after its storage") from error

    def _drop_cache(self) -> None:
        """Drop the clean pages that this host has cached. Of a page that somebody has mapped the host keeps its copy.

        :raises OSError:"""
        if self.is_block_device:
            try:
                fcntl.ioctl(self.sync_fd, BLKFLSBUF, 0)
                return
            except PermissionError:
                pass  # for root only; what follows is the same, for whoever may read the device
        os.posix_fadvise(self.sync_fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        fds = self._fds
        self.fd = self.sync_fd = self.direct_fd = -1
        for fd in fds:
            os.close(fd)


def check_given_once(given: Sequence[tuple[str, str, bool]], remedy: str) -> None:
    """Two devices on one image would spoil each other's data; the lock would call that "another VM". ``given``: where
    each stands in the configuration, its path, and whether it is only read.

    :raises ConfigError: naming both, unless both only read."""
    seen: dict[tuple[object, ...], tuple[str, bool]] = {}
    for where, path, readonly in given:
        try:
            found = os.stat(path)
        except (OSError, ValueError):  # opening it says what is wrong
            continue
        if stat.S_ISDIR(found.st_mode):  # a new file in it
            continue
        which = ("device", found.st_rdev) if stat.S_ISBLK(found.st_mode) else ("file", found.st_dev, found.st_ino)
        first, first_readonly = seen.setdefault(which, (where, readonly))
        if first != where and not (readonly and first_readonly):
            raise ConfigError(where, path, f"the same image as {first}", remedy)
