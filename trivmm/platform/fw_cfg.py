"""QEMU's ``fw_cfg``, as far as a PC BIOS reads it: a selector at port 0x510, the selected item's bytes at 0x511.

Owned by the board, and there only with a firmware image in ROM. Read-only and without DMA: an item is bytes that
``trivmm.boot.firmware`` made before the guest ran, and the guest's part is where it stands in one. Past an item's end,
and of an item that does not exist, a read gives zeros; what is written to the data port is dropped.

Source: QEMU's docs/specs/fw_cfg.rst, the "traditional" interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trivmm.bus.space import Effect
from trivmm.state.platform import FwCfgState

__all__ = ["FW_CFG_PORTS", "FwCfg"]

FW_CFG_PORTS: Final = (0x510, 2)  # first port and count
SELECTOR, DATA = 0, 1
MAX_OFFSET: Final = (1 << 32) - 1  # a guest that reads on for ever stays there


class FwCfg:
    """``items`` by key. One vCPU at a time reads it, as on hardware; several at once get each other's bytes."""

    def __init__(self, items: Mapping[int, bytes]) -> None:
        self._items = items
        self._key = 0
        self._offset = 0

    def read(self, offset: int, size: int) -> bytes:
        if offset != DATA or size != 1:
            return bytes(size)
        item, at = self._items.get(self._key, b""), self._offset
        self._offset = min(at + 1, MAX_OFFSET)
        return item[at : at + 1] or b"\0"

    def write(self, offset: int, data: bytes) -> Effect:
        if offset == SELECTOR and len(data) == 2:
            self._key, self._offset = int.from_bytes(data, "little"), 0
        return None

    def save(self) -> FwCfgState:
        return FwCfgState(self._key, self._offset)

    def check(self, state: FwCfgState, where: str) -> None:
        """Any place will do: beyond an item's end there are zeros."""

    def load(self, state: FwCfgState) -> None:
        self._key, self._offset = state.key, state.offset
