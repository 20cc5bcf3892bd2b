"""virtio-rng: entropy."""

from trivmm.virtio.rng.device import RngDevice

__all__ = ["RngDevice"]
