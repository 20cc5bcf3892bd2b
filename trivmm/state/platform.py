"""The fixed parts of a board, saved. Plain, untrusted data: types say how wide a field is, and the part that takes one
over checks what its values mean (``check`` of each)."""

from __future__ import annotations

from typing import Annotated, Final

import attrs

from trivmm._native import lib
from trivmm.values import U8, U16, U32, U64, AtMost, Exactly

__all__ = [
    "CMOS_BYTES",
    "PCI_CONFIG_BYTES",
    "BoardState",
    "CmosState",
    "DebugPortState",
    "FwCfgState",
    "GedState",
    "LineInput",
    "LineOutput",
    "PciBusState",
    "PciConfigState",
    "PciHotplugState",
    "PmTimerState",
    "PvpanicState",
    "SerialState",
]

PCI_CONFIG_BYTES: Final = 256
CMOS_BYTES: Final = 128
LineOutput = Annotated[bytes, AtMost(int(lib.TV_LINE_TX_SIZE))]
LineInput = Annotated[bytes, AtMost(int(lib.TV_LINE_RX_SIZE))]


@attrs.frozen
class PciConfigState:
    """A function's configuration space. ``was_enabled``: the guest has had memory decoding on; ``sizing``: offsets of
    BAR registers that hold the answer to a sizing write."""

    registers: Annotated[bytes, Exactly(PCI_CONFIG_BYTES)]
    was_enabled: bool
    sizing: Annotated[tuple[U8, ...], AtMost(6)]


@attrs.frozen
class PciBusState:
    """``address`` is the CF8 latch. Other functions than the host bridge save their own configuration space."""

    address: U32
    host_bridge: PciConfigState


@attrs.frozen
class PciHotplugState:
    """A bit a slot: ``up`` and ``down`` are what the guest has not read of what came and what is to go; ``asked`` what
    is to go and is there, ``ejected`` what the guest has let go of and is not free yet."""

    up: U32
    down: U32
    asked: U32
    ejected: U32


@attrs.frozen
class SerialState:
    """The 16550's registers, output that no sink has taken, input that the guest has not read."""

    ier: U8
    fcr: U8
    lcr: U8
    mcr: U8
    msr: U8
    scr: U8
    dll: U8
    dlm: U8
    thre_pending: bool
    overrun: bool
    tx: LineOutput
    rx: LineInput


@attrs.frozen
class CmosState:
    index: U8
    data: Annotated[bytes, Exactly(CMOS_BYTES)]


@attrs.frozen
class DebugPortState:
    last: U8
    count: U64


@attrs.frozen
class GedState:
    events: U8


@attrs.frozen
class FwCfgState:
    """The item that is being read, and how far."""

    key: U16
    offset: U32


@attrs.frozen
class PmTimerState:
    ticks: U32


@attrs.frozen
class PvpanicState:
    """``told``: bits of the words that the guest has said already (``Pvpanic``)."""

    told: U8
    config: PciConfigState


@attrs.frozen
class BoardState:
    """Fields are named as ``Board.fixed`` names the parts; None where the board has no such part."""

    pci: PciBusState
    serial: SerialState
    cmos: CmosState
    debug_port: DebugPortState
    ged: GedState
    hotplug: PciHotplugState
    fw_cfg: FwCfgState
    pm_timer: PmTimerState
    pvpanic: PvpanicState | None
