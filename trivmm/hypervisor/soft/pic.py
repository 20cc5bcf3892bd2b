"""The chips of an old PC that guests still calibrate with: two 8259s, a PIT (8254, channels 0 and 2), port 0x61.

Pure state, called by the vCPU's thread with the time as an argument, and saved as the VM-wide part of a soft VM.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

__all__ = ["PIT_HZ", "PORTS", "LegacyChips"]

PIT_HZ: Final = 1_193_182
PORTS: Final = frozenset({0x20, 0x21, 0xA0, 0xA1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x4D0, 0x4D1})


@attrs.define(eq=False)
class Pic:
    """One 8259A, edge triggered."""

    base: int = 0
    irr: int = 0
    isr: int = 0
    imr: int = 0
    init_step: int = 0
    needs_icw4: bool = False
    auto_eoi: bool = False
    read_isr: bool = False
    elcr: int = 0

    def write(self, odd: bool, value: int) -> None:
        if not odd:
            if value & 0x10:
                self.irr = self.isr = self.imr = 0
                self.read_isr = self.auto_eoi = False
                self.init_step, self.needs_icw4 = 2, bool(value & 1)
            elif value & 0x08:
                if value & 2:
                    self.read_isr = bool(value & 1)
            elif value & 0x20:
                self.isr &= ~(1 << (value & 7)) if value & 0x40 else ~(self.isr & -self.isr)
        elif self.init_step == 2:
            self.base, self.init_step = value & 0xF8, 3
        elif self.init_step == 3:
            self.init_step = 4 if self.needs_icw4 else 0
        elif self.init_step == 4:
            self.auto_eoi, self.init_step = bool(value & 2), 0
        else:
            self.imr = value

    def read(self, odd: bool) -> int:
        if odd:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def pending(self) -> int | None:
        """The line to serve next: the lowest one that is asked, open, and below everything in service."""
        asked = self.irr & ~self.imr
        if not asked:
            return None
        line = (asked & -asked).bit_length() - 1
        return line if not self.isr & ((1 << line + 1) - 1) else None

    def acknowledge(self, line: int) -> int:
        self.irr &= ~(1 << line)
        if not self.auto_eoi:
            self.isr |= 1 << line
        return self.base + line


@attrs.define(eq=False)
class Channel:
    """A PIT counter. ``started`` in nanoseconds; counts from ``reload`` down at PIT_HZ."""

    mode: int = 0
    access: int = 3
    reload: int = 0x10000
    started: int = 0
    low: int = -1  # the first byte of a two-byte write, or -1
    latched: int = -1
    read_high: bool = False
    running: bool = False
    fired: int = 0  # periods that raised their interrupt

    def ticks(self, now: int) -> int:
        return (now - self.started) * PIT_HZ // 1_000_000_000 if self.running else 0

    def count(self, now: int) -> int:
        ticks = self.ticks(now)
        if self.mode in (2, 3):
            step = ticks % self.reload
            return (self.reload - (step * 2 % self.reload if self.mode == 3 else step)) & 0xFFFF
        return (self.reload - ticks) & 0xFFFF

    def output(self, now: int) -> bool:
        ticks = self.ticks(now)
        if self.mode == 3:
            return ticks % self.reload < (self.reload + 1) // 2
        if self.mode == 2:
            return ticks % self.reload != self.reload - 1
        return self.running and ticks >= self.reload

    def write(self, value: int, now: int) -> None:
        if self.access == 3 and self.low < 0:
            self.low = value
            if self.mode == 0:
                self.running = False
            return
        count = {1: value, 2: value << 8}.get(self.access, self.low | value << 8)
        self.low = -1
        self.reload, self.started, self.running, self.fired = count or 0x10000, now, True, 0

    def read(self, now: int) -> int:
        count = self.count(now) if self.latched < 0 else self.latched
        high = self.access == 2 or (self.access == 3 and self.read_high)
        if self.access == 3:
            self.read_high = not self.read_high
        if self.latched >= 0 and (self.access != 3 or high):
            self.latched = -1
        return count >> 8 & 0xFF if high else count & 0xFF

    def next_interrupt(self) -> int | None:
        """When output next rises, in nanoseconds, or None when it will not again."""
        if not self.running or (self.mode not in (2, 3) and self.fired):
            return None
        return self.started + ((self.fired + 1) * self.reload * 1_000_000_000 + PIT_HZ - 1) // PIT_HZ


@attrs.define(eq=False)
class LegacyChips:
    master: Pic = attrs.field(factory=Pic)
    slave: Pic = attrs.field(factory=Pic)
    timer: Channel = attrs.field(factory=Channel)
    speaker: Channel = attrs.field(factory=Channel)
    port61: int = 0

    def raise_line(self, line: int) -> None:
        """An edge on ISA line 0..15."""
        if line < 8:
            self.master.irr |= 1 << line
        elif line < 16:
            self.slave.irr |= 1 << (line - 8)

    def pending(self) -> bool:
        self._cascade()
        return self.master.pending() is not None

    def _cascade(self) -> None:
        if self.slave.pending() is not None:
            self.master.irr |= 4
        else:
            self.master.irr &= ~4

    def acknowledge(self) -> int:
        """The vector, as the CPU's INTA cycle gets it; a spurious one when the line went away."""
        self._cascade()
        line = self.master.pending()
        if line is None:
            return self.master.base + 7
        vector = self.master.acknowledge(line)
        if line != 2:
            return vector
        below = self.slave.pending()
        return self.slave.base + 7 if below is None else self.slave.acknowledge(below)

    # --- time ------------------------------------------------------------------------------------------------

    def tick(self, now: int) -> bool:
        """Whether the PIT's output rose: IRQ 0, which is on the 8259 already."""
        due = self.timer.next_interrupt()
        if due is None or now < due:
            return False
        self.timer.fired = max(self.timer.fired + 1, self.timer.ticks(now) // self.timer.reload)
        self.raise_line(0)
        return True

    # --- ports -----------------------------------------------------------------------------------------------

    def read(self, port: int, now: int) -> int:
        match port:
            case 0x20 | 0x21:
                return self.master.read(bool(port & 1))
            case 0xA0 | 0xA1:
                return self.slave.read(bool(port & 1))
            case 0x40:
                return self.timer.read(now)
            case 0x42:
                return self.speaker.read(now)
            case 0x61:
                refresh = now // 15_085 & 1  # the refresh toggle, which old delay loops count
                return self.port61 & 0x0F | refresh << 4 | self.speaker.output(now) << 5
            case 0x4D0:
                return self.master.elcr
            case 0x4D1:
                return self.slave.elcr
            case _:
                return 0xFF

    def write(self, port: int, value: int, now: int) -> None:
        match port:
            case 0x20 | 0x21:
                self.master.write(bool(port & 1), value)
            case 0xA0 | 0xA1:
                self.slave.write(bool(port & 1), value)
            case 0x40:
                self.timer.write(value, now)
            case 0x42:
                self.speaker.write(value, now)
            case 0x43:
                self._control(value, now)
            case 0x61:
                if value & 1 and not self.port61 & 1:  # a rising gate restarts the counter
                    self.speaker.started, self.speaker.running = now, True
                elif not value & 1:
                    self.speaker.running = False
                self.port61 = value & 0x0F
            case 0x4D0:
                self.master.elcr = value
            case 0x4D1:
                self.slave.elcr = value
            case _:
                pass

    def _control(self, value: int, now: int) -> None:
        if value >> 6 == 3:  # read-back: counts of the named channels, when asked for
            if not value & 0x20:
                for bit, each in ((2, self.timer), (8, self.speaker)):
                    if value & bit:
                        each.latched = each.count(now)
            return
        channel = {0: self.timer, 2: self.speaker}.get(value >> 6)
        if channel is None:
            return
        access = value >> 4 & 3
        if access == 0:
            channel.latched = channel.count(now)
            return
        mode = value >> 1 & 7
        channel.access, channel.mode = access, mode if mode < 6 else mode - 4
        channel.low, channel.latched, channel.read_high, channel.running = -1, -1, False, False

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self, now: int) -> dict[str, Any]:
        def channel(which: Channel) -> dict[str, Any]:
            return {**attrs.asdict(which), "started": now - which.started}

        return {
            "master": attrs.asdict(self.master),
            "slave": attrs.asdict(self.slave),
            "timer": channel(self.timer),
            "speaker": channel(self.speaker),
            "port61": self.port61,
        }

    def load(self, state: dict[str, Any], now: int) -> None:
        """:raises ValueError: also KeyError and TypeError, when this is not a state that :meth:`save` wrote."""
        master, slave = (_checked(Pic, state[name], 8) for name in ("master", "slave"))
        timer, speaker = (_checked(Channel, state[name], 63) for name in ("timer", "speaker"))
        for each in (timer, speaker):
            if not 0 < each.reload <= 0x10000 or not 0 <= each.mode < 6:
                raise ValueError("a PIT counter without a period")
            each.started = now - each.started
        port61 = int(state["port61"]) & 0x0F
        self.master, self.slave, self.timer, self.speaker, self.port61 = master, slave, timer, speaker, port61


def _checked(kind: Any, values: dict[str, Any], bits: int) -> Any:
    for field in attrs.fields(kind):
        value = values[field.name]
        wanted = bool if isinstance(field.default, bool) else int
        if type(value) is not wanted or not -1 <= value < 1 << bits:
            raise ValueError(f"{field.name} = {value!r}")
    return kind(**{field.name: values[field.name] for field in attrs.fields(kind)})
