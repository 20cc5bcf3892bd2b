"""The soft vCPU: slices of emulated code, and between them kicks, interrupts, timers and exits.

Everything here runs on the vCPU's thread, except :meth:`SoftVcpu.kick` and :meth:`SoftVcpu.code_changed`. A slice
ends after :data:`SLICE` instructions, at a port or MMIO write, at an exception, at HLT or when somebody asks the
gate: always between two instructions. So a write leaves as an exit before the next instruction begins, and a vCPU
that must park at a barrier has executed nothing past the write. Reads are answered inside the instruction, through
``inline_handler``.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import (
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    ThreadVcpu,
    TripleFault,
    VcpuExit,
    VcpuState,
)
from trivmm.hypervisor.soft import registers
from trivmm.hypervisor.soft.delivery import Event, Shutdown, deliver, may_use_port, syscall
from trivmm.hypervisor.soft.engine import Engine, Stop
from trivmm.hypervisor.soft.env import (
    CS,
    EFER_SCE,
    ENGINE_VERSION,
    FLAG_IF,
    HF_CS64,
    HF_INHIBIT_IRQ,
)
from trivmm.hypervisor.soft.ioapic import IOAPIC_SIZE
from trivmm.hypervisor.soft.lapic import LAPIC_SIZE, TIMER_HZ
from trivmm.hypervisor.soft.paging import GuestFault, Virtual
from trivmm.hypervisor.soft.pic import PORTS
from trivmm.memory.layout import IOAPIC_START, LAPIC_START

if TYPE_CHECKING:
    from trivmm.hypervisor.soft.vm import SoftVm

__all__ = ["SoftVcpu"]

SLICE: Final = 20_000  # instructions between two looks at timers and interrupt sources: about 0.2 ms
SLICE_MASKED: Final = 500  # the same while an interrupt waits for the guest to open its flag
HALT_SLICE_S: Final = 1.0  # a halted vCPU looks around at least this often, even if a wake were lost
STATE_KIND: Final = f"soft/1/{'.'.join(map(str, ENGINE_VERSION))}"

MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
SYSCALL_BYTES: Final = 2
NMI_VECTOR: Final = 2
INVALID_OPCODE: Final = 6
PROTECTION: Final = 13
CODE_BYTES: Final = 16


class SoftVcpu(ThreadVcpu):
    def __init__(self, vm: SoftVm) -> None:
        self.index = 0
        self.inline_handler: Callable[[VcpuExit], bytes | None] | None = None
        self._vm = vm
        self._lapic = vm.lapic
        self._chips = vm.chips
        self._engine = Engine(self._read_mmio, self._write_mmio, self._read_port, self._write_port, TIMER_HZ)
        self._engine.map_ram(tuple(vm.slots.values()))
        self._gate = self._engine.gate
        # It translates code, and what a disk is read into may be code.
        self.write_hook = ffi.addressof(lib, "tv_soft_gate_code"), self._gate
        self._writes: deque[IoOut | MmioWrite] = deque()
        self._rung_end = 0  # where a doorbell write of this instruction ended: its second half belongs to it
        self._undo_to: tuple[int, tuple[int, ...]] | None = None  # (RIP, registers) before a forbidden port access
        self._halted = False
        self._kicked = False
        self._closed = False
        self._closing = threading.Lock()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._park = select.poll()
        self._park.register(self.kick_fd, select.POLLIN)
        registers.set_reset(self._engine.reset())
        self._engine.commit()

    # --- any thread ------------------------------------------------------------------------------------------

    def kick(self) -> None:
        # Order: the word, then the two wakers. The vCPU clears its gate before it reads the word.
        with self._closing:
            if self._closed:
                return
            self._kicked = True
            os.eventfd_write(self.kick_fd, 1)
            lib.tv_soft_gate_ask(self._gate)

    def code_changed(self) -> None:
        lib.tv_soft_gate_code(self._gate)

    # --- thread ----------------------------------------------------------------------------------------------

    def attach_thread(self) -> None:
        """Nothing to publish: a kick needs no thread id."""

    def detach_thread(self) -> None: ...

    def _take_kick(self) -> bool:
        if not self._kicked:
            return False
        self._kicked = False
        self._drain()
        return True

    def park(self, timeout_s: float) -> None:
        if not self._kicked:
            self._park.poll(max(0.0, timeout_s) * 1000)
        if not self._take_kick():
            self._drain()

    def _drain(self) -> None:
        # A kicker between its two lines may write later: one wake for nothing. A word set meanwhile is seen by the
        # next run() or park().
        with suppress(BlockingIOError):
            os.eventfd_read(self.kick_fd)

    def run(self) -> VcpuExit:
        engine, gate, vm = self._engine, self._gate, self._vm
        while True:
            if self._writes:
                return self._writes.popleft()
            lib.tv_soft_gate_clear(gate)
            if self._take_kick():
                return Interrupted()
            now = time.monotonic_ns()
            self._lapic.tick(now)
            if self._chips.tick(now):
                vm.pulse(0)
            vm.collect(0)
            if lib.tv_soft_gate_take_code(gate):
                engine.flush_code()
            budget = SLICE
            if self._interrupt_waits():
                try:
                    budget = self._interrupt()
                except Shutdown:
                    return TripleFault()
            if self._halted:
                self._halt()
                continue
            self._rung_end = 0
            stop = engine.run(budget)
            if self._undo_to is not None:
                undo, self._undo_to = self._undo_to, None
                ended = self._undo(*undo)
                if ended is not None:
                    return ended
                continue
            match stop:
                case Stop.GATE:
                    pass
                case Stop.HALT:
                    self._halted = self._is_after_hlt()
                case Stop.EXCEPTION:
                    ended = self._exception(engine.exception)
                    if ended is not None:
                        return ended
                case Stop.SYSCALL:
                    ended = self._syscall()
                    if ended is not None:
                        return ended
                case Stop.INVALID:
                    ended = self._exception(INVALID_OPCODE)
                    if ended is not None:
                        return ended
                case _:
                    return InternalError(1, (engine.failure, engine.rip))

    def run_immediate(self) -> VcpuExit:
        """Every stop lies between two instructions; only exits of the last one may still be queued."""
        if self._writes:
            return self._writes.popleft()
        self._take_kick()
        return Interrupted()

    def complete_read(self, data: bytes) -> None:
        raise HypervisorError("complete_read", "soft answers reads inline and never leaves the guest for one")

    def inject_nmi(self) -> None:
        self._lapic.nmi = True

    # --- interrupts and exceptions ---------------------------------------------------------------------------

    def _interrupt_waits(self) -> bool:
        lapic = self._lapic
        return lapic.nmi or lapic.pending() is not None or (self._chips.pending() and lapic.takes_extint())

    def _interrupt(self) -> int:
        """Deliver what waits, if the CPU takes it now. Gives the budget of the next slice."""
        env = self._engine.fetch()
        if env.hflags & HF_INHIBIT_IRQ and not self._halted:
            return 1  # after STI or MOV SS one more instruction runs undisturbed
        lapic = self._lapic
        if lapic.nmi:
            lapic.nmi = False
            event = Event(NMI_VECTOR, "interrupt")
        elif not env.eflags & FLAG_IF:
            return SLICE_MASKED
        elif (vector := lapic.pending()) is not None:
            lapic.acknowledge(vector)
            event = Event(vector, "interrupt")
        else:
            event = Event(self._chips.acknowledge(), "interrupt")
        self._halted = False
        deliver(self._vm.physical, env, self._engine.rflags(), event)
        self._engine.commit()
        return SLICE

    def _exception(self, vector: int) -> VcpuExit | None:
        env = self._engine.fetch()
        if env.exception_is_int and vector != INVALID_OPCODE:
            event = Event(vector, "software", length=self._int_length(vector))
        else:
            event = Event(vector, "exception", env.error_code & 0xFFFF_FFFF)
        env.exception_is_int = 0
        env.error_code = 0
        env.old_exception = -1  # delivered here; the emulator would take the next fault for one in this delivery
        return self._deliver(event)

    def _deliver(self, event: Event) -> VcpuExit | None:
        """Into the registers as fetched, and commit them."""
        try:
            deliver(self._vm.physical, self._engine.env, self._engine.rflags(), event)
        except Shutdown:
            return TripleFault()
        self._engine.commit()
        return None

    def _undo(self, eip: int, registers: tuple[int, ...]) -> VcpuExit | None:
        """Take back a port access that the guest's rules forbid, and give it the #GP."""
        env = self._engine.fetch()
        env.eip = eip
        env.regs[:] = list(registers)
        self._engine.commit()
        env.exception_is_int = env.error_code = 0
        return self._deliver(Event(PROTECTION, "exception"))

    def _syscall(self) -> VcpuExit | None:
        env = self._engine.fetch()
        if not env.efer & EFER_SCE:
            env.eip -= SYSCALL_BYTES
            self._engine.commit()
            return self._exception(INVALID_OPCODE)
        target = self._engine.msr(MSR_LSTAR if env.hflags & HF_CS64 else MSR_CSTAR)
        syscall(env, self._engine.rflags(), self._engine.msr(MSR_STAR), target, self._engine.msr(MSR_FMASK))
        self._engine.commit()
        return None

    def _int_length(self, vector: int) -> int:
        """Bytes of the INT that was just executed: CD nn has two, CC and CE one."""
        code = self._code_at(self._engine.env.eip - 2, 2)
        return 2 if code == bytes((0xCD, vector)) else 1

    def _is_after_hlt(self) -> bool:
        """The engine came back unasked: for HLT, or for reasons of its own, after which it is simply run again."""
        env = self._engine.fetch()
        return self._code_at(env.eip - 1, 1) in (b"\xf4", b"")

    def _halt(self) -> None:
        """Wait for an interrupt or a kick, at most until the next timer."""
        now = time.monotonic_ns()
        due = [each for each in (self._lapic.expires, self._vm.next_pit_interrupt()) if each is not None]
        wait_s = min([HALT_SLICE_S, *((each - now) / 1e9 for each in due)])
        if wait_s > 0:
            self._vm.collect(wait_s)

    # --- accesses, in the middle of an instruction -----------------------------------------------------------

    def _ask(self, access: IoIn | MmioRead, size: int) -> int:
        handler = self.inline_handler
        answer = handler(access) if handler is not None else None
        if answer is None:
            return (1 << size * 8) - 1
        return int.from_bytes(answer[:size], "little")

    def _read_mmio(self, gpa: int, size: int) -> int:
        if LAPIC_START <= gpa < LAPIC_START + LAPIC_SIZE:
            register = self._lapic.read(gpa & 0xFF0, time.monotonic_ns())
            return register >> (gpa & 3) * 8 & (1 << size * 8) - 1 if gpa & 0xF < 4 else 0
        if IOAPIC_START <= gpa < IOAPIC_START + IOAPIC_SIZE:
            return self._vm.ioapic.read(gpa & 0xFC) >> (gpa & 3) * 8 & (1 << size * 8) - 1
        return self._ask(MmioRead(gpa, size), size)

    def _write_mmio(self, gpa: int, size: int, value: int) -> None:
        if LAPIC_START <= gpa < LAPIC_START + LAPIC_SIZE:
            if gpa & 0xF == 0 and size == 4:
                self._lapic.write(gpa & 0xFF0, value, time.monotonic_ns())
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
        if type(last) is MmioWrite and last.gpa + len(last.data) == gpa and len(last.data) + size <= 8:
            # The engine splits what is wide or unaligned; the queue never holds more than one instruction's.
            self._writes[-1] = MmioWrite(last.gpa, last.data + data)
        else:
            self._writes.append(MmioWrite(gpa, data))
        lib.tv_soft_gate_ask(self._gate)

    def _denied(self, port: int, size: int) -> bool:
        """Ring 3 without the right to this port: the instruction is undone after it ended, see :meth:`_undo`."""
        if not self._engine.ring():
            return False
        env = self._engine.fetch()
        if may_use_port(self._vm.physical, env, port, size):
            return False
        self._undo_to = (env.eip, tuple(env.regs))
        lib.tv_soft_gate_ask(self._gate)
        return True

    def _read_port(self, port: int, size: int) -> int:
        if self._denied(port, size):
            return 0
        if port in PORTS:
            return self._chips.read(port, time.monotonic_ns())
        return self._ask(IoIn(port, size, 1), size)

    def _write_port(self, port: int, size: int, value: int) -> None:
        if self._denied(port, size):
            return
        if port in PORTS:
            self._chips.write(port, value & 0xFF, time.monotonic_ns())
            self._ask_if_deliverable()
            return
        self._writes.append(IoOut(port, size, (value & (1 << size * 8) - 1).to_bytes(size, "little")))
        lib.tv_soft_gate_ask(self._gate)

    def _ask_if_deliverable(self) -> None:
        if self._interrupt_waits():
            lib.tv_soft_gate_ask(self._gate)

    # --- registers -------------------------------------------------------------------------------------------

    def set_boot_state(self, entry_gpa: int, start_info_gpa: int) -> None:
        registers.set_pvh(self._engine.reset(), entry_gpa, start_info_gpa)
        self._engine.commit()
        self._engine.flush()
        self._halted = False

    def save(self) -> VcpuState:
        if self._writes:
            raise HypervisorError("soft vCPU save", "an access of the guest is not served yet; finish it first")
        run = {"halted": self._halted, "lapic": self._lapic.save(time.monotonic_ns())}
        return VcpuState(STATE_KIND, {"cpu": self._engine.save(), "run": json.dumps(run).encode()})

    def load(self, state: VcpuState) -> None:
        if state.kind != STATE_KIND:
            raise HypervisorError(
                "soft vCPU state", f"saved by {state.kind!r}, this is {STATE_KIND!r}", "use the same engine version"
            )
        try:
            run = json.loads(state.blobs["run"])
            raw, halted = state.blobs["cpu"], bool(run["halted"])
            self._engine.load(raw)
            self._lapic.load(run["lapic"], time.monotonic_ns())
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise HypervisorError("soft vCPU state", f"it makes no sense ({error!r})") from error
        self._halted = halted
        self._writes.clear()

    def _code_at(self, rip: int, length: int) -> bytes:
        env = self._engine.env
        try:
            return Virtual(self._vm.physical, env).read(env.segs[CS].base + rip, length)
        except GuestFault:
            return b""

    def describe(self) -> str:
        if self._closed:
            return "closed"
        env = self._engine.fetch()
        return registers.describe(env, self._engine.rflags(), self._code_at(env.eip, CODE_BYTES))

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._park.unregister(self.kick_fd)
        os.close(self.kick_fd)
        self._engine.close()
