"""Raw images: the sectors of a file or block device, as they are."""

from __future__ import annotations

from typing import ClassVar

from trivmm._native import ffi, lib
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.block.image import Image

__all__ = ["RawImage"]


class RawImage(Image):
    image_type: ClassVar[str] = "Raw"

    def __init__(self, file: ImageFile) -> None:
        """``file`` is its own from now on."""
        super().__init__([file])
        self.owner = ffi.new("struct tv_raw *")
        self.owner.fd = file.fd
        self.owner.block_device = file.is_block_device
        lib.tv_raw_init(self.owner)
        self.native = ffi.addressof(self.owner.image)
        self.capacity = self.promised = file.size

    def _reread(self) -> None:
        self.capacity = self.files[0].size
