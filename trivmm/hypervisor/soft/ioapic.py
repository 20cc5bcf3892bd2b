"""The I/O APIC of a soft VM: 24 lines, each one a message to the local APIC. Intel 82093AA data sheet.

Pure state of the vCPU's thread. Lines come as pulses (an eventfd has no level), as KVM takes an irqfd that does not
resample: a level-triggered entry that is still in service swallows them. Not here: ExtINT and SMI entries, which
deliver nothing.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

__all__ = ["IOAPIC_SIZE", "IoApic"]

IOAPIC_SIZE: Final = 0x100
PINS: Final = 24
VERSION: Final = (PINS - 1) << 16 | 0x11
REGSEL, WINDOW = 0x00, 0x10
ID, VERSION_AT, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10

REMOTE_IRR: Final = 1 << 14
LEVEL: Final = 1 << 15
MASKED: Final = 1 << 16
LOGICAL: Final = 1 << 11
READ_ONLY: Final = REMOTE_IRR | 1 << 12  # and the delivery status, which is never pending here
WRITABLE: Final = 0xFF00_0000_0001_FFFF & ~READ_ONLY
MESSAGE_BASE: Final = 0xFEE0_0000


def _masked_table() -> list[int]:
    return [MASKED] * PINS


@attrs.define(eq=False)
class IoApic:
    """``table``: the redirection entries, as 64-bit numbers."""

    select: int = 0
    ident: int = 0
    table: list[int] = attrs.field(factory=_masked_table)

    def read(self, offset: int) -> int:
        """The 32-bit register at ``offset``."""
        if offset == REGSEL:
            return self.select
        if offset != WINDOW:
            return 0
        match self.select:
            case 0x00 | 0x02:
                return self.ident << 24
            case 0x01:
                return VERSION
            case index if TABLE <= index < TABLE + 2 * PINS:
                return self.table[(index - TABLE) // 2] >> (index & 1) * 32 & 0xFFFF_FFFF
            case _:
                return 0

    def write(self, offset: int, value: int) -> None:
        if offset == REGSEL:
            self.select = value & 0xFF
        elif offset == WINDOW and self.select == ID:
            self.ident = value >> 24 & 0xF
        elif offset == WINDOW and TABLE <= self.select < TABLE + 2 * PINS:
            pin, shift = (self.select - TABLE) // 2, (self.select & 1) * 32
            entry = self.table[pin] & ~(0xFFFF_FFFF << shift) | value << shift
            entry = entry & WRITABLE | self.table[pin] & REMOTE_IRR
            self.table[pin] = entry if entry & LEVEL else entry & ~REMOTE_IRR

    def pulse(self, pin: int) -> tuple[int, int] | None:
        """A rising edge on a line. Gives the (address, data) of its message, or None when there is none."""
        if not 0 <= pin < PINS:
            return None
        entry = self.table[pin]
        mode = entry >> 8 & 7
        if entry & (MASKED | REMOTE_IRR) or mode not in (0, 1, 4):  # fixed, lowest priority, NMI
            return None
        if entry & LEVEL:
            self.table[pin] |= REMOTE_IRR
        address = MESSAGE_BASE | (entry >> 56) << 12 | (4 if entry & LOGICAL else 0)
        return address, mode << 8 | entry & 0xFF

    def is_open(self, pin: int) -> bool:
        return not self.table[pin] & MASKED

    def end_of_interrupt(self, vector: int) -> None:
        """The local APIC's broadcast: level-triggered entries with this vector may interrupt again."""
        for pin, entry in enumerate(self.table):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self.table[pin] = entry & ~REMOTE_IRR

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {"select": self.select, "ident": self.ident, "table": [f"{entry:x}" for entry in self.table]}

    def load(self, state: dict[str, Any]) -> None:
        """:raises ValueError: also KeyError and TypeError, when this is not a state that :meth:`save` wrote."""
        table = [int(entry, 16) for entry in state["table"]]
        if len(table) != PINS or any(entry < 0 or entry & ~(WRITABLE | REMOTE_IRR) for entry in table):
            raise ValueError("no redirection table")
        self.select, self.ident, self.table = int(state["select"]) & 0xFF, int(state["ident"]) & 0xF, table
