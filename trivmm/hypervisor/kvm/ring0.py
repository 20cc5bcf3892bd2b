"""What guest ring 0 runs on here: asked of KVM once a process, by a guest of a few instructions.

KVM without hardware virtualization runs ring 3 on the CPU and ring 0 on its instruction emulator. The guest's ring 0
executes an SSE instruction, which that lacks, and its ring 3 a SYSCALL, which may leave it in ring 3.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from typing import Final

import attrs

from trivmm._native import ffi, lib
from trivmm.hypervisor.kvm import boot, cpuid
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.report import extension, open_device
from trivmm.hypervisor.kvm.state import set_msrs
from trivmm.memory import layout

__all__ = ["SLOW_HOST_OPTIONS", "Ring0", "look_at_ring0", "tell_of_lstar"]

SIZE: Final = 0x8000
PML4, PDPT, DIRECTORY, TABLE, GDT, USER, KERNEL = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000
PRESENT_WRITABLE, FOR_RING_3 = 3, 7
SYSCALL: Final = b"\x0f\x05"
MOVD_HLT: Final = bytes.fromhex("660f7ec0 f4")  # movd %xmm0, %eax; hlt
EXIT_REASON: Final = struct.Struct("<I")  # of struct kvm_run, at 8
STAR, LSTAR, FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
KERNEL_CS, USER_BASE, USER_CS, USER_SS = 0x10, 0x23, 0x33, 0x2B
EFER_SCE: Final = 1
MAX_CPUID: Final = 256  # KVM's own limit (KVM_MAX_CPUID_ENTRIES)
CR4: Final = boot.CR4_PAE | 1 << 9  # OSFXSR
ENABLE_CAP: Final = struct.Struct("<II4Q64x")
MSR_FILTER: Final = struct.Struct("<IxxxxIIIxxxxQ360x")  # flags; of the first range: flags, count, first, bitmap

CLEARED: Final = (
    *("smap", "smep", "umip", "pcid", "invpcid", "fsgsbase", "pku", "la57", "cx16", "clflushopt", "clwb", "rdpid"),
    *("x2apic", "popcnt", "movbe", "erms", "fsrm"),
)
BLACKLISTED: Final = (
    *("tracer_init_tracefs", "trace_eval_init", "ftrace_check_for_weak_functions"),
    *("init_kprobe_trace", "init_dynamic_event", "blake2s_mod_init"),
    *("cubictcp_register", "bpf_tcp_ca_kfunc_init", "kfunc_init", "bpf_prog_test_run_init", "bpf_rstat_kfunc_init"),
    *("bpf_key_sig_kfuncs_init", "crypto_kdf108_init", "slab_sysfs_init"),
)
SLOW_HOST_OPTIONS: Final[tuple[tuple[str, str], ...]] = (
    ("mitigations=off", "each entry of the kernel would pay for what an emulator does not have"),
    ("nopti", "no second set of page tables, which each entry would switch"),
    ("nokaslr", "no relocation of the kernel, an instruction at a time"),
    ("noxsave", "FXSAVE, which KVM emulates, instead of XSAVE, which is an exit to the assist"),
    ("tsc=reliable", "no calibration and no watchdog of a clock that is the host's"),
    ("lpj=4000000", "no calibration of delays, which on an emulator come out far too short"),
    ("nowatchdog", "a step of the boot that takes half a minute is no lockup"),
    ("cryptomgr.notests", "self-tests of each cipher"),
    ("rodata=off", "13 s of 437: no remapping of the kernel page by page, and no search for W+X pages"),
    ("init_on_alloc=0", "each page is zeroed 8 bytes at an emulated step"),
    (f"initcall_blacklist={','.join(BLACKLISTED)}", "280 s of 437: tracefs, the BTF parser, a self-test"),
    (f"clearcpuid={','.join(CLEARED)}", "instructions KVM lacks (an exit each), and REP MOVSB, 8 times MOVSQ's steps"),
)
"""What Debian's 6.1 cloud kernel is given where ring 0 is emulated, and what each saves (s: as measured)."""


@attrs.frozen
class Ring0:
    """``emulated``: instruction by instruction; ``syscall_lost``: SYSCALL stays in ring 3 there
    (``ffi/assist_syscall.c``)."""

    emulated: bool
    syscall_lost: bool


