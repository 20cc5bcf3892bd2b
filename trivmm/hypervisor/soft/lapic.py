"""The local APIC of a soft vCPU: xAPIC registers, interrupt priority, IPIs out and in, timer. Intel SDM vol. 3, ch. 11.

Pure state, changed by whoever has the turn, with the time as an argument. 256-bit registers are Python ints, a bit a
vector. Whom a message is for, its bus knows (:mod:`.apic_bus`). Not here: x2APIC, the TSC deadline (CPUID offers
neither).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

__all__ = ["ICR_LOW", "LAPIC_SIZE", "MODE_LOWEST", "TIMER_HZ", "Icr", "Lapic"]

LAPIC_SIZE: Final = 0x1000
TIMER_HZ: Final = 25_000_000  # the crystal of CPUID 15H, whose ratio guests compute in 32 bits
VERSION: Final = 0x0005_0014  # xAPIC, six LVT entries

LVT_MASKED: Final = 1 << 16
LVT_PERIODIC: Final = 1 << 17
LVT_DEADLINE: Final = 1 << 18
MODE_FIXED, MODE_LOWEST, MODE_NMI, MODE_INIT, MODE_STARTUP, MODE_EXTINT = 0, 1, 4, 5, 6, 7
ICR_ASSERT, ICR_LEVEL = 1 << 14, 1 << 15
SVR_ENABLED: Final = 1 << 8
PERIOD_MIN_NS: Final = 20_000  # a guest that asks for more ticks than this gets them late, not all

# Offsets.
ID, VERSION_AT, TPR, APR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1 = 0x320, 0x350, 0x360
LVTS: Final = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0


@attrs.frozen
class Icr:
    """What a write to the interrupt command register sends, and to whom. ``shorthand``: 1 to itself, 2 to all, 3 to
    all others, 0 to ``destination``."""

    vector: int
    mode: int
    destination: int
    logical: bool
    shorthand: int


def _reset_lvts(lapic: Lapic) -> dict[int, int]:
    lvts = dict.fromkeys(LVTS, LVT_MASKED)
    if lapic.index == 0:
        lvts[LVT_LINT0] = MODE_EXTINT << 8  # the boot CPU's LINT0 passes the 8259's interrupts from reset on
    return lvts


@attrs.define(eq=False)
class Lapic:
    """``now`` arguments are nanoseconds of one monotonic clock. ``on_eoi(vector)`` is told of the EOI broadcast,
    ``on_ipi(lapic, icr)`` of what the guest sends. ``init`` and ``startup`` (its vector) wait for their vCPU."""

    on_eoi: Callable[[int], None]
    on_ipi: Callable[[Lapic, Icr], None]
    index: int
    apic_id: int = attrs.field(default=attrs.Factory(lambda self: self.index, takes_self=True))
    tpr: int = 0
    ldr: int = 0
    dfr: int = 0xFFFF_FFFF
    svr: int = 0xFF
    isr: int = 0
    irr: int = 0
    esr: int = 0
    icr: int = 0
    lvts: dict[int, int] = attrs.field(default=attrs.Factory(_reset_lvts, takes_self=True))
    divide: int = 0
    initial: int = 0
    armed_at: int = 0
    expires: int | None = None
    nmi: bool = False
    init: bool = False
    startup: int | None = None

    # --- the guest's side ------------------------------------------------------------------------------------

    def read(self, offset: int, now: int) -> int:
        """The 32-bit register at ``offset`` (a multiple of 16)."""
        match offset:
            case _ if offset in self.lvts:
                return self.lvts[offset]
            case _ if ISR <= offset < ISR + 0x80:
                return self.isr >> ((offset - ISR) >> 4) * 32 & 0xFFFF_FFFF
            case _ if IRR <= offset < IRR + 0x80:
                return self.irr >> ((offset - IRR) >> 4) * 32 & 0xFFFF_FFFF
            case 0x20:
                return self.apic_id << 24
            case 0x30:
                return VERSION
            case 0x80:
                return self.tpr
            case 0xA0:
                return self.ppr
            case 0xD0:
                return self.ldr
            case 0xE0:
                return self.dfr
            case 0xF0:
                return self.svr
            case 0x280:
                return self.esr
            case 0x300:
                return self.icr & 0xFFFF_FFFF
            case 0x310:
                return self.icr >> 32
            case 0x380:
                return self.initial
            case 0x390:
                return self._current(now)
            case 0x3E0:
                return self.divide
            case _:
                return 0

    def write(self, offset: int, value: int, now: int) -> None:
        match offset:
            case 0x20:
                self.apic_id = value >> 24
            case 0x80:
                self.tpr = value & 0xFF
            case 0xB0:
                self.eoi()
            case 0xD0:
                self.ldr = value & 0xFF00_0000
            case 0xE0:
                self.dfr = value | 0x0FFF_FFFF
            case 0xF0:
                self.svr = value & 0x1FF
                if not value & SVR_ENABLED:
                    for lvt in self.lvts:
                        self.lvts[lvt] |= LVT_MASKED
            case 0x280:
                self.esr = 0
            case 0x300:
                self.icr = self.icr & ~0xFFFF_FFFF | value & ~(1 << 12)
                self._send()
            case 0x310:
                self.icr = self.icr & 0xFFFF_FFFF | (value & 0xFF00_0000) << 32
            case 0x380:
                self.initial = value
                self._arm(now)
            case 0x3E0:
                self.divide = value & 0xB
            case _ if offset in self.lvts:
                masked = 0 if self.svr & SVR_ENABLED else LVT_MASKED
                self.lvts[offset] = value & 0x7_F7FF | masked

    def _send(self) -> None:
        low = self.icr & 0xFFFF_FFFF
        mode = low >> 8 & 7
        if mode == MODE_INIT and low & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL:
            return  # the de-assertion, which only old CPUs knew
        self.on_ipi(self, Icr(low & 0xFF, mode, self.icr >> 56, bool(low & 1 << 11), low >> 18 & 3))

    def initialize(self) -> None:
        """What INIT makes of it: as after a reset, but for its id. Section 11.4.7.3."""
        fresh = Lapic(self.on_eoi, self.on_ipi, self.index, self.apic_id)
        for field in attrs.fields(Lapic):
            setattr(self, field.name, getattr(fresh, field.name))

    # --- from the bus ----------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return bool(self.svr & SVR_ENABLED)

    def is_addressed(self, destination: int, logical: bool) -> bool:
        if destination == 0xFF:
            return True
        if not logical:
            return destination == self.apic_id
        mine = self.ldr >> 24
        if self.dfr >> 28 == 0xF:
            return bool(destination & mine)
        return destination >> 4 == mine >> 4 and bool(destination & mine & 0xF)

    def accept(self, mode: int, vector: int) -> None:
        if mode == MODE_NMI:
            self.nmi = True
        elif mode == MODE_INIT:
            self.init, self.startup = True, None
        elif mode == MODE_STARTUP:
            self.startup = vector
        elif mode in (MODE_FIXED, MODE_LOWEST):
            if vector < 16:
                self.esr |= 1 << 6
            elif self.svr & SVR_ENABLED:
                self.irr |= 1 << vector

    def takes_extint(self) -> bool:
        """Whether the 8259's output reaches the CPU: LINT0 open, in ExtINT mode."""
        lint0 = self.lvts[LVT_LINT0]
        return not lint0 & LVT_MASKED and lint0 >> 8 & 7 == MODE_EXTINT

    @property
    def ppr(self) -> int:
        serving = (self.isr.bit_length() - 1) & 0xF0 if self.isr else 0
        return self.tpr if self.tpr >> 4 >= serving >> 4 else serving

    def pending(self) -> int | None:
        """The vector to deliver next, if one passes the priority."""
        if not self.irr or not self.svr & SVR_ENABLED:
            return None
        vector = self.irr.bit_length() - 1
        return vector if vector >> 4 > self.ppr >> 4 else None

    def acknowledge(self, vector: int) -> None:
        self.irr &= ~(1 << vector)
        self.isr |= 1 << vector

    def eoi(self) -> None:
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        self.isr &= ~(1 << vector)
        self.on_eoi(vector)

    # --- timer -----------------------------------------------------------------------------------------------

    def _divisor(self) -> int:
        code = (self.divide & 3) | self.divide >> 1 & 4
        return 1 if code == 7 else 2 << code

    def _span(self) -> int:
        return self.initial * self._divisor() * 1_000_000_000 // TIMER_HZ

    def _arm(self, now: int) -> None:
        self.armed_at = now
        self.expires = now + self._span() if self.initial and not self.lvts[LVT_TIMER] & LVT_DEADLINE else None

    def _current(self, now: int) -> int:
        if self.expires is None or now >= self.expires:
            return 0
        return (self.expires - now) * TIMER_HZ // 1_000_000_000 // self._divisor()

    def tick(self, now: int) -> None:
        """Fire the timer if it is due. Periods that passed unseen fire once."""
        if self.expires is None or now < self.expires:
            return
        lvt = self.lvts[LVT_TIMER]
        if lvt & LVT_PERIODIC:
            period = max(self._span(), PERIOD_MIN_NS)
            self.expires += period * ((now - self.expires) // period + 1)
        else:
            self.expires = None
        if not lvt & LVT_MASKED:
            self.accept(MODE_FIXED, lvt & 0xFF)

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self, now: int) -> dict[str, Any]:
        """Plain data; the timer as the time that is left."""
        left = None if self.expires is None else max(0, self.expires - now)
        return {
            **{name: getattr(self, name) for name in _WORDS},
            "isr": f"{self.isr:x}",
            "irr": f"{self.irr:x}",
            "nmi": self.nmi,
            "init": self.init,
            "startup": self.startup,
            "lvts": [self.lvts[each] for each in LVTS],
            "timer_left_ns": left,
        }

    def load(self, state: dict[str, Any], now: int) -> None:
        """:raises ValueError: also KeyError and TypeError, when this is not a state that :meth:`save` wrote."""
        for name in _WORDS:
            setattr(self, name, _word(state[name], 64))
        self.isr, self.irr = (_word(int(state[name], 16), 256) for name in ("isr", "irr"))
        self.nmi, self.init = bool(state["nmi"]), bool(state["init"])
        self.startup = None if state["startup"] is None else _word(state["startup"], 8)
        values = [_word(each, 32) for each in state["lvts"]]
        self.lvts = dict(zip(LVTS, values, strict=True))
        left = state["timer_left_ns"]
        self.expires = None if left is None else now + _word(left, 63)


_WORDS: Final = ("apic_id", "tpr", "ldr", "dfr", "svr", "esr", "icr", "divide", "initial")


def _word(value: object, bits: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or value >> bits:
        raise ValueError(f"{value!r} is not a number of {bits} bits")
    return value
