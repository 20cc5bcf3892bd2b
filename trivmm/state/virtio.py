"""A virtio device, saved: where it is in its life, and what its driver has set up. Plain, untrusted data.

Types say how wide a field is; what the fields mean together, and what a device allows, is checked when they are taken
over (``trivmm.virtio.setup``, ``trivmm.virtio.life``, the transport).
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from trivmm.values import U16, U64

__all__ = ["NO_VECTOR", "LifeStage", "QueueState"]

NO_VECTOR: Final = 0xFFFF  # VIRTIO_MSI_NO_VECTOR, virtio 1.2 section 4.1.4.3


class LifeStage(enum.Enum):
    """Where a device is in its life; ``trivmm.virtio.life`` has the steps between."""

    RESET = "reset"
    DRIVER = "driver"
    FEATURES_OK = "features_ok"
    ACTIVATING = "activating"
    ACTIVE = "active"
    NEEDS_RESET = "needs_reset"
    RESETTING = "resetting"


@attrs.frozen
class QueueState:
    """The one record of a virtqueue: what its driver wrote to its registers (virtio 1.2 section 4.1.4.3), and how far
    its device has come. Addresses are guest physical; ``next_avail`` and ``next_used`` the free-running ring indices of
    the next chain to take and to give back."""

    size: U16
    vector: U16
    enabled: bool
    desc_gpa: U64
    avail_gpa: U64
    used_gpa: U64
    next_avail: U16
    next_used: U16

    @classmethod
    def unused(cls, size: int) -> QueueState:
        """As a reset leaves it."""
        return cls(size, NO_VECTOR, False, 0, 0, 0, 0, 0)
