"""The unicorn engine behind a few exact verbs: map, run so many instructions, read and write all registers.

One engine is one CPU. It belongs to a vCPU from create to close and is used by one thread at a time.

The engine cannot be stopped safely from outside an instruction hook (see ``ffi/softgate.h``), so it never is: every
stop goes through the *gate*, which a C hook asks before each instruction. A port or MMIO callback asks the gate too:
the instruction completes and the next one does not begin.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final

import attrs
import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.soft.env import CONTEXT_BYTES, ENGINE_VERSION, HEADER_BYTES, Env, merged, refusal

_unicorn: Any = unicorn  # its Python package is not typed

__all__ = ["PHYSICAL_END", "Engine", "Slot", "Stop"]

PHYSICAL_END: Final = 1 << 40  # the engine's CPU has 40 physical address bits
PAGE: Final = 0x1000
_CTL_TLB_FLUSH: Final = uc_const.UC_CTL_TLB_FLUSH | uc_const.UC_CTL_IO_WRITE << 30


HIGHEST_LEAF: Final = 0xD  # of the engine's CPU
TSC_LEAF: Final = 0x15
RATIO_OF: Final = 1000  # the TSC's rate is told in thousandths of the crystal's
VENDOR: Final = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX
CPUID_REGISTERS: Final = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)


class Clock:
    """The rate of the TSC, told from two looks that lie far enough apart."""

    ENOUGH_NS: Final = 50_000_000

    def __init__(self) -> None:
        self._tsc, self._ns = int(lib.tv_tsc()), time.monotonic_ns()
        self._khz = 0

    def tsc_khz(self) -> int:
        """Sleeps for what is missing to 50 ms since the start, once. The vCPU's thread only."""
        if not self._khz:
            time.sleep(max(0, self._ns + self.ENOUGH_NS - time.monotonic_ns()) / 1e9)
            self._khz = (int(lib.tv_tsc()) - self._tsc) * 1_000_000 // (time.monotonic_ns() - self._ns)
        return self._khz


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


