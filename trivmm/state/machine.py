"""What a machine is, saved: frozen plain data, in the shape that travels (see ``codec``)."""

from __future__ import annotations

import enum
from typing import Annotated, Final

import attrs

from trivmm.config import MAX_VCPUS
from trivmm.hypervisor.base import VcpuState, VmBackendState
from trivmm.state.platform import BoardState
from trivmm.state.virtio import SavedDevice
from trivmm.values import AtMost, Name, Within

__all__ = ["MAX_DEVICES", "Barrier", "BarrierKind", "MachineState", "PendingReset", "SavedVcpu"]

MAX_DEVICES: Final = 64  # more than a PCI bus has slots


class BarrierKind(enum.Enum):
    """What a vCPU can be waiting for when it is saved."""

    ACTIVATION = "activation"
    RESET = "reset"


class PendingReset(enum.Enum):
    """What a guest asked for, and nobody has carried out yet."""

    RESET = "reset"
    POWEROFF = "poweroff"


@attrs.frozen
class Barrier:
    """Where a vCPU parked: it goes on when ``device`` has settled ``what``."""

    device: Name
    what: BarrierKind


@attrs.frozen
class SavedVcpu:
    index: Annotated[int, Within(0, MAX_VCPUS - 1)]
    state: VcpuState
    barrier: Barrier | None


@attrs.frozen
class MachineState:
    """``devices`` by name, a pending activation included; ``run`` is False for a VM that was paused when it was
    sent."""

    vcpus: Annotated[tuple[SavedVcpu, ...], AtMost(MAX_VCPUS)]
    vmm: VmBackendState
    devices: Annotated[dict[Name, SavedDevice], AtMost(MAX_DEVICES)]
    board: BoardState
    reset_pending: PendingReset | None
    run: bool
