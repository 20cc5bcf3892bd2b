"""virtio-blk: a raw file as a disk."""

from trivmm.virtio.block.device import BlockDevice
from trivmm.virtio.block.image import check_given_once

__all__ = ["BlockDevice", "check_given_once"]
