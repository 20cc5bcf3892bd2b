"""The unicorn engine behind a few exact verbs: map, run so many instructions, read and write all registers.

One engine is all of a VM's CPUs: each has its own :class:`Registers`, and :meth:`Engine.select` puts one's in. So
translated code is shared, and whoever writes over code has it translated anew for all of them. It is used by one thread
at a time: the one whose turn it is.

The engine cannot be stopped safely from outside an instruction hook (see ``ffi/softgate.h``), so it never is: every
stop goes through the *gate*, which a C hook asks before each instruction. A port or MMIO callback asks the gate too:
the instruction completes and the next one does not begin.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

import attrs
import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.soft import cpuid
from trivmm.hypervisor.soft.env import CONTEXT_BYTES, ENGINE_VERSION, HEADER_BYTES, Env, merged, refusal

_unicorn: Any = unicorn  # its Python package is not typed

__all__ = ["PHYSICAL_END", "Engine", "Handlers", "Registers", "Slot", "Stop"]

PHYSICAL_END: Final = 1 << 40  # the engine's CPU has 40 physical address bits
PAGE: Final = 0x1000
_CTL_TLB_FLUSH: Final = uc_const.UC_CTL_TLB_FLUSH | uc_const.UC_CTL_IO_WRITE << 30


@attrs.frozen
class Slot:
    """``size`` bytes at host address ``hva`` are the guest's memory at ``gpa``; ``rom``: it can't write there."""

    gpa: int
    size: int
    hva: int
    rom: bool = False


class Stop:
    """Why :meth:`Engine.run` came back."""

    GATE: Final = "gate"  # budget spent, or somebody asked
    HALT: Final = "halt"
    EXCEPTION: Final = "exception"  # ``Engine.exception`` is its vector
    SYSCALL: Final = "syscall"  # the engine only steps over it
    INVALID: Final = "invalid"  # an instruction that the CPU does not have: #UD
    FAILED: Final = "failed"  # ``Engine.failure`` is the engine's error number


class Handlers(Protocol):
    """What a CPU does outside, called inside :meth:`Engine.run`, in the middle of an instruction."""

    def read_mmio(self, gpa: int, size: int) -> int: ...

    def write_mmio(self, gpa: int, size: int, value: int) -> None: ...

    def read_port(self, port: int, size: int) -> int: ...

    def write_port(self, port: int, size: int, value: int) -> None: ...


class Registers:
    """One CPU's, while another's are in the engine. ``env``: as last fetched."""

    def __init__(self, context: Any, index: int) -> None:
        self.context = context
        self.index = index
        self.address: int = context.context.value + HEADER_BYTES
        self.env = Env.from_address(self.address)


class Engine:
    """``crystal_hz`` is what the local APICs' timers count: CPUID tells it, and the TSC's ratio to it."""

    handlers: Handlers
    """The selected CPU's."""

    def __init__(self, crystal_hz: int) -> None:
        if tuple(_unicorn.__version__.split(".")[:3]) != tuple(str(part) for part in ENGINE_VERSION):
            wanted = ".".join(map(str, ENGINE_VERSION))
            raise HypervisorError(
                "unicorn", f"version {_unicorn.__version__} has another register layout", f"install unicorn=={wanted}"
            )
        self._uc: Any = _unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
        self._library: Any = _unicorn.unicorn_py3.unicorn.uclib
        context = self._uc.context_save()
        if context.size != HEADER_BYTES + CONTEXT_BYTES:
            raise HypervisorError("uc_context_size", f"{context.size} bytes is not this version's size")
        self._registers = Registers(context, 0)  # the engine's own, until add_cpu
        self._all: list[Registers] = []
        self._pristine = ctypes.string_at(self._registers.address, CONTEXT_BYTES)
        self.exception = 0
        self.failure = 0
        self._excepted = False
        self._syscalled = False
        self._rom_writes: list[tuple[int, bytes]] = []  # host address, what was there before
        self.gate = ffi.new("struct tv_soft_gate *")
        stop = ctypes.cast(self._library.uc_emu_stop, ctypes.c_void_p).value
        lib.tv_soft_gate_init(self.gate, stop)
        self._crystal_hz = crystal_hz
        self._clock = cpuid.Clock()
        self._add_gate()
        self._uc.ctl_exits_enabled(True)  # no address ends a run
        self._uc.hook_add(uc_const.UC_HOOK_INTR, self._on_exception)
        self._uc.hook_add(uc_const.UC_HOOK_INSN, self._on_syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        self._uc.hook_add(
            uc_const.UC_HOOK_INSN,
            lambda _uc, port, size, _data: self.handlers.read_port(port, size),
            None,
            1,
            0,
            x86.UC_X86_INS_IN,
        )
        self._uc.hook_add(
            uc_const.UC_HOOK_INSN,
            lambda _uc, port, size, value, _data: self.handlers.write_port(port, size, value),
            None,
            1,
            0,
            x86.UC_X86_INS_OUT,
        )

        self._uc.hook_add(uc_const.UC_HOOK_INSN, self._on_cpuid, None, 1, 0, x86.UC_X86_INS_CPUID)

    def _add_gate(self) -> None:
        handle = ctypes.c_size_t()
        status = self._library.uc_hook_add(
            self._uc._uch,
            ctypes.byref(handle),
            uc_const.UC_HOOK_CODE,
            ctypes.c_void_p(lib.tv_soft_gate_address()),
            ctypes.c_void_p(int(ffi.cast("uintptr_t", self.gate))),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
        if status:
            raise HypervisorError("uc_hook_add", f"error {status}")

    def _on_cpuid(self, uc: Any, _data: Any) -> int:
        leaf, subleaf, cr4 = (
            int(uc.reg_read(each)) for each in (x86.UC_X86_REG_EAX, x86.UC_X86_REG_ECX, x86.UC_X86_REG_CR4)
        )
        cpu, cpus = self._registers.index, len(self._all)
        answer = cpuid.answer(leaf, subleaf, cr4, self._clock, self._crystal_hz, cpu, cpus)
        if answer is None:
            return 0
        for register, value in zip(cpuid.REGISTERS, answer, strict=True):
            uc.reg_write(register, value)
        return 1

    def _on_syscall(self, _uc: Any, _data: Any) -> None:
        self._syscalled = True
        lib.tv_soft_gate_ask(self.gate)

    def _on_exception(self, _uc: Any, vector: int, _data: Any) -> None:
        # Called between instructions, so a stop from here is exact.
        self.exception = vector
        self._excepted = True
        self._uc.emu_stop()

    def map_memory(self, slots: tuple[Slot, ...]) -> None:
        """Every other address up to :data:`PHYSICAL_END` becomes MMIO, and so do writes to a ROM."""
        at = 0
        for slot in sorted(slots, key=lambda each: each.gpa):
            self._map_mmio(at, slot.gpa)
            rights = uc_const.UC_PROT_READ | uc_const.UC_PROT_EXEC if slot.rom else uc_const.UC_PROT_ALL
            self._uc.mem_map_ptr(slot.gpa, slot.size, rights, slot.hva)
            if slot.rom:
                self._watch_rom(slot)
            at = slot.gpa + slot.size
        self._map_mmio(at, PHYSICAL_END)

    def _watch_rom(self, rom: Slot) -> None:
        """The engine either ends at such a write or carries it out: it does, and :meth:`run` takes it back before the
        next instruction. (One instruction that writes there and reads it again sees its own write.)"""

        def written(_uc: Any, _kind: int, gpa: int, size: int, value: int, _data: Any) -> bool:
            inside = rom.gpa <= gpa and gpa + size <= rom.gpa + rom.size
            if inside:
                self._rom_writes.append((rom.hva + gpa - rom.gpa, ctypes.string_at(rom.hva + gpa - rom.gpa, size)))
                self.handlers.write_mmio(gpa, size, value)
            return inside

        self._uc.hook_add(uc_const.UC_HOOK_MEM_WRITE_PROT, written)

    def _map_mmio(self, start: int, end: int) -> None:
        if start >= end:
            return

        def read(_uc: Any, offset: int, size: int, _data: Any) -> int:
            return self.handlers.read_mmio(start + offset, size)

        def write(_uc: Any, offset: int, size: int, value: int, _data: Any) -> None:
            self.handlers.write_mmio(start + offset, size, value)

        self._uc.mmio_map(start, end - start, read, None, write, None)

    def run(self, budget: int) -> str:
        """Run at most ``budget`` instructions from RIP. Any stop lies between two instructions."""
        gate = self.gate
        gate.budget = budget
        gate.stopped = 0
        self._excepted = self._syscalled = False
        uc = self._uc
        try:
            uc.emu_start(uc.reg_read(x86.UC_X86_REG_RIP), 0)
        except _unicorn.UcError as error:
            if error.errno == uc_const.UC_ERR_INSN_INVALID:
                return Stop.INVALID
            self.failure = error.errno
            return Stop.FAILED
        finally:
            if self._rom_writes:
                self._restore_rom()
        if self._excepted:
            return Stop.EXCEPTION
        if self._syscalled:
            return Stop.SYSCALL
        return Stop.GATE if gate.stopped else Stop.HALT

    def _restore_rom(self) -> None:
        for hva, before in reversed(self._rom_writes):
            ctypes.memmove(hva, before, len(before))
        self._rom_writes.clear()

    # --- registers: only between runs ------------------------------------------------------------------------

    def add_cpu(self) -> Registers:
        """Registers of one more CPU, out of the engine's own reset."""
        made = Registers(self._uc.context_save(), len(self._all))
        ctypes.memmove(made.address, self._pristine, CONTEXT_BYTES)
        self._all.append(made)
        return made

    def select(self, registers: Registers, handlers: Handlers) -> None:
        """It is this CPU from now on."""
        self.handlers = handlers
        if registers is not self._registers:
            self._uc.context_update(self._registers.context)
            self._registers = registers
            self.commit()
            self.forget_addresses()

    @property
    def env(self) -> Env:
        """As last fetched."""
        return self._registers.env

    @property
    def rip(self) -> int:
        return int(self._uc.reg_read(x86.UC_X86_REG_RIP))

    def rflags(self) -> int:
        """All flags, the lazy arithmetic ones computed."""
        return int(self._uc.reg_read(x86.UC_X86_REG_EFLAGS))

    def ring(self) -> int:
        """The privilege level now; also inside a callback."""
        return int(self._uc.reg_read(x86.UC_X86_REG_CS)) & 3

    def msr(self, number: int) -> int:
        return int(self._uc.msr_read(number))

    def fetch(self) -> Env:
        """All registers; changes take effect with :meth:`commit`."""
        self._uc.context_update(self._registers.context)
        return self.env

    def commit(self) -> None:
        self._uc.context_restore(self._registers.context)

    def reset(self) -> Env:
        """The engine's own initial registers, fetched; :meth:`commit` them."""
        self.fetch()
        ctypes.memmove(self._registers.address, self._pristine, CONTEXT_BYTES)
        return self.env

    def save(self) -> bytes:
        env = self.fetch()
        for index in range(4):
            env.breakpoints[index] = 0
        return ctypes.string_at(self._registers.address, CONTEXT_BYTES)

    def load(self, raw: bytes) -> None:
        """:raises HypervisorError: when these bytes are not registers that this engine can take."""
        why = refusal(raw)
        if why is not None:
            raise HypervisorError("soft vCPU state", why)
        self.fetch()
        # How the emulator rounds is derived from the control words below, never taken from a stranger.
        ctypes.memmove(self._registers.address, merged(raw, self._pristine), CONTEXT_BYTES)
        self.commit()
        for register in (x86.UC_X86_REG_FPCW, x86.UC_X86_REG_MXCSR):
            self._uc.reg_write(register, self._uc.reg_read(register))
        self.flush()

    def flush(self) -> None:
        """Forget translated code and cached page tables: memory changed behind the engine's back."""
        self._uc.ctl_flush_tb()
        self.forget_addresses()

    def forget_addresses(self) -> None:
        """What the CPU before has translated through its page tables."""
        self._library.uc_ctl(self._uc._uch, _CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        self._uc.ctl_flush_tb()

    def close(self) -> None:
        """Free the engine now: its package leaves it in a reference cycle, with a gigabyte of address space.
        Call once, with no run going on."""
        for each in (self._registers, *self._all):
            each.env = Env.from_buffer_copy(self._pristine)  # the real one goes with the context
            each.context = None
        uc, self._uc = self._uc, None
        release = getattr(uc, "_Uc__finalizer", None)
        if release is not None:
            release()
