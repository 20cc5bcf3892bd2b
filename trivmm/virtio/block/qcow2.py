"""qcow2 images: what ``ffi/qcow2.h`` does with them, and the files that they are kept in.

A destination's image is only looked at (its header) until its lock is taken: what the source writes meanwhile would
make lies of anything else that is kept of it. :meth:`Qcow2Image._reread` then opens it as if for the first time.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from typing import Any, ClassVar, Final

from trivmm._native import ffi, lib
from trivmm.config import DiskConfig
from trivmm.errors import ConfigError, MigrationError, NotSupported
from trivmm.virtio.block.chain import Link, Place, open_chain, probe, wrong
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.block.geometry import Geometry
from trivmm.virtio.block.image import Image

__all__ = ["Qcow2Image"]

log = logging.getLogger(__name__)

PHYSICAL: Final = 4096  # writes of whole pages of the host read nothing first
COUNTED: Final = ("spoilt", "allocated", "freed", "inflated", "mended")  # of struct tv_qcow2_counts


class Qcow2Image(Image):
    image_type: ClassVar[str] = "Qcow2"

    def __init__(self, file: ImageFile, config: DiskConfig, *, lock: bool) -> None:
        """``file`` is its own from now on, unless this raises; the files behind it are its own always.

        :raises ConfigError: naming ``disks.path`` and what is wrong with the image, or with one behind it."""
        if config.direct:
            raise NotSupported("disks.direct", True, "not there for qcow2 images yet", "leave it out")
        place = Place.of(config)
        self._links: tuple[Link, ...] = open_chain(file, place, lock=lock)
        super().__init__([link.file for link in self._links])
        self._locked = lock
        self._lost: str | None = None  # why what the guest wrote may be lost
        self._counted: Counter[str] = Counter()  # of natives that are closed
        self._natives: list[Any] = []
        self.owner = None
        self.native = ffi.NULL
        try:
            self._reread()
        except BaseException:
            self._free()
            for link in self._links[1:]:
                link.file.close()
            raise
        self.promised = self.capacity

    def take_lock(self) -> None:
        super().take_lock()
        self._locked = True

    def release_lock(self) -> None:
        self._locked = False
        super().release_lock()

    def flush(self) -> None:
        """The image is not marked as open any more when this returns: somebody else may open it next."""
        if self._lost is None and self._natives and lib.tv_qcow2_settle(self._natives[0], self.files[0].sync_fd):
            self._lost = os.strerror(ffi.errno)
        if self._lost is not None:
            raise MigrationError(f"disks.path = {self.path}: what the guest wrote can't be flushed ({self._lost})")
        super().flush()

    def counters(self) -> dict[str, int]:
        total = self._counted + self._count()
        return {f"qcow2_{name}": total[name] for name in COUNTED}

    def _count(self) -> Counter[str]:
        counts = ffi.new("struct tv_qcow2_counts *")
        total: Counter[str] = Counter()
        for native in self._natives:
            lib.tv_qcow2_count(native, counts)
            total.update({name: getattr(counts, name) for name in COUNTED})
        return total

    def _reread(self) -> None:
        """Without the lock no more than the headers, and nothing is written."""
        for link in self._links:
            now = probe(link.file) if link.header is not None else None
            if link.header is not None and now is not None and now.backing != link.header.backing:
                raise ConfigError("disks.path", link.file.path, "has another backing file by now", "leave it alone")
            link.header = now
        top = self._links[0].header
        assert top is not None
        self.capacity = top.size
        self.geometry = Geometry(physical=min(top.cluster, PHYSICAL), discard=top.cluster)
        if self._locked:
            self._load()

    def _load(self) -> None:
        """From the last image behind it to the first, each with the next one behind it."""
        made: list[Any] = []
        error = ffi.new("struct tv_qcow2_error *")
        try:
            for link in reversed(self._links):
                if link.header is None:
                    continue
                native = lib.tv_qcow2_open(link.file.fd, link is self._links[0] and not self.readonly, error)
                if not native:
                    raise wrong(link.file, error)
                made.insert(0, native)
        except BaseException:
            for native in made:
                lib.tv_qcow2_close(native)
            raise
        last = self._links[-1]
        for native, behind in itertools.pairwise(made):
            lib.tv_qcow2_back(native, behind, -1, 0)
        if last.header is None:
            lib.tv_qcow2_back(made[-1], ffi.NULL, last.file.fd, last.file.size)
        self._free()
        self._natives = made
        self.owner, self.native = made[0], lib.tv_qcow2_image(made[0])

    def _free(self) -> None:
        found = self._count()
        if found["spoilt"]:
            remedy = "mend it (qemu-img check -r all), or give an intact copy"
            log.warning(
                "disk %s: %d accesses failed where the image contradicts itself; %s", self.path, found["spoilt"], remedy
            )
        self._counted += found
        for native in self._natives:
            lib.tv_qcow2_close(native)
        self._natives = []
        self.owner, self.native = None, ffi.NULL
