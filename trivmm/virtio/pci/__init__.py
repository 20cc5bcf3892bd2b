"""The virtio-pci modern transport."""
