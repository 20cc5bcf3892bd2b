"""PCI bus 0: 32 slots of one function each, reached by CF8/CFC, with the BARs placed in the MMIO address space.

Owned by the board, as long-lived. Slots follow Cloud Hypervisor's order of creation: the host bridge at 0, then
console, disks, (net), rng, …; a ``pci_device_id`` of the configuration takes its slot out of that order.

Two locks, never held together: one guards the CF8 latch, one the placement of BARs. Both are acquired with a bound.
A BAR decodes only inside the two BAR windows of ``layout`` and where nothing else is; any other placement is
refused: nothing is mapped, ``refused_placements`` counts it, and it is tried again whenever a BAR moves.
"""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import AddressSpace, Effect, Range
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.memory import layout
from trivmm.platform.pci.config_space import PciConfigSpace
from trivmm.platform.pci.function import PciFunction
from trivmm.state.platform import PciBusState

__all__ = ["CONFIG_PORTS", "PciBus"]

SLOTS: Final = 32
CONFIG_ADDRESS: Final = 0xCF8
CONFIG_PORTS: Final = (CONFIG_ADDRESS, 8)  # first port and count
ENABLE: Final = 1 << 31
QEMU_SUBSYSTEM: Final = (0x1AF4, 0x1100)
TURNS: Final = 3  # calls into the kernel, each a doorbell that moves, which a vCPU may have to wait out


BAR_WINDOWS: Final = (
    (layout.BAR32_START, layout.BAR32_START + layout.BAR32_SIZE),
    (layout.FIRMWARE_BARS_START, layout.FIRMWARE_BARS_END),
    (layout.BAR64_START, layout.BAR64_END),
)


class HostBridge:
    """00:00.0, the ids of Cloud Hypervisor's root bridge; no BARs. ``for_firmware``: of QEMU's subsystem, without
    which SeaBIOS reads no ``fw_cfg``."""

    name = "_pci_root"

    def __init__(self, lock_s: float, for_firmware: bool) -> None:
        vendor, subsystem = QEMU_SUBSYSTEM if for_firmware else (0, 0)
        self.config = PciConfigSpace(
            vendor_id=0x8086,
            device_id=0x0D57,
            class_code=0x060000,
            subsystem_vendor_id=vendor,
            subsystem_id=subsystem,
            lock_s=lock_s,
        )

    def config_read(self, offset: int, size: int) -> bytes:
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        return None

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        return None

    def bars_changed(self) -> None:
        return None


@attrs.frozen(eq=False)
class _BarWindow:
    """A BAR as a device of the MMIO address space."""

    function: PciFunction
    index: int

    def read(self, offset: int, size: int) -> bytes:
        return self.function.bar_read(self.index, offset, size)

    def write(self, offset: int, data: bytes) -> Effect:
        return self.function.bar_write(self.index, offset, data)


