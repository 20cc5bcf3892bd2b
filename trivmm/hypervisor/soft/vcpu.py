"""The soft vCPU: slices of emulated code, and between them kicks, interrupts, timers and the guest's writes.

Everything here runs on the vCPU's thread, except :meth:`SoftVcpu.kick` and :meth:`SoftVcpu.wake`; the engine is used
in its turn only. A slice ends after :data:`SLICE` instructions, at a port or MMIO write, an exception, HLT or when
somebody asks the gate: always between two instructions. So a write is served before the next instruction begins; reads
are answered inside the instruction (:mod:`trivmm.hypervisor.soft.accesses`). All but the first vCPU begin by waiting
for a STARTUP IPI, as hardware's do.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from trivmm._native import ffi, lib
from trivmm.bus.bus import Bus
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import (
    INTERRUPTED,
    Crashed,
    LongModeEntry,
    Outcome,
    PvhEntry,
    ThreadVcpu,
    VcpuState,
    triple_fault,
)
from trivmm.hypervisor.soft import registers
from trivmm.hypervisor.soft.accesses import Accesses, Undo
from trivmm.hypervisor.soft.delivery import Event, Shutdown, deliver, syscall
from trivmm.hypervisor.soft.engine import Engine, Stop
from trivmm.hypervisor.soft.env import CS, EFER_SCE, ENGINE_VERSION, FLAG_IF, HF_CS64, HF_INHIBIT_IRQ
from trivmm.hypervisor.soft.paging import GuestFault, Virtual

if TYPE_CHECKING:
    from trivmm.hypervisor.soft.lapic import Lapic
    from trivmm.hypervisor.soft.vm import SoftVm

__all__ = ["SoftVcpu"]

SLICE: Final = 20_000  # instructions between two looks at timers and interrupt sources: about 0.2 ms
SLICE_MASKED: Final = 500  # the same while an interrupt waits for the guest to open its flag; twice that the next time
HALT_SLICE_S: Final = 1.0  # a halted vCPU looks around at least this often, even if a wake were lost
STATE_KIND: Final = f"soft/2/{'.'.join(map(str, ENGINE_VERSION))}"

MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
SYSCALL_BYTES: Final = 2
NMI_VECTOR: Final = 2
INVALID_OPCODE: Final = 6
PROTECTION: Final = 13
CODE_BYTES: Final = 16


class SoftVcpu(ThreadVcpu):
    """``sources``: what a sleeping one watches as well, readable when an interrupt source is."""

    def __init__(self, vm: SoftVm, engine: Engine, lapic: Lapic, sources: int) -> None:
        self.index = lapic.index
        self._vm = vm
        self._lapic = lapic
        self._chips = vm.chips
        self._engine = engine
        self._accesses = Accesses(vm, engine, lapic)
        self._registers = engine.add_cpu()
        self._gate = engine.gate
        if self.index == 0:
            # The engine translates code, and what a disk is read into may be code.
            self.write_hook = ffi.addressof(lib, "tv_soft_gate_code"), self._gate
        self.asleep = False  # changed by whoever has the turn
        self._halted = self._deaf = False  # deaf: halted with interrupts off
        self._waits_for_startup = self.index > 0
        self._masked = SLICE_MASKED
        self._kicked = False
        self._closed = False
        self._closing = threading.Lock()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._park = select.poll()
        self._park.register(self.kick_fd, select.POLLIN)
        self._sleep = select.poll()
        for fd in (self.kick_fd, sources):
            self._sleep.register(fd, select.POLLIN)
        with self._turn():
            registers.set_reset(engine.reset())
            engine.commit()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """For calls of the VMM. :raises HypervisorError: another vCPU keeps the engine."""
        with self._vm.turns.hold():
            self._engine.select(self._registers, self._accesses)
            yield

    # --- any thread ------------------------------------------------------------------------------------------

    def kick(self) -> None:
        # Order: the word, then the two wakers. The vCPU clears its gate before it reads the word.
        with self._closing:
            if self._closed:
                return
            self._kicked = True
            os.eventfd_write(self.kick_fd, 1)
            lib.tv_soft_gate_ask(self._gate)  # whoever runs looks around
            self._vm.turns.wake()

    def wake(self) -> None:
        """Out of its sleep, to look around."""
        with self._closing:
            if not self._closed:
                os.eventfd_write(self.kick_fd, 1)

    def is_called(self) -> bool:
        """Whether a sleeping one has got something to do. Who has the turn."""
        if self._waits_for_startup:
            return self._lapic.startup is not None
        return self._lapic.init or self._lapic.nmi or (not self._deaf and self._vm.interrupt_waits(self._lapic))

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

    def run(self, bus: Bus) -> Outcome:
        turns = self._vm.turns
        while True:
            effect = self._accesses.serve(bus)
            if effect is not None:
                return effect
            if self._take_kick() or not turns.take(self, self._is_kicked):
                self._take_kick()
                return INTERRUPTED
            try:
                self._engine.select(self._registers, self._accesses)
                outcome = self._slice(bus)
                until_s = self._sleep_s() if outcome is None and self.asleep else None
                self._vm.rouse()
            except Shutdown:
                return triple_fault(self._describe())
            finally:
                turns.release()
            if outcome is not None:
                return outcome
            if until_s is not None:
                self._sleep.poll(until_s * 1000)
                if not self._kicked:
                    self._drain()

    def _is_kicked(self) -> bool:
        return self._kicked

    def _slice(self, bus: Bus) -> Outcome | None:
        """One look around and one slice of guest code; it is ``asleep`` afterwards, or not. In its turn.

        :raises Shutdown:"""
        engine, gate, accesses, vm = self._engine, self._gate, self._accesses, self._vm
        self.asleep = False
        lib.tv_soft_gate_clear(gate)
        if self._kicked:
            return None  # the next round says so
        now = time.monotonic_ns()
        self._lapic.tick(now)
        if self._chips.tick(now):
            vm.pulse(0)
        vm.collect()
        if lib.tv_soft_gate_take_code(gate):
            engine.flush_code()
        if self._lapic.init or self._waits_for_startup:
            self._start_over()
            if self._waits_for_startup:
                self.asleep = True
                return None
        self._lapic.startup = None  # one that nobody waits for
        budget = SLICE
        if vm.interrupt_waits(self._lapic):
            budget = self._interrupt()
        if self._halted:
            self.asleep, self._deaf = True, not engine.rflags() & FLAG_IF
            return None
        stop = accesses.run(budget, bus)
        if vm.memory_fault is not None and (why := vm.memory_fault(stopped=False)) is not None:
            return Crashed(why, self._describe())
        undo = accesses.take_undo()
        if undo is not None:
            self._take_back(undo)
            return None
        match stop:
            case Stop.GATE:
                pass
            case Stop.HALT:
                self._halted = self._is_after_hlt()
            case Stop.EXCEPTION:
                self._exception(engine.exception)
            case Stop.SYSCALL:
                self._syscall()
            case Stop.INVALID:
                self._exception(INVALID_OPCODE)
            case _:
                what = f"the soft CPU gave up (error {engine.failure} of its engine) at {engine.rip:#x}"
                return Crashed(what, self._describe())
        return None

    def _start_over(self) -> None:
        """INIT, and STARTUP where it is there already. Intel SDM vol. 3, section 9.4."""
        lapic, engine = self._lapic, self._engine
        if lapic.init:
            startup = lapic.startup
            lapic.initialize()
            lapic.startup = startup
            self._halted = False
            self._waits_for_startup = self.index > 0
            registers.set_reset(engine.reset())
            engine.commit()
            engine.forget_addresses()
        if self._waits_for_startup:
            lapic.nmi = False
            if lapic.startup is not None:
                registers.set_startup(engine.fetch(), lapic.startup)
                engine.commit()
                self._waits_for_startup, lapic.startup = False, None

    def _sleep_s(self) -> float:
        """Until the next timer at most."""
        if self._waits_for_startup:
            return HALT_SLICE_S
        now = time.monotonic_ns()
        due = [each for each in (self._lapic.expires, self._vm.next_pit_interrupt()) if each is not None]
        return max(0.0, min([HALT_SLICE_S, *((each - now) / 1e9 for each in due)]))

    def finish(self, bus: Bus) -> Outcome:
        """Every stop lies between two instructions; only writes of the last one may still wait."""
        effect = self._accesses.serve(bus)
        if effect is not None:
            return effect
        self._take_kick()
        return INTERRUPTED

    def inject_nmi(self) -> None:
        if not self._waits_for_startup:
            self._lapic.nmi = True

    # --- interrupts and exceptions ---------------------------------------------------------------------------

    def _interrupt(self) -> int:
        """Deliver what waits, if the CPU takes it now. Gives the budget of the next slice. :raises Shutdown:"""
        env = self._engine.fetch()
        if env.hflags & HF_INHIBIT_IRQ and not self._halted:
            return 1  # after STI or MOV SS one more instruction runs undisturbed
        lapic = self._lapic
        if lapic.nmi:
            lapic.nmi = False
            event = Event(NMI_VECTOR, "interrupt")
        elif not env.eflags & FLAG_IF:
            budget, self._masked = self._masked, min(2 * self._masked, SLICE)  # firmware masks for its whole life
            return budget
        elif (vector := lapic.pending()) is not None:
            lapic.acknowledge(vector)
            event = Event(vector, "interrupt")
        else:
            event = Event(self._chips.acknowledge(), "interrupt")
        self._halted = False
        self._masked = SLICE_MASKED
        self._deliver(event)
        return SLICE

    def _exception(self, vector: int) -> None:
        env = self._engine.fetch()
        if env.exception_is_int and vector != INVALID_OPCODE:
            event = Event(vector, "software", length=self._int_length(vector))
        else:
            event = Event(vector, "exception", env.error_code & 0xFFFF_FFFF)
        env.exception_is_int = 0
        env.error_code = 0
        env.old_exception = -1  # delivered here; the emulator would take the next fault for one in this delivery
        self._deliver(event)

    def _deliver(self, event: Event) -> None:
        """Into the registers as fetched, and commit them. :raises Shutdown: the third fault in a row."""
        deliver(self._vm.physical, self._engine.env, self._engine.rflags(), event)
        self._engine.commit()

    def _take_back(self, undo: Undo) -> None:
        """A port access that the guest's rules forbid has not been, and the guest gets its #GP."""
        env = self._engine.fetch()
        env.eip = undo.eip
        env.regs[:] = list(undo.registers)
        self._engine.commit()
        env.exception_is_int = env.error_code = 0
        self._deliver(Event(PROTECTION, "exception"))

    def _syscall(self) -> None:
        env = self._engine.fetch()
        if not env.efer & EFER_SCE:
            env.eip -= SYSCALL_BYTES
            self._engine.commit()
            self._exception(INVALID_OPCODE)
            return
        target = self._engine.msr(MSR_LSTAR if env.hflags & HF_CS64 else MSR_CSTAR)
        syscall(env, self._engine.rflags(), self._engine.msr(MSR_STAR), target, self._engine.msr(MSR_FMASK))
        self._engine.commit()

    def _int_length(self, vector: int) -> int:
        """Bytes of the INT that was just executed: CD nn has two, CC and CE one."""
        code = self._code_at(self._engine.env.eip - 2, 2)
        return 2 if code == bytes((0xCD, vector)) else 1

    def _is_after_hlt(self) -> bool:
        """The engine came back unasked: for HLT, or for reasons of its own, after which it is simply run again."""
        env = self._engine.fetch()
        return self._code_at(env.eip - 1, 1) in (b"\xf4", b"")

    # --- registers -------------------------------------------------------------------------------------------

    def set_boot_state(self, entry: PvhEntry | LongModeEntry) -> None:
        with self._turn():
            if isinstance(entry, PvhEntry):
                registers.set_pvh(self._engine.reset(), entry)
            else:
                registers.set_long_mode(self._engine.reset(), entry)
            self._engine.commit()
            self._engine.flush()
        self._halted = self._waits_for_startup = False

    def save(self) -> VcpuState:
        if self._accesses.pending:
            raise HypervisorError("soft vCPU save", "an access of the guest is not served yet; finish it first")
        with self._turn():
            run = {
                "halted": self._halted,
                "waits_for_startup": self._waits_for_startup,
                "lapic": self._lapic.save(time.monotonic_ns()),
            }
            return VcpuState(STATE_KIND, {"cpu": self._engine.save(), "run": json.dumps(run).encode()})

    def load(self, state: VcpuState) -> None:
        if state.kind != STATE_KIND:
            raise HypervisorError(
                "soft vCPU state", f"saved by {state.kind!r}, this is {STATE_KIND!r}", "use the same engine version"
            )
        try:
            run = json.loads(state.blobs["run"])
            raw, halted, waits = state.blobs["cpu"], bool(run["halted"]), bool(run["waits_for_startup"])
            with self._turn():
                self._engine.load(raw)
                self._lapic.load(run["lapic"], time.monotonic_ns())
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise HypervisorError("soft vCPU state", f"it makes no sense ({error!r})") from error
        self._halted, self._waits_for_startup = halted, waits
        self._accesses.forget()

    def _code_at(self, rip: int, length: int) -> bytes:
        env = self._engine.env
        try:
            return Virtual(self._vm.physical, env).read(env.segs[CS].base + rip, length)
        except GuestFault:
            return b""

    def describe(self) -> str:
        if self._closed:
            return "closed"
        with self._turn():
            return self._describe()

    def _describe(self) -> str:
        env = self._engine.fetch()
        return registers.describe(env, self._engine.rflags(), self._code_at(env.eip, CODE_BYTES))

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._park.unregister(self.kick_fd)
        self._sleep.unregister(self.kick_fd)
        os.close(self.kick_fd)
