"""A virtio device, saved: where it is in its life, and what its driver has set up. Plain, untrusted data.

Types say how wide a field is; what the fields mean together, and what a device allows, is checked when they are taken
over (``trivmm.virtio.setup``, ``trivmm.virtio.life``, the transport).
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final

import attrs

from trivmm.state.platform import PciConfigState
from trivmm.values import U8, U16, U32, U64, AtMost, Within

__all__ = [
    "NO_VECTOR",
    "DeviceLifeState",
    "LifeStage",
    "MsixState",
    "QueueState",
    "RegistersState",
    "SavedDevice",
    "TransportState",
]

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


@attrs.frozen
class DeviceLifeState:
    """``status`` as the guest reads it; a pending activation is a stage of its own (ACTIVATING)."""

    stage: LifeStage
    status: U8
    generation: Annotated[int, Within(0, 1 << 62)]  # counts on for as long as a guest may live


@attrs.frozen
class RegistersState:
    """The common configuration structure (virtio 1.2 section 4.1.4.3) but for device_status. ``features`` are what the
    driver has acknowledged, ``generation`` the configuration's."""

    device_feature_select: U32
    driver_feature_select: U32
    features: U64
    config_vector: U16
    queue_select: U16
    generation: U8
    queues: tuple[QueueState, ...]


@attrs.frozen
class MsixState:
    """``table`` as the guest reads it, 16 bytes a vector; ``pending`` vectors. The message control is in configuration
    space."""

    table: Annotated[bytes, AtMost(2048 * 16)]  # PCI 3.0 section 6.8.2: at most 2048 vectors
    pending: tuple[U16, ...]


@attrs.frozen
class TransportState:
    pci: PciConfigState
    registers: RegistersState
    msix: MsixState
    isr: U8


@attrs.frozen
class SavedDevice:
    """``own`` is the device's, JSON of its ``state_type``."""

    life: DeviceLifeState
    transport: TransportState
    own: dict[str, Any]
