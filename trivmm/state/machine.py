"""What a machine is, saved: frozen plain data, in the shape that travels (see ``wire``)."""

from __future__ import annotations

from typing import Any

import attrs

from trivmm.hypervisor.base import VcpuState, VmBackendState

__all__ = ["MachineState", "SavedVcpu"]


@attrs.frozen
class SavedVcpu:
    """``barrier`` is where the vCPU parked: (device name, ``activation`` or ``reset``), or None."""

    index: int
    state: VcpuState
    barrier: tuple[str, str] | None = None


@attrs.frozen
class MachineState:
    """``devices`` and ``board`` hold JSON-able dicts by device name (a pending activation included);
    ``reset_pending`` is ``reset`` or ``poweroff`` where the guest asked for it and nobody has carried it out;
    ``run`` is False for a VM that was paused when it was sent."""

    vcpus: tuple[SavedVcpu, ...]
    vmm: VmBackendState
    devices: dict[str, dict[str, Any]]
    board: dict[str, dict[str, Any]]
    reset_pending: str | None = None
    run: bool = True
