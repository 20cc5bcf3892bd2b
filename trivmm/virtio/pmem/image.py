"""The file behind a persistent memory: a :class:`~trivmm.virtio.port.Storage`, or a scratch one that is nobody else's.

It is opened, locked, flushed and looked at afresh as a disk's is (``trivmm.virtio.block.file``). What the guest has
stored is in the page cache, whoever stored it: a flush of the file is all there is to it.
"""

from __future__ import annotations

import os
from typing import Final

from trivmm.errors import ConfigError, reason_of
from trivmm.memory.layout import DEVICE_MEMORY_ALIGNMENT
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.pmem.config import PmemConfig

__all__ = ["PmemImage", "open_scratch"]

FIELD: Final = "pmem.file"


class PmemImage:
    """``size`` bytes of a file are the guest's; ``fd`` is open from construction to :meth:`close`."""

    def __init__(self, config: PmemConfig, *, lock: bool) -> None:
        """:raises ConfigError: naming what is wrong with it."""
        self._file = ImageFile(config.file, readonly=config.discard_writes, lock=lock, field=FIELD)
        try:
            self.size = self._file.size if config.size is None else config.size
            if self.size % DEVICE_MEMORY_ALIGNMENT or not self.size:
                down = self.size // DEVICE_MEMORY_ALIGNMENT * DEVICE_MEMORY_ALIGNMENT
                remedy = f"give size={down}, or make it longer (truncate)" if down else "make it longer (truncate)"
                raise ConfigError(FIELD, config.file, f"its {self.size} bytes are no multiple of 2 MiB", remedy)
            if self.size > self._file.size:
                why = f"has {self._file.size} bytes, size says {self.size}"
                raise ConfigError(FIELD, config.file, why, "make it longer (truncate), or give less")
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        return self._file.fd

    def take_lock(self) -> None:
        self._file.take_lock()

    def release_lock(self) -> None:
        self._file.release_lock()

    def flush(self) -> None:
        """The guest stands still, or what it stores meanwhile is not part of it."""
        self._file.flush()

    def refresh(self) -> None:
        """Before the guest runs here: of a page that it has touched, the host keeps its copy."""
        self._file.refresh()
        if self._file.size < self.size:
            why = f"has shrunk to {self._file.size} bytes, the guest was told of {self.size}"
            raise ConfigError(FIELD, self._file.path, why, "give the whole file")

    def close(self) -> None:
        self._file.close()


def open_scratch(config: PmemConfig) -> int:
    """A new file without a name in the folder ``config.file``; gives its descriptor. :raises ConfigError:"""
    if config.size is None:
        raise ConfigError(FIELD, config.file, "a folder, and no size", "give size=SIZE, or a file")
    fd = -1
    try:
        fd = os.open(config.file, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, config.size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise ConfigError(FIELD, config.file, reason_of(error), "give a folder for new files, or a file") from error
    return fd
