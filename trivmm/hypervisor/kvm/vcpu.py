"""One KVM vCPU: its boot state, its run loop with the exits that C leaves to Python, its kicks, its diagnosis.

Created parked by :class:`KvmVm`; run by one thread between ``attach_thread`` and ``detach_thread``; closed by the VM
or its owner after that thread has ended. Kicks are allowed at any time, after the close too.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from trivmm._native import ffi, lib
from trivmm.bus.bus import Bus
from trivmm.bus.space import GuestRequest
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
from trivmm.hypervisor.kvm import boot, cpuid
from trivmm.hypervisor.kvm.beyond import name_refused
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.report import extension
from trivmm.hypervisor.kvm.state import KIND, load_vcpu, save_vcpu, set_msrs

if TYPE_CHECKING:
    from trivmm.hypervisor.kvm.vm import KvmVm

__all__ = ["KvmVcpu"]

# struct kvm_run: the union of exits begins at 32
IO: Final = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
MMIO: Final = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
UNION: Final = 32
MMIO_DATA: Final = UNION + 8
IO_OUT: Final = 1
MAX_WORDS: Final = 16  # the kernel's internal.data holds so many

EXIT_IO: Final = int(lib.KVM_EXIT_IO)
EXIT_MMIO: Final = int(lib.KVM_EXIT_MMIO)
RUN_INTERRUPTED: Final = int(lib.TV_RUN_INTERRUPTED)
SYSTEM_EVENTS: Final = {
    int(lib.KVM_SYSTEM_EVENT_SHUTDOWN): "poweroff",
    int(lib.KVM_SYSTEM_EVENT_RESET): "reset",
}
MP_STATE: Final = struct.Struct("<I")  # struct kvm_mp_state
WAITS_FOR_START: Final = (int(lib.KVM_MP_STATE_UNINITIALIZED), int(lib.KVM_MP_STATE_INIT_RECEIVED))
ASSIST_KINDS: Final = (
    *("CLAC_STAC", "INT3", "WAIT", "CMPXCHG16B", "XSAVE", "MXCSR"),
    *("RDPID", "SYSCALL", "INTEGER", "X87", "SSE", "AVX", "FAULT"),
)
ASSISTED: Final = {f"assist_{name.lower()}": int(getattr(lib, f"TV_ASSIST_{name}")) for name in ASSIST_KINDS}
SYNCED: Final = int(lib.KVM_SYNC_X86_REGS) | int(lib.KVM_SYNC_X86_SREGS)
MAX_CPUID: Final = 256  # KVM's own limit (KVM_MAX_CPUID_ENTRIES)


class KvmVcpu(ThreadVcpu):
    def __init__(self, vm: KvmVm, kvm_fd: int, vm_fd: int, index: int, run_size: int) -> None:
        self.index = index
        self._vm = vm
        self._kvm_fd = kvm_fd
        self._vm_fd = vm_fd
        self._native = native = ffi.new("struct tv_vcpu *")
        self._cpuid_for = 0
        problem = lib.tv_vcpu_open(native, vm_fd, index, run_size)
        if problem:
            raise HypervisorError("KVM_CREATE_VCPU", f"vCPU {index}: {os.strerror(-problem)}", errno=-problem)
        self._fd = int(native.fd)
        self._kicker = ffi.addressof(native, "kicker")
        # One buffer over kvm_run for the vCPU's life: an exit then costs one unpack and no allocation by cffi.
        self._shared = memoryview(ffi.buffer(native.run, run_size)).cast("B")
        try:
            self._set_cpuid(index + 1)
            set_msrs(self._fd, boot.MSRS)
            boot.set_fpu(self._fd)
            boot.set_lapic_lines(self._fd)
        except BaseException:
            self.close()
            raise

    def _set_cpuid(self, vcpus: int) -> None:
        """Again when more vCPUs were created since: each one's topology counts them all. KVM takes it until the
        first run."""
        if vcpus == self._cpuid_for:
            return
        table = bytearray(8 + MAX_CPUID * cpuid.ENTRY.size)
        struct.pack_into("<I", table, 0, MAX_CPUID)
        kvm_call(self._kvm_fd, "KVM_GET_SUPPORTED_CPUID", table)
        (count,) = struct.unpack_from("<I", table)
        deadline = extension(self._kvm_fd, "KVM_CAP_TSC_DEADLINE_TIMER") > 0
        rows = cpuid.for_vcpu(cpuid.unpack(bytes(table[8:]), count), self.index, vcpus, deadline)
        kvm_call(self._fd, "KVM_SET_CPUID2", cpuid.pack(rows))
        self._cpuid_for = vcpus

    def add_hook(self, base: int, length: int, function: Any, opaque: Any) -> None:
        if lib.tv_vcpu_hook(self._native, base, length, function, opaque):
            raise HypervisorError("attach_pio_hook", "too many port ranges served in C")

    def assist_on(self, memory: Any, syscall_lost: bool) -> None:
        """Finish what KVM can't emulate (``ffi/assist.h``), on this RAM (``struct tv_memory *``), and SYSCALLs that it
        leaves in ring 3."""
        size = extension(self._vm_fd, "KVM_CAP_XSAVE2")
        if size <= int(lib.TV_ASSIST_AREA):
            synced = extension(self._kvm_fd, "KVM_CAP_SYNC_REGS") & SYNCED == SYNCED
            problem = lib.tv_vcpu_assist(self._native, memory, size > 0, synced, syscall_lost)
            if problem:
                raise HypervisorError("assist", os.strerror(-problem), errno=-problem)

    def _changed(self) -> None:
        """Registers were set: what kvm_run holds of them is older."""
        if self._native.assist != ffi.NULL:
            self._native.assist.stale = 1

    # --- the vCPU's thread -----------------------------------------------------------------------------------

    def attach_thread(self) -> None:
        self._open()
        if not self._native.exits:
            self._set_cpuid(max(len(self._vm.vcpus), self.index + 1))
        lib.tv_vcpu_attach(self._native)

    def detach_thread(self) -> None:
        lib.tv_kicker_withdraw(self._kicker)

    def _open(self) -> None:
        if self._fd < 0:
            raise HypervisorError("KVM_RUN", f"vCPU {self.index} is closed")

    def run(self, bus: Bus) -> Outcome:
        return self._run(bus, 0)

    def finish(self, bus: Bus) -> Outcome:
        return self._run(bus, 1)

    def _run(self, bus: Bus, finish_only: int) -> Outcome:
        """Hot: an exit costs one unpack and the access itself. The answer to a read lies in kvm_run until the next
        KVM_RUN takes it, finishing or not."""
        native, shared, run = self._native, self._shared, lib.tv_vcpu_run
        while self._fd >= 0:
            reason = run(native, finish_only)
            if reason == EXIT_MMIO:
                gpa, data, length, is_write = MMIO.unpack_from(shared, UNION)
                if is_write:
                    effect = bus.write_mmio(gpa, data[:length])
                    if effect is not None:
                        return effect
                else:
                    shared[MMIO_DATA : MMIO_DATA + length] = bus.read_mmio(gpa, length)
            elif reason == EXIT_IO:
                direction, size, port, count, offset = IO.unpack_from(shared, UNION)
                end = offset + size * count
                if direction == IO_OUT:
                    effect = bus.write_port(port, size, bytes(shared[offset:end]))
                    if effect is not None:
                        return effect
                else:
                    shared[offset:end] = bus.read_port(port, size, count)
            elif reason == RUN_INTERRUPTED:
                return INTERRUPTED
            else:
                return self._ended(reason)
        return INTERRUPTED

    def _ended(self, reason: int) -> Outcome:
        """``reason`` is an exit that is no access, or -errno of KVM_RUN."""
        if reason == lib.KVM_EXIT_SYSTEM_EVENT:
            (event,) = struct.unpack_from("<I", self._shared, UNION)
            return GuestRequest(SYSTEM_EVENTS.get(event, "crash"), "system event")
        if reason == lib.KVM_EXIT_SHUTDOWN:
            return triple_fault(self.describe())
        fault = self._vm.memory_fault
        if reason == -errno.EFAULT and fault is not None and (why := fault(stopped=True)) is not None:
            what = why
        elif reason < 0:
            what = f"KVM_RUN failed: {os.strerror(-reason)}"
        elif reason == lib.KVM_EXIT_HLT:  # the in-kernel LAPIC waits by itself
            what = "halted for ever: no interrupt can wake it"
        elif reason == lib.KVM_EXIT_FAIL_ENTRY:
            (code,) = struct.unpack_from("<Q", self._shared, UNION)
            what = f"the hardware refused the guest state ({code:#x})"
        elif reason == lib.KVM_EXIT_INTERNAL_ERROR:
            suberror, count = struct.unpack_from("<II", self._shared, UNION)
            words = struct.unpack_from(f"<{min(count, MAX_WORDS)}Q", self._shared, UNION + 8)
            what = f"hypervisor internal error {suberror}{' (instruction emulation)' if suberror == 1 else ''}"
            what += f" [{' '.join(f'{word:#x}' for word in words)}]" if words else ""
            assist = self._native.assist
            if suberror == lib.KVM_INTERNAL_ERROR_EMULATION and assist != ffi.NULL and assist.refused:
                insn = assist.insn
                what += f"; beyond the assist, {name_refused(bytes(insn.bytes[0 : insn.available]))}"
        else:
            what = f"KVM_RUN gave exit {reason}, which nothing here asks for"
        return Crashed(what, self.describe())

    def park(self, timeout_s: float) -> None:
        lib.tv_kicker_park(self._kicker, max(0, min(int(timeout_s * 1000 + 0.999), 60_000)))

    def kick(self) -> None:
        lib.tv_kick(self._kicker)

    def inject_nmi(self) -> None:
        self._open()
        state = bytearray(MP_STATE.size)
        kvm_call(self._fd, "KVM_GET_MP_STATE", state)
        # Queued on a vCPU that waits for its start, it would keep KVM_RUN from sleeping and hit an AP without an IDT.
        if MP_STATE.unpack(state)[0] not in WAITS_FOR_START:
            kvm_call(self._fd, "KVM_NMI")

    # --- state -----------------------------------------------------------------------------------------------

    def set_boot_state(self, entry: PvhEntry | LongModeEntry) -> None:
        self._open()
        self._changed()
        if isinstance(entry, PvhEntry):
            boot.set_pvh(self._fd, entry)
        else:
            boot.set_long_mode(self._fd, entry)

    def save(self) -> VcpuState:
        self._open()
        return VcpuState(KIND, save_vcpu(self._fd, self._kvm_fd, self._vm_fd))

    def load(self, state: VcpuState) -> None:
        """After the VM's state. KVM refuses a new CPUID once a vCPU ran; a second load keeps the first's."""
        self._open()
        if not self._native.exits:
            self._set_cpuid(max(len(self._vm.vcpus), self.index + 1))
        self._changed()
        load_vcpu(self._fd, self._kvm_fd, self._vm_fd, state.kind, state.blobs)

    def counters(self) -> dict[str, int]:
        """Exits since the creation: all, those that Python saw, diagnostic-port writes, and by KVM_EXIT_ number."""
        native = self._native
        counts = {f"exit_{number}": int(native.by_reason[number]) for number in range(int(lib.TV_EXIT_COUNTERS))}
        totals = {
            "exits": int(native.exits),
            "python_exits": int(native.python_exits),
            "post_codes": int(native.post_codes),
        }
        assist = native.assist
        if assist != ffi.NULL:
            counts |= {name: int(assist.by_kind[number]) for name, number in ASSISTED.items()}
            counts["assist_refused"] = int(assist.refused)
            counts["assist_page_faults"] = int(assist.page_faults)
        return totals | {name: count for name, count in counts.items() if count}

    def describe(self) -> str:
        if self._fd < 0:
            return f"vcpu{self.index} is closed"
        try:
            return boot.describe(self._fd, self._code_at)
        except HypervisorError as error:
            return f"no registers: {error}"

    def _code_at(self, linear: int) -> bytes:
        """Up to 16 bytes at a linear address, as far as it is mapped and in RAM."""
        query = bytearray(struct.pack("<QQ8x", linear & (1 << 64) - 1, 0))  # struct kvm_translation
        if kvm_call(self._fd, "KVM_TRANSLATE", query, allow=(errno.EINVAL, errno.EFAULT)) < 0 or not query[16]:
            return b""
        (gpa,) = struct.unpack_from("<Q", query, 8)
        return self._vm.peek(gpa, min(16, 4096 - gpa % 4096))

    def close(self) -> None:
        self._fd = -1
        self._shared.release()
        lib.tv_vcpu_close(self._native)
