"""Saved states for tests that need one and no machine: of a board that was just built, and of a device."""

from __future__ import annotations

import json
from typing import TypeVar

from trivmm.state.platform import (
    CMOS_BYTES,
    PCI_CONFIG_BYTES,
    BoardState,
    CmosState,
    DebugPortState,
    FwCfgState,
    GedState,
    PciBusState,
    PciConfigState,
    PciHotplugState,
    PmTimerState,
    SerialState,
)
from trivmm.state.strict import structure, unstructure
from trivmm.state.virtio import (
    NO_VECTOR,
    DeviceLifeState,
    LifeStage,
    MsixState,
    QueueState,
    RegistersState,
    SavedDevice,
    TransportState,
)

__all__ = ["a_board", "a_device", "sent"]

T = TypeVar("T")


def a_board() -> BoardState:
    return BoardState(
        pci=PciBusState(0, _config_space()),
        serial=SerialState(0, 0, 3, 8, 0xB0, 0, 12, 0, thre_pending=False, overrun=False, tx=b"", rx=b""),
        cmos=CmosState(0, bytes(CMOS_BYTES)),
        debug_port=DebugPortState(0, 0),
        ged=GedState(0),
        pvpanic=None,
        hotplug=PciHotplugState(0, 0, 0, 0),
        fw_cfg=FwCfgState(0, 0),
        pm_timer=PmTimerState(0),
    )


def a_device(stage: LifeStage = LifeStage.RESET, status: int = 0) -> SavedDevice:
    """With one queue of 16 entries and two vectors, both masked."""
    registers = RegistersState(0, 0, 0, NO_VECTOR, 0, 0, (QueueState.unused(16),))
    msix = MsixState((bytes(12) + b"\1\0\0\0") * 2, ())
    return SavedDevice(DeviceLifeState(stage, status, 1), TransportState(_config_space(), registers, msix, 0), {})


def _config_space() -> PciConfigState:
    return PciConfigState(bytes(PCI_CONFIG_BYTES), was_enabled=False, sizing=())


def sent(state: T, **changes: object) -> T:
    """A saved part as a receiver gets it, with fields that a hostile sender has changed or added.

    :raises ProtocolError: as the receiver would."""
    return structure("part", json.loads(json.dumps(unstructure(state))) | changes, type(state))
