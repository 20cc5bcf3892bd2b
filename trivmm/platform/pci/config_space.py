"""A PCI function's 256 bytes of configuration space: type 0 header, BARs, capability list.

Owned by its function and as long-lived. Any vCPU thread may call it; one short lock, held for a few byte copies,
keeps a register whole. What a guest may change is one mask over the 256 bytes; everything else ignores writes.

The header follows PCI Local Bus 3.0, chapter 6. As in Cloud Hypervisor the command register reads 0 at first
although the BARs, which the VMM has assigned, decode from the start; once the guest has set its memory-enable bit,
that bit decides. (Before, a driver that only adds the bus-master bit would turn its device off unknowingly.) A BAR
that was written with all-ones is being *sized* and does not decode. Bus mastering is off until the guest sets its bit:
its function sees to that.
"""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.state.platform import PCI_CONFIG_BYTES, PciConfigState
from trivmm.state.strict import refused

__all__ = ["Bar", "PciConfigSpace"]

COMMAND: Final = 0x04
STATUS: Final = 0x06
CACHE_LINE: Final = 0x0C
BAR0: Final = 0x10
BARS: Final = 6
SUBSYSTEM: Final = 0x2C
CAPABILITIES: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
FIRST_CAPABILITY: Final = 0x40

MEMORY_ENABLE: Final = 0x2
BUS_MASTER: Final = 0x4
# Section 6.2.2: I/O, memory, bus master, parity response, SERR#, INTx off. Special cycles, write-and-invalidate,
# palette snooping and back-to-back are for functions that have a use for them; 7 and 11 to 15 are reserved.
COMMAND_WRITABLE: Final = 0x0547
STATUS_HAS_CAPABILITIES: Final = 0x10
MEMORY_64BIT: Final = 0x4
PREFETCHABLE: Final = 0x8
MIN_BAR_SIZE: Final = 16


@attrs.define(eq=False)
class Bar:
    """One memory BAR. ``size`` in bytes. Set by the bus only: ``mapped`` is where accesses reach it now, or None;
    ``base`` where they do or last did."""

    index: int
    size: int
    is_64bit: bool
    prefetchable: bool
    mapped: int | None = None
    base: int = 0