@functools.cache
def look_at_ring0() -> Ring0:
    """:raises HypervisorError: when /dev/kvm can't be opened, or refuses."""
    kvm = open_device()
    vm = vcpu = -1
    try:
        with mmap.mmap(-1, SIZE) as memory:
            address = _address(memory)
            vm = kvm_call(kvm, "KVM_CREATE_VM", 0)
            kvm_call(vm, "KVM_SET_TSS_ADDR", layout.KVM_TSS_START)
            kvm_call(vm, "KVM_SET_USER_MEMORY_REGION", struct.pack("<IIQQQ", 0, 0, 0, SIZE, address))
            vcpu = kvm_call(vm, "KVM_CREATE_VCPU", 0)
            kvm_call(vcpu, "KVM_SET_CPUID2", _supported(kvm))
            _fill(memory)
            set_msrs(vcpu, [(STAR, USER_BASE << 48 | KERNEL_CS << 32), (LSTAR, KERNEL), (FMASK, 0)])
            with mmap.mmap(vcpu, kvm_call(kvm, "KVM_GET_VCPU_MMAP_SIZE")) as run:
                emulated = _ends(vcpu, run, 0) == lib.KVM_EXIT_INTERNAL_ERROR
                lost = emulated and _ends(vcpu, run, 3) == lib.KVM_EXIT_SHUTDOWN  # no IDT: a fault is the end
        return Ring0(emulated, lost)
    finally:
        for fd in (vcpu, vm, kvm):
            if fd >= 0:
                os.close(fd)


def _address(memory: mmap.mmap) -> int:
    buffer = ffi.from_buffer(memory)
    address = int(ffi.cast("uintptr_t", buffer))
    ffi.release(buffer)  # a map with a buffer held on it can't be closed
    return address


def _supported(kvm: int) -> bytes:
    table = bytearray(8 + MAX_CPUID * cpuid.ENTRY.size)
    struct.pack_into("<I", table, 0, MAX_CPUID)
    kvm_call(kvm, "KVM_GET_SUPPORTED_CPUID", table)
    return bytes(table)


def _fill(memory: mmap.mmap) -> None:
    for table, entry in ((PML4, PDPT), (PDPT, DIRECTORY), (DIRECTORY, TABLE)):
        struct.pack_into("<Q", memory, table, entry | FOR_RING_3)
    for page in range(0, SIZE, 4096):
        struct.pack_into("<Q", memory, TABLE + page // 512, page | (FOR_RING_3 if page == USER else PRESENT_WRITABLE))
    memory[USER : USER + len(SYSCALL)] = SYSCALL
    memory[KERNEL : KERNEL + len(MOVD_HLT)] = MOVD_HLT


def _ends(vcpu: int, run: mmap.mmap, ring: int) -> int:
    """Which exit the guest comes to that starts in this ring: it has two instructions at most."""
    sregs = bytearray(boot.SREGS_SIZE)
    kvm_call(vcpu, "KVM_GET_SREGS", sregs)
    code = boot.SEGMENT.pack(0, 0xFFFF_FFFF, USER_CS if ring else KERNEL_CS, 0xB, 1, ring, 0, 1, 1, 1, 0)
    data = boot.SEGMENT.pack(0, 0xFFFF_FFFF, USER_SS if ring else KERNEL_CS + 8, 0x3, 1, ring, 1, 1, 0, 1, 0)
    task = boot.SEGMENT.pack(0, 0x67, 0x40, 0xB, 1, 0, 0, 0, 0, 0, 0)
    for number, segment in enumerate([code, data, data, data, data, data, task]):
        sregs[number * boot.SEGMENT.size : (number + 1) * boot.SEGMENT.size] = segment
    struct.pack_into("<QH6xQH6x", sregs, boot.SREGS_TABLES, GDT, 0, GDT, 0)
    struct.pack_into("<4Q", sregs, boot.SREGS_CRS, boot.CR0_LONG, 0, PML4, CR4)
    struct.pack_into("<Q", sregs, boot.SREGS_CRS + 40, boot.EFER_LONG | EFER_SCE)
    kvm_call(vcpu, "KVM_SET_SREGS", bytes(sregs))
    registers = dict.fromkeys(boot.REG_NAMES, 0) | {"rip": USER if ring else KERNEL, "rflags": 2}
    kvm_call(vcpu, "KVM_SET_REGS", boot.REGS.pack(*registers.values()))
    kvm_call(vcpu, "KVM_RUN")
    return int(EXIT_REASON.unpack_from(run, 8)[0])


def tell_of_lstar(vm_fd: int) -> bool:
    """Writes of LSTAR, where SYSCALL goes, exit from now on. False: this KVM can't."""
    if not all(extension(vm_fd, f"KVM_CAP_X86_{name}") for name in ("USER_SPACE_MSR", "MSR_FILTER")):
        return False
    enable = ENABLE_CAP.pack(int(lib.KVM_CAP_X86_USER_SPACE_MSR), 0, int(lib.KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0)
    kvm_call(vm_fd, "KVM_ENABLE_CAP", enable)
    denied = ffi.new("uint8_t[8]")  # a bit that is 0
    bitmap = int(ffi.cast("uintptr_t", denied))
    kvm_call(vm_fd, "KVM_X86_SET_MSR_FILTER", MSR_FILTER.pack(0, int(lib.KVM_MSR_FILTER_WRITE), 1, LSTAR, bitmap))
    return True