class Engine:
    """``read_mmio(gpa, size)``, ``write_mmio(gpa, size, value)``, ``read_port(port, size)`` and
    ``write_port(port, size, value)`` are called inside :meth:`run`, in the middle of an instruction. ``crystal_hz`` is
    what the local APIC's timer counts: CPUID tells it, and the TSC's ratio to it."""

    def __init__(
        self,
        read_mmio: Callable[[int, int], int],
        write_mmio: Callable[[int, int, int], None],
        read_port: Callable[[int, int], int],
        write_port: Callable[[int, int, int], None],
        crystal_hz: int,
    ) -> None:
        if tuple(_unicorn.__version__.split(".")[:3]) != tuple(str(part) for part in ENGINE_VERSION):
            wanted = ".".join(map(str, ENGINE_VERSION))
            raise HypervisorError(
                "unicorn", f"version {_unicorn.__version__} has another register layout", f"install unicorn=={wanted}"
            )
        self._uc: Any = _unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
        self._library: Any = _unicorn.unicorn_py3.unicorn.uclib
        self._context: Any = self._uc.context_save()
        if self._context.size != HEADER_BYTES + CONTEXT_BYTES:
            raise HypervisorError("uc_context_size", f"{self._context.size} bytes is not this version's size")
        self._address: int = self._context.context.value + HEADER_BYTES
        self.env = Env.from_address(self._address)
        self._pristine = ctypes.string_at(self._address, CONTEXT_BYTES)
        self.exception = 0
        self.failure = 0
        self._excepted = False
        self._syscalled = False
        self._rom_writes: list[tuple[int, bytes]] = []  # host address, what was there before
        self.gate = ffi.new("struct tv_soft_gate *")
        stop = ctypes.cast(self._library.uc_emu_stop, ctypes.c_void_p).value
        lib.tv_soft_gate_init(self.gate, stop)
        self._read_mmio, self._write_mmio = read_mmio, write_mmio
        self._crystal_hz = crystal_hz
        self._clock = Clock()
        self._add_gate()
        self._uc.ctl_exits_enabled(True)  # no address ends a run
        self._uc.hook_add(uc_const.UC_HOOK_INTR, self._on_exception)
        self._uc.hook_add(uc_const.UC_HOOK_INSN, self._on_syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        self._uc.hook_add(
            uc_const.UC_HOOK_INSN,
            lambda _uc, port, size, _data: read_port(port, size),
            None,
            1,
            0,
            x86.UC_X86_INS_IN,
        )
        self._uc.hook_add(
            uc_const.UC_HOOK_INSN,
            lambda _uc, port, size, value, _data: write_port(port, size, value),
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
        """Leaf 15H, and a highest leaf that reaches it; the engine answers the others. Intel SDM vol. 2, CPUID.

        A guest can't calibrate its clocks here by counting loops, since every access to a timer leaves the engine."""
        leaf = uc.reg_read(x86.UC_X86_REG_EAX)
        if leaf == 0:
            answer = (TSC_LEAF, *VENDOR)
        elif leaf == TSC_LEAF:
            ratio = self._clock.tsc_khz() * 1000 * RATIO_OF // self._crystal_hz
            answer = (RATIO_OF, ratio, self._crystal_hz, 0)
        elif HIGHEST_LEAF < leaf < TSC_LEAF:
            answer = (0, 0, 0, 0)
        else:
            return 0
        for register, value in zip(CPUID_REGISTERS, answer, strict=True):
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
                self._write_mmio(gpa, size, value)
            return inside

        self._uc.hook_add(uc_const.UC_HOOK_MEM_WRITE_PROT, written)

    def _map_mmio(self, start: int, end: int) -> None:
        if start >= end:
            return
        read_mmio, write_mmio = self._read_mmio, self._write_mmio

        def read(_uc: Any, offset: int, size: int, _data: Any) -> int:
            return read_mmio(start + offset, size)

        def write(_uc: Any, offset: int, size: int, value: int, _data: Any) -> None:
            write_mmio(start + offset, size, value)

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
        self._uc.context_update(self._context)
        return self.env

    def commit(self) -> None:
        self._uc.context_restore(self._context)

    def reset(self) -> Env:
        """The engine's own initial registers, fetched; :meth:`commit` them."""
        self.fetch()
        ctypes.memmove(self._address, self._pristine, CONTEXT_BYTES)
        return self.env

    def save(self) -> bytes:
        env = self.fetch()
        for index in range(4):
            env.breakpoints[index] = 0
        return ctypes.string_at(self._address, CONTEXT_BYTES)

    def load(self, raw: bytes) -> None:
        """:raises HypervisorError: when these bytes are not registers that this engine can take."""
        why = refusal(raw)
        if why is not None:
            raise HypervisorError("soft vCPU state", why)
        self.fetch()
        # How the emulator rounds is derived from the control words below, never taken from a stranger.
        ctypes.memmove(self._address, merged(raw, self._pristine), CONTEXT_BYTES)
        self.commit()
        for register in (x86.UC_X86_REG_FPCW, x86.UC_X86_REG_MXCSR):
            self._uc.reg_write(register, self._uc.reg_read(register))
        self.flush()

    def flush(self) -> None:
        """Forget translated code and cached page tables: memory changed behind the engine's back."""
        self._uc.ctl_flush_tb()
        self._library.uc_ctl(self._uc._uch, _CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        self._uc.ctl_flush_tb()

    def close(self) -> None:
        """Free the engine now: its package leaves it in a reference cycle, with a gigabyte of address space.
        Call once, with no run going on."""
        self.env = Env.from_buffer_copy(self._pristine)  # the real one goes with the context
        uc, self._uc, self._context = self._uc, None, None
        release = getattr(uc, "_Uc__finalizer", None)
        if release is not None:
            release()
