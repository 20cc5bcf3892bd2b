"""virtio-blk: a raw file as a disk."""
