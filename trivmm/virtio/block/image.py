"""A disk's image, whatever its format: what the device, the board and a migration ask of it.

**A new format** is a subclass of :class:`Image` beside that of :mod:`raw`, whose ``native`` begins with the table of C
operations that ``ffi/image.h`` describes, and a case in ``open_image`` (:mod:`formats`), which opens the guest's own
file and closes it if the subclass raises. Files that are only read (``readonly``) the subclass opens and
closes itself, each an :class:`~trivmm.virtio.block.file.ImageFile`, until it has handed all of them, the guest's own
first, to ``Image.__init__``. It sets ``owner``, ``native``, ``capacity`` and ``promised``, and has

- :meth:`Image._reread`: whoever had the lock before may have changed the files. What is cached in memory of them is
  dropped, ``capacity`` is read again. A destination's image is opened while the source still writes into it, so nothing
  that was read before the first lock is believed, and nothing is written before it: no "open" mark, no repair.
- :meth:`Image._free`: no worker runs, the files are closed next. Nothing is written.

Locks, flushes, and dropping the host's cache are here, for all files; a format writes through to its files before an
operation returns, so that a flush of these is all there is to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from trivmm.errors import ConfigError, NotSupported, TrivmmError
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.block.geometry import SECTOR, Geometry

__all__ = ["Image"]


class Image:
    """A :class:`~trivmm.virtio.port.Storage`, open from construction to :meth:`close`.

    :ivar native: ``struct tv_image *`` for all workers of the disk.
    :ivar owner: the cffi object that ``native`` points into: it lives as long as this.
    :ivar capacity: bytes that the guest sees.
    :ivar promised: how many of these its driver was told of.
    :ivar geometry: what its driver is told of blocks; ``discard`` is what the format itself can give back.
    :ivar can_clear: the format has discard and write_zeroes."""

    image_type: ClassVar[str]  # as DiskConfig spells it
    native: Any
    owner: Any
    capacity: int
    can_clear: ClassVar[bool] = True
    geometry: Geometry = Geometry()

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.files = tuple(files)
        self.promised = 0

    @property
    def path(self) -> str:
        return self.files[0].path

    @property
    def readonly(self) -> bool:
        return self.files[0].readonly

    @property
    def sectors(self) -> int:
        """Whole sectors; the bytes of an incomplete last one are out of the guest's reach."""
        return self.capacity // SECTOR

    @property
    def identity(self) -> str:
        """Of the disk, for GET_ID, where no serial was given."""
        return self.files[0].identity

    def resize(self, capacity: int) -> None:
        """While the driver goes on, who is told of it after that. May wait for the storage.

        :raises NotSupported: not in this format. :raises ConfigError: it can't be."""
        raise NotSupported("desired_size", capacity, f"a {self.image_type} image can't be resized yet", "leave it")

    def counters(self) -> dict[str, int]:
        """What the format counts beside the disk's own. Any thread, while workers run."""
        return {}

    # --- Storage: these may wait for it ------------------------------------------------------------------------

    def take_lock(self) -> None:
        """Of each file: all or none. Idempotent. :raises ConfigError: when somebody else has one."""
        try:
            for file in self.files:
                file.take_lock()
        except TrivmmError:
            self.release_lock()
            raise

    def release_lock(self) -> None:
        """Idempotent; after :meth:`close` too, which has given it up."""
        for file in self.files:
            file.release_lock()

    def flush(self) -> None:
        """See :class:`trivmm.virtio.port.Storage`."""
        for file in self.files:
            file.flush()

    def refresh(self) -> None:
        """See :class:`trivmm.virtio.port.Storage`."""
        for file in self.files:
            file.refresh()
        self._reread()
        if self.capacity < self.promised:
            why = f"has shrunk to {self.capacity} bytes, the guest was told of {self.promised}"
            raise ConfigError("disks.path", self.path, why, "give the whole image")

    def close(self) -> None:
        """Idempotent. No worker runs."""
        self._free()
        for file in self.files:
            file.close()

    # --- a format's own ----------------------------------------------------------------------------------------

    def _reread(self) -> None:
        """See the module's docstring. :raises TrivmmError: it is no image of this format any more."""
        raise NotImplementedError

    def _free(self) -> None:
        """What ``native`` has beside files. Idempotent."""