class PciConfigSpace:
    """``layout_version`` grows with every write that may change where the BARs decode."""

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        lock_s: float,
    ) -> None:
        """``class_code``: 24 bits, class << 16 | subclass << 8 | programming interface. ``lock_s``: the deadline."""
        self.bars: dict[int, Bar] = {}
        self.layout_version = 0
        self._lock = BoundedLock("a PCI configuration space", lock_s)
        self._bytes = bytearray(PCI_CONFIG_BYTES)
        self._writable = bytearray(PCI_CONFIG_BYTES)
        self._sizing: set[int] = set()  # offsets of BAR registers that hold the answer to a sizing write
        self._was_enabled = False
        self._next_capability = FIRST_CAPABILITY
        self._capability_link = CAPABILITIES
        self._put(0x00, vendor_id, 2)
        self._put(0x02, device_id, 2)
        self._put(0x08, class_code << 8 | revision, 4)
        self._put(SUBSYSTEM, subsystem_vendor_id, 2)
        self._put(SUBSYSTEM + 2, subsystem_id, 2)
        self._writable[COMMAND : COMMAND + 2] = COMMAND_WRITABLE.to_bytes(2, "little")
        self._writable[CACHE_LINE] = 0xFF
        self._writable[INTERRUPT_LINE] = 0xFF

    def _put(self, offset: int, value: int, size: int) -> None:
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")

    # --- building ----------------------------------------------------------------------------------------

    def add_bar(self, index: int, size: int, *, is_64bit: bool, prefetchable: bool = False) -> None:
        """Declare a memory BAR; the bus places it. :raises ValueError: for a size or index that PCI cannot have."""
        last = index + 1 if is_64bit else index
        taken = {each + half for each, bar in self.bars.items() for half in range(2 if bar.is_64bit else 1)}
        if index < 0 or last >= BARS or taken & {index, last}:
            raise ValueError(f"BAR {index} does not fit or is taken")
        if size < MIN_BAR_SIZE or size & (size - 1) or size >> (64 if is_64bit else 32):
            raise ValueError(f"BAR {index}: {size} bytes is not a size that a BAR can have")
        self.bars[index] = Bar(index, size, is_64bit, prefetchable)
        register = BAR0 + 4 * index
        width = 8 if is_64bit else 4
        kind = (MEMORY_64BIT if is_64bit else 0) | (PREFETCHABLE if prefetchable else 0)
        mask = ((1 << 8 * width) - size) & ~0xF
        self._put(register, kind, width)
        self._writable[register : register + width] = mask.to_bytes(width, "little")

    def add_capability(self, cap_id: int, body: bytes, writable: bytes) -> int:
        """Append a capability; gives its config offset. ``body`` starts after the two header bytes, ``writable``
        is a mask of the same length. :raises ValueError: when the space is full."""
        offset = self._next_capability
        end = offset + 2 + len(body)
        if end > PCI_CONFIG_BYTES or len(writable) != len(body):
            raise ValueError(f"capability {cap_id:#x} of {len(body)} bytes does not fit at {offset:#x}")
        self._bytes[self._capability_link] = offset
        self._bytes[offset] = cap_id
        self._bytes[offset + 2 : end] = body
        self._writable[offset + 2 : end] = writable
        self._bytes[STATUS] |= STATUS_HAS_CAPABILITIES
        self._capability_link = offset + 1
        self._next_capability = (end + 3) & ~3
        return offset

    # --- access ------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Little-endian; all-ones where ``[offset, offset + size)`` leaves the space."""
        if offset < 0 or offset + size > PCI_CONFIG_BYTES:
            return b"\xff" * size
        with self._lock:
            return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> bool:
        """A guest's write of 1, 2 or 4 bytes inside one dword; any other is ignored.

        True when it may have changed where BARs decode: a BAR register or memory-enable."""
        size = len(data)
        if size not in (1, 2, 4) or offset < 0 or offset + size > PCI_CONFIG_BYTES or offset % 4 + size > 4:
            return False
        with self._lock:
            before = bytes(self._bytes[offset : offset + size])
            decoded = self.memory_enabled
            for position, value in enumerate(data, offset):
                mask = self._writable[position]
                self._bytes[position] = self._bytes[position] & ~mask | value & mask
            self._was_enabled |= bool(self._bytes[COMMAND] & MEMORY_ENABLE)
            changed = decoded != self.memory_enabled
            if BAR0 <= offset < BAR0 + 4 * BARS:
                register = offset & ~3
                sizing = data == b"\xff\xff\xff\xff"
                changed |= sizing != (register in self._sizing) or before != self._bytes[offset : offset + size]
                (self._sizing.add if sizing else self._sizing.discard)(register)
            self.layout_version += changed
            return changed

    def patch(self, offset: int, data: bytes) -> None:
        """The function's own write, past the guest's mask. Not saved unless the guest's mask covers it."""
        with self._lock:
            self._bytes[offset : offset + len(data)] = data

    @property
    def memory_enabled(self) -> bool:
        """Whether memory BARs decode."""
        return not self._was_enabled or bool(self._bytes[COMMAND] & MEMORY_ENABLE)

    @property
    def bus_master(self) -> bool:
        """Whether the function may touch memory and send messages."""
        return bool(self._bytes[COMMAND] & BUS_MASTER)

    @staticmethod
    def holds_command(offset: int, size: int) -> bool:
        """Whether an access reaches the command register."""
        return offset < COMMAND + 2 and offset + size > COMMAND

    def bar_address(self, index: int) -> int:
        """The address that the BAR's registers hold now, wherever it may be mapped."""
        register = BAR0 + 4 * index
        width = 8 if self.bars[index].is_64bit else 4
        return int.from_bytes(self.read(register, width), "little") & ~0xF

    def set_bar_address(self, index: int, address: int) -> None:
        """The VMM's assignment before boot."""
        bar = self.bars[index]
        kind = (MEMORY_64BIT if bar.is_64bit else 0) | (PREFETCHABLE if bar.prefetchable else 0)
        self.patch(BAR0 + 4 * index, (address | kind).to_bytes(8 if bar.is_64bit else 4, "little"))
        self.layout_version += 1

    def decoded_address(self, index: int) -> int | None:
        """Where the guest wants the BAR to decode, or None: memory off, or the BAR is being sized."""
        register = BAR0 + 4 * index
        halves = {register, register + 4} if self.bars[index].is_64bit else {register}
        if not self.memory_enabled or halves & self._sizing:
            return None
        return self.bar_address(index)

    # --- state -------------------------------------------------------------------------------------------

    def save(self) -> PciConfigState:
        with self._lock:
            return PciConfigState(bytes(self._bytes), self._was_enabled, tuple(sorted(self._sizing)))

    def check(self, state: PciConfigState, where: str) -> None:
        """:raises ProtocolError: when it is another device's, or says what no guest can have written."""
        differs = _number(self._bytes) ^ _number(state.registers)
        if differs & ~_number(self._writable):
            at = next(
                at
                for at, (own, mask, saved) in enumerate(zip(self._bytes, self._writable, state.registers, strict=True))
                if (own ^ saved) & ~mask & 0xFF
            )
            wanted = f"{self._bytes[at]:#x}, which no guest can change"
            raise refused(f"{where}.registers[{at:#x}]", hex(state.registers[at]), wanted)
        if state.registers[COMMAND] & MEMORY_ENABLE and not state.was_enabled:
            raise refused(f"{where}.was_enabled", False, "true where memory is enabled")
        for each in state.sizing:
            if each not in range(BAR0, BAR0 + 4 * BARS, 4) or state.sizing.count(each) > 1:
                raise refused(f"{where}.sizing", state.sizing, "registers of BARs, each at most once")

    def load(self, state: PciConfigState) -> None:
        """Take over what :meth:`check` has passed. The caller places the BARs again (``PciBus.place``)."""
        with self._lock:
            self._bytes[:] = state.registers
            self._was_enabled = state.was_enabled
            self._sizing = set(state.sizing)
            self.layout_version += 1


def _number(registers: bytes | bytearray) -> int:
    return int.from_bytes(registers, "big")
