"""virtio-blk: an image as a disk."""
