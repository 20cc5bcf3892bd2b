"""Virtio 1.2 devices over the modern PCI transport."""
