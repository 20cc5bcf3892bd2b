"""The virtio-pci modern transport."""

from trivmm.virtio.pci.transport import VirtioPciTransport

__all__ = ["VirtioPciTransport"]
