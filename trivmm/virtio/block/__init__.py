"""virtio-blk: a raw file as a disk."""

from trivmm.virtio.block.device import BlockDevice

__all__ = ["BlockDevice"]
