"""What a guest's port and MMIO accesses do on the soft CPU, in the middle of an instruction.

The engine calls here and wants its answer at once. Reads get it: from the interrupt controllers beside the CPU, or from
the bus. Writes to those controllers and to doorbells are carried out at once too. Any other write is kept, and the gate
asked: the instruction completes, the next one does not begin, and the write is served then (:meth:`Accesses.serve`). So
a vCPU that must park at a barrier has executed nothing past the write.

Everything here runs on the vCPU's thread, all but :meth:`Accesses.serve` while it has the turn.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs

from trivmm._native import lib
from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, Effect
from trivmm.hypervisor.soft.delivery import may_use_port
from trivmm.hypervisor.soft.engine import Engine
from trivmm.hypervisor.soft.ioapic import IOAPIC_SIZE
from trivmm.hypervisor.soft.lapic import ICR_LOW, LAPIC_SIZE, Lapic
from trivmm.hypervisor.soft.pic import PORTS
from trivmm.memory.layout import IOAPIC_START, LAPIC_START

if TYPE_CHECKING:
    from trivmm.hypervisor.soft.vm import SoftVm

__all__ = ["Accesses", "Undo"]

WIDEST: Final = 8  # bytes of one MMIO write


@attrs.frozen
class Undo:
    """RIP and general registers before an instruction that must not have been."""

    eip: int
    registers: tuple[int, ...]


@attrs.frozen
class _Write:
    """Of the instruction that just ended. ``address`` is a port or a guest physical address."""

    is_port: bool
    address: int
    data: bytes


class Accesses:
    """Between the engine, while it is one vCPU, and everything outside: its ``Handlers``."""

    def __init__(self, vm: SoftVm, engine: Engine, lapic: Lapic) -> None:
        self.engine = engine
        self._bus = Bus(AddressSpace("pio"), AddressSpace("mmio"))  # nobody's, until it runs
        self._vm = vm
        self._lapic = lapic
        self._chips = vm.chips
        self._gate = self.engine.gate
        self._writes: deque[_Write] = deque()
        self._rung_end = 0  # where a doorbell write of this instruction ended: its second half belongs to it
        self._undo: Undo | None = None

    # --- between two slices of guest code --------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether a write waits to be served."""
        return bool(self._writes)

    def serve(self, bus: Bus) -> Effect:
        """Serve what waits, in order, up to a write that asks for something."""
        while self._writes:
            write = self._writes.popleft()
            if write.is_port:
                effect = bus.write_port(write.address, len(write.data), write.data)
            else:
                effect = bus.write_mmio(write.address, write.data)
            if effect is not None:
                return effect
        return None

    def forget(self) -> None:
        """Another state was loaded: what waited was of the old one."""
        self._writes.clear()

    def run(self, budget: int, bus: Bus) -> str:
        """:meth:`Engine.run`, with reads served against ``bus``."""
        self._rung_end = 0
        self._bus = bus
        return self.engine.run(budget)

    def take_undo(self) -> Undo | None:
        """The last instruction used a port that it may not."""
        undo, self._undo = self._undo, None
        return undo

    # --- in the middle of an instruction ---------------------------------------------------------------------

    def read_mmio(self, gpa: int, size: int) -> int:
        if LAPIC_START <= gpa < LAPIC_START + LAPIC_SIZE:
            register = self._lapic.read(gpa & 0xFF0, time.monotonic_ns())
            return register >> (gpa & 3) * 8 & (1 << size * 8) - 1 if gpa & 0xF < 4 else 0
        if IOAPIC_START <= gpa < IOAPIC_START + IOAPIC_SIZE:
            return self._vm.ioapic.read(gpa & 0xFC) >> (gpa & 3) * 8 & (1 << size * 8) - 1
        return int.from_bytes(self._bus.read_mmio(gpa, size), "little")

    def write_mmio(self, gpa: int, size: int, value: int) -> None:
        if LAPIC_START <= gpa < LAPIC_START + LAPIC_SIZE:
            if gpa & 0xF == 0 and size == 4:
                self._lapic.write(gpa & 0xFF0, value, time.monotonic_ns())
                if gpa & 0xFF0 == ICR_LOW:
                    lib.tv_soft_gate_ask(self._gate)  # who gets it shall not wait for the end of this slice
                self._ask_if_deliverable()
            return
        if IOAPIC_START <= gpa < IOAPIC_START + IOAPIC_SIZE:
            if gpa & 3 == 0:  # the index may be written as a byte
                self._vm.ioapic.write(gpa & 0xFC, value & (1 << size * 8) - 1)
            return
        doorbell = self._vm.doorbells.get(gpa)
        if doorbell is not None:
            self._rung_end = gpa + size
            with suppress(OSError):  # saturated: it is readable, which is all that it says
                os.eventfd_write(doorbell, 1)
            return
        if gpa == self._rung_end:
            self._rung_end += size
            return
        data = (value & (1 << size * 8) - 1).to_bytes(size, "little")
        last = self._writes[-1] if self._writes else None
        if (
            last is not None
            and not last.is_port
            and last.address + len(last.data) == gpa
            and len(last.data) + size <= WIDEST
        ):
            # The engine splits what is wide or unaligned; the queue never holds more than one instruction's.
            self._writes[-1] = _Write(False, last.address, last.data + data)
        else:
            self._writes.append(_Write(False, gpa, data))
        lib.tv_soft_gate_ask(self._gate)

    def _denied(self, port: int, size: int) -> bool:
        """Ring 3 without the right to this port: the instruction is undone after it ended."""
        if not self.engine.ring():
            return False
        env = self.engine.fetch()
        if may_use_port(self._vm.physical, env, port, size):
            return False
        self._undo = Undo(env.eip, tuple(env.regs))
        lib.tv_soft_gate_ask(self._gate)
        return True

    def read_port(self, port: int, size: int) -> int:
        if self._denied(port, size):
            return 0
        if port in PORTS:
            return self._chips.read(port, time.monotonic_ns())
        return int.from_bytes(self._bus.read_port(port, size), "little")

    def write_port(self, port: int, size: int, value: int) -> None:
        if self._denied(port, size):
            return
        if port in PORTS:
            self._chips.write(port, value & 0xFF, time.monotonic_ns())
            self._ask_if_deliverable()
            return
        self._writes.append(_Write(True, port, (value & (1 << size * 8) - 1).to_bytes(size, "little")))
        lib.tv_soft_gate_ask(self._gate)

    def _ask_if_deliverable(self) -> None:
        if self._vm.interrupt_waits(self._lapic):
            lib.tv_soft_gate_ask(self._gate)
