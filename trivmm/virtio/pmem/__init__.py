"""virtio-pmem: a file mapped as memory."""