class PciBus:
    """A :class:`~trivmm.bus.space.BusDevice` for the ports :data:`CONFIG_PORTS`."""

    def __init__(self, mmio: AddressSpace, deadlines: Deadlines, *, for_firmware: bool = False) -> None:
        self.refused_placements = 0
        self.functions: dict[int, PciFunction] = {}
        self._mmio = mmio
        self._address = 0
        self._address_lock = BoundedLock("the PCI bus's address latch", deadlines.lock)
        self._placement_lock = BoundedLock("the placement of PCI BARs", TURNS * deadlines.kernel, "kernel")
        self._windows: dict[tuple[int, int], _BarWindow] = {}
        self._seen: dict[int, int] = {}  # slot → layout version that is placed
        self._refused: dict[tuple[int, int], int] = {}  # (slot, bar) → address refused last
        self._next_bar32 = layout.BAR32_START
        self._next_bar64 = layout.BAR64_END
        self.add(HostBridge(deadlines.lock, for_firmware), 0)

    # --- building ----------------------------------------------------------------------------------------

    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Plug a function in, assign and map its BARs; gives its slot (the lowest free one when None).

        :raises ConfigError: when the slot is taken or out of range, or no slot or BAR space is left.
        """
        if slot is None:
            slot = next((each for each in range(1, SLOTS) if each not in self.functions), SLOTS)
        if not 0 <= slot < SLOTS:
            raise ConfigError("pci_device_id", slot, "no such PCI slot is free", f"give 1 to {SLOTS - 1}")
        if slot in self.functions:
            taken = self.functions[slot].name
            raise ConfigError("pci_device_id", slot, f"the slot is taken by {taken}", "give another one")
        for bar in function.config.bars.values():
            function.config.set_bar_address(bar.index, self._allocate(bar.size, bar.is_64bit))
            self._windows[slot, bar.index] = _BarWindow(function, bar.index)
        self.functions[slot] = function
        self.place()
        return slot

    def _allocate(self, size: int, is_64bit: bool) -> int:
        """Naturally aligned: 64-bit ones from the top down, 32-bit ones from the bottom up."""
        if is_64bit:
            start = (self._next_bar64 - size) & -size
            if start < layout.BAR64_START:
                raise ConfigError("devices", size, "no 64-bit BAR space is left", "give fewer devices")
            self._next_bar64 = start
            return start
        start = (self._next_bar32 + size - 1) & -size
        if start + size > layout.BAR32_START + layout.BAR32_SIZE:
            raise ConfigError("devices", size, "no 32-bit BAR space is left", "give fewer devices")
        self._next_bar32 = start + size
        return start

    # --- placement ---------------------------------------------------------------------------------------

    def place(self) -> None:
        """Make the MMIO address space agree with all BAR registers; also after ``load``."""
        with self._placement_lock:
            # Told in two rounds: where two BARs change places, a doorbell can't be set where the other's still is.
            self._tell(self._unmap_moved())
            self._tell(self._map_wanted())

    def _tell(self, moved: set[int]) -> None:
        for slot, function in self.functions.items():
            if slot in moved:
                function.bars_changed()

    def _unmap_moved(self) -> set[int]:
        moved = set()
        for (slot, index), window in self._windows.items():
            bar = window.function.config.bars[index]
            if bar.mapped is not None and bar.mapped != window.function.config.decoded_address(index):
                self._mmio.remove(window, bar.mapped)
                bar.mapped = None
                moved.add(slot)
        return moved

    def _map_wanted(self) -> set[int]:
        moved = set()
        for slot, function in self.functions.items():
            self._seen[slot] = function.config.layout_version
        for (slot, index), window in self._windows.items():
            bar = window.function.config.bars[index]
            wanted = window.function.config.decoded_address(index)
            if bar.mapped is not None or wanted is None:
                self._refused.pop((slot, index), None)
                continue
            name = f"{window.function.name} BAR {index}"
            if _allowed(wanted, bar.size) and self._mmio.insert(Range(wanted, bar.size, window, name)):
                bar.mapped = bar.base = wanted
                moved.add(slot)
                self._refused.pop((slot, index), None)
            elif self._refused.get((slot, index)) != wanted:
                self._refused[slot, index] = wanted
                self.refused_placements += 1
        return moved

    # --- CF8 and CFC -------------------------------------------------------------------------------------

    def _target(self) -> tuple[int, PciFunction, int] | None:
        """Slot, function and dword offset that CF8 selects, if there is something."""
        with self._address_lock:
            address = self._address
        bus, slot, function = address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 0x7
        if not address & ENABLE or bus or function or slot not in self.functions:
            return None
        return slot, self.functions[slot], address & 0xFC

    def read(self, offset: int, size: int) -> bytes:
        if offset % 4 + size > 4:
            return b"\xff" * size
        if offset < 4:
            with self._address_lock:
                return self._address.to_bytes(4, "little")[offset : offset + size]
        target = self._target()
        if target is None:
            return b"\xff" * size
        _, function, register = target
        return function.config_read(register + offset - 4, size)

    def write(self, offset: int, data: bytes) -> Effect:
        if offset % 4 + len(data) > 4:
            return None
        if offset < 4:
            with self._address_lock:
                latch = bytearray(self._address.to_bytes(4, "little"))
                latch[offset : offset + len(data)] = data
                self._address = int.from_bytes(latch, "little")
            return None
        target = self._target()
        if target is None:
            return None
        slot, function, register = target
        outcome = function.config_write(register + offset - 4, data)
        if function.config.layout_version != self._seen.get(slot):
            self.place()
        return outcome

    def counters(self) -> dict[str, int]:
        return {"bars_refused": self.refused_placements}

    # --- state -------------------------------------------------------------------------------------------

    def save(self) -> PciBusState:
        """The latch only: each function saves its own configuration space; the host bridge's is here."""
        return PciBusState(self._address, self.functions[0].config.save())

    def check(self, state: PciBusState, where: str) -> None:
        """:raises ProtocolError: see :meth:`PciConfigSpace.check`."""
        self.functions[0].config.check(state.host_bridge, f"{where}.host_bridge")

    def load(self, state: PciBusState) -> None:
        """Take over what :meth:`check` has passed; after the functions' configuration spaces, since this places all
        BARs again. One that a peer put over RAM, or over another's, decodes no more than where a guest puts it."""
        self.functions[0].config.load(state.host_bridge)
        self._address = state.address
        self.place()


def _allowed(address: int, size: int) -> bool:
    """Whether a BAR may decode here: wholly inside one BAR window."""
    return any(start <= address and address + size <= end for start, end in BAR_WINDOWS)
