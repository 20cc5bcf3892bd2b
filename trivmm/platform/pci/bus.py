"""PCI bus 0: 32 slots of one function each, reached by CF8/CFC (here) and by the memory window of ``ecam``.

Owned by the board, as long-lived. Slots follow Cloud Hypervisor's order of creation: the host bridge at 0, then
console, disks, (net), rng, …; a ``pci_device_id`` of the configuration takes its slot out of that order. Where the
functions' BARs decode is ``placement``'s. Functions come and go while vCPUs look: the table of slots is replaced as a
whole.

Two locks, never held together: one guards the CF8 latch and the table of slots, the other the placement of BARs. Both
are acquired with a bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import AddressSpace, Effect, GuestRequest
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.platform.pci.config_space import PciConfigSpace
from trivmm.platform.pci.function import PciFunction
from trivmm.platform.pci.placement import BarPlacement
from trivmm.state.platform import PciBusState

__all__ = ["CONFIG_PORTS", "SLOTS", "PciBus", "pick_slots"]

SLOTS: Final = 32
CONFIG_ADDRESS: Final = 0xCF8
CONFIG_PORTS: Final = (CONFIG_ADDRESS, 8)  # first port and count
RESET_CONTROL: Final = 1  # offset of a byte register in the middle of the latch, which is written whole only
RESET_CPU: Final = 1 << 2  # in which way (warm, hard, full) makes no difference here
ENABLE: Final = 1 << 31
QEMU_SUBSYSTEM: Final = (0x1AF4, 0x1100)


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


def pick_slots(wanted: Collection[int | None], taken: Mapping[int, str] | None = None) -> list[int]:
    """A slot for each, in their order: the one that it asks for, else the lowest that nobody has or asks for.
    ``taken`` are slots that others have, and who.

    :raises ConfigError: (pci_device_id) a slot that there isn't, that is taken, or none is left."""
    used = {0: HostBridge.name, **({} if taken is None else taken)}
    for slot in wanted:
        if slot is not None:
            _check_slot(slot, used)
            used[slot] = "another device that asks for it"
    found = []
    for slot in wanted:
        if slot is None:
            slot = next((each for each in range(1, SLOTS) if each not in used), SLOTS)
            _check_slot(slot, used)
            used[slot] = ""
        found.append(slot)
    return found


def _check_slot(slot: int, used: Mapping[int, str]) -> None:
    if not 0 <= slot < SLOTS:
        raise ConfigError("pci_device_id", slot, "no such PCI slot is free", f"give 1 to {SLOTS - 1}")
    if slot in used:
        raise ConfigError("pci_device_id", slot, f"the slot is taken by {used[slot]}", "give another one")


def _without(functions: Mapping[int, PciFunction], slots: Collection[int]) -> Mapping[int, PciFunction]:
    return {slot: each for slot, each in functions.items() if slot not in slots}


class PciBus:
    """A :class:`~trivmm.bus.space.BusDevice` for the ports :data:`CONFIG_PORTS`. ``functions`` by slot, as the guest
    finds them."""

    def __init__(self, mmio: AddressSpace, deadlines: Deadlines, *, for_firmware: bool = False) -> None:
        self.functions: Mapping[int, PciFunction] = {}
        self._plugged: Mapping[int, PciFunction] = {}  # the same, and what is hidden
        self.placement = BarPlacement(mmio, deadlines)
        self._address = 0
        self._lock = BoundedLock("the PCI bus's address latch", deadlines.lock)
        self._plug(HostBridge(deadlines.lock, for_firmware), 0)

    # --- slots -------------------------------------------------------------------------------------------

    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Plug a function in, assign and map its BARs; gives its slot (the lowest free one when None).

        :raises ConfigError: when the slot is taken or out of range, or no slot or BAR space is left.
        """
        (slot,) = pick_slots([slot], self.placement.names())
        self._plug(function, slot)
        return slot

    def _plug(self, function: PciFunction, slot: int) -> None:
        self.placement.plug(slot, function)
        with self._lock:
            self._plugged = {**self._plugged, slot: function}
            self.functions = {**self.functions, slot: function}

    def hide(self, slots: Collection[int]) -> None:
        """The guest finds nothing there any more. Never waits for the kernel: on a vCPU thread."""
        with self._lock:
            self.functions = _without(self.functions, slots)

    def hide_only(self, slots: Collection[int]) -> None:
        """It finds everything else again."""
        with self._lock:
            self.functions = _without(self._plugged, slots)

    def remove(self, slot: int) -> None:
        """Unplug a function: its slot and its BARs' places are free. Waits for the kernel. An access that has begun
        may still be in it: see :meth:`trivmm.bus.bus.Bus.token`."""
        with self._lock:
            self._plugged = _without(self._plugged, [slot])
            self.functions = _without(self.functions, [slot])
        self.placement.unplug(slot)

    # --- configuration space -----------------------------------------------------------------------------

    def read_config(self, slot: int, offset: int, size: int) -> bytes:
        """Inside one dword; all-ones anywhere else, and where there is no function."""
        function = self.functions.get(slot)
        if function is None or offset % 4 + size > 4:
            return b"\xff" * size
        return function.config_read(offset, size)

    def write_config(self, slot: int, offset: int, data: bytes) -> Effect:
        function = self.functions.get(slot)
        if function is None or offset % 4 + len(data) > 4:
            return None
        outcome = function.config_write(offset, data)
        if self.placement.is_stale(slot, function):
            self.placement.place()
        return outcome

    # --- CF8 and CFC -------------------------------------------------------------------------------------

    def _target(self) -> tuple[int, int] | None:
        """Slot and dword offset that CF8 selects, if it selects this bus."""
        with self._lock:
            address = self._address
        bus, slot, function = address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 0x7
        if not address & ENABLE or bus or function:
            return None
        return slot, address & 0xFC

    def read(self, offset: int, size: int) -> bytes:
        if offset % 4 + size > 4:
            return b"\xff" * size
        if offset == RESET_CONTROL and size == 1:
            return b"\0"
        if offset < 4:
            with self._lock:
                return self._address.to_bytes(4, "little")[offset : offset + size]
        target = self._target()
        if target is None:
            return b"\xff" * size
        slot, register = target
        return self.read_config(slot, register + offset - 4, size)

    def write(self, offset: int, data: bytes) -> Effect:
        if offset % 4 + len(data) > 4:
            return None
        if offset == RESET_CONTROL and len(data) == 1:
            return GuestRequest("reset", "port 0xcf9") if data[0] & RESET_CPU else None
        if offset < 4:
            with self._lock:
                latch = bytearray(self._address.to_bytes(4, "little"))
                latch[offset : offset + len(data)] = data
                self._address = int.from_bytes(latch, "little")
            return None
        target = self._target()
        if target is None:
            return None
        slot, register = target
        return self.write_config(slot, register + offset - 4, data)

    def counters(self) -> dict[str, int]:
        return {"bars_refused": self.placement.refused}

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
        self.placement.place()
