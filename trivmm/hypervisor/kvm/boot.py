"""Registers of a KVM vCPU at boot (x86/HVM direct boot ABI, "PVH") and in a crash report. Stateless.

ABI: docs/misc/pvh.pandoc of Xen: 32-bit protected mode, flat segments, paging off, EBX = start_info.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from trivmm.hypervisor.base import LONG_MODE_GDT, LongModeEntry, PvhEntry
from trivmm.hypervisor.kvm.calls import kvm_call

__all__ = ["MSRS", "describe", "set_fpu", "set_lapic_lines", "set_long_mode", "set_pvh"]

REG_NAMES: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
REGS: Final = struct.Struct("<18Q")
SEGMENT: Final = struct.Struct("<QIH8B2x")  # base, limit, selector, type, present, dpl, db, s, l, g, avl; 2 unused
SEGMENTS: Final = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]
SREGS_SIZE: Final = 312
SREGS_TABLES: Final = 8 * SEGMENT.size  # gdt, idt: base, limit and 6 unused bytes each
SREGS_CRS: Final = SREGS_TABLES + 32  # cr0 cr2 cr3 cr4 cr8 efer apic_base
CR0_LONG: Final = 1 << 31 | 0x11  # PG, ET, PE
CR4_PAE: Final = 1 << 5
EFER_LONG: Final = 1 << 10 | 1 << 8  # LMA, LME
LAPIC_SIZE: Final = 1024
LINT0, LINT1 = 0x350, 0x360
DELIVERY_MASK, DELIVER_NMI, DELIVER_EXTINT = 0x700, 0x400, 0x700

MTRR_DEFAULT_ON_WRITE_BACK: Final = 1 << 11 | 6
MISC_ENABLE_FAST_STRING: Final = 1
MSRS: Final[list[tuple[int, int]]] = [
    (0x174, 0),  # IA32_SYSENTER_CS, _ESP, _EIP
    (0x175, 0),
    (0x176, 0),
    (0xC000_0081, 0),  # STAR, LSTAR, CSTAR, FMASK
    (0xC000_0082, 0),
    (0xC000_0083, 0),
    (0xC000_0084, 0),
    (0xC000_0102, 0),  # KERNEL_GS_BASE
    (0x10, 0),  # TSC: from 0, the same on every vCPU
    (0x1A0, MISC_ENABLE_FAST_STRING),
    (0x2FF, MTRR_DEFAULT_ON_WRITE_BACK),
]


def set_pvh(fd: int, entry: PvhEntry) -> None:
    """:raises HypervisorError: when KVM refuses."""
    regs = dict.fromkeys(REG_NAMES, 0) | {"rbx": entry.start_info_gpa, "rip": entry.entry_gpa, "rflags": 2}
    sregs = bytearray(SREGS_SIZE)
    kvm_call(fd, "KVM_GET_SREGS", sregs)
    code = SEGMENT.pack(0, 0xFFFF_FFFF, 0x08, 0xB, 1, 0, 1, 1, 0, 1, 0)
    data = SEGMENT.pack(0, 0xFFFF_FFFF, 0x10, 0x3, 1, 0, 1, 1, 0, 1, 0)
    task = SEGMENT.pack(0, 0x67, 0x18, 0xB, 1, 0, 0, 0, 0, 0, 0)
    for number, segment in enumerate([code, data, data, data, data, data, task]):
        sregs[number * SEGMENT.size : (number + 1) * SEGMENT.size] = segment
    cr0, efer = 0x11, 0  # PE and ET
    struct.pack_into("<4Q", sregs, SREGS_CRS, cr0, 0, 0, 0)
    struct.pack_into("<Q", sregs, SREGS_CRS + 40, efer)
    kvm_call(fd, "KVM_SET_SREGS", bytes(sregs))
    kvm_call(fd, "KVM_SET_REGS", REGS.pack(*regs.values()))


def set_long_mode(fd: int, entry: LongModeEntry) -> None:
    """:raises HypervisorError: when KVM refuses."""
    regs = dict.fromkeys(REG_NAMES, 0) | {"rsi": entry.zero_page_gpa, "rip": entry.entry_gpa, "rflags": 2}
    sregs = bytearray(SREGS_SIZE)
    kvm_call(fd, "KVM_GET_SREGS", sregs)
    code = SEGMENT.pack(0, 0xFFFF_FFFF, 0x10, 0xB, 1, 0, 0, 1, 1, 1, 0)
    data = SEGMENT.pack(0, 0xFFFF_FFFF, 0x18, 0x3, 1, 0, 1, 1, 0, 1, 0)
    task = SEGMENT.pack(0, 0xFFFF, 0, 0xB, 1, 0, 0, 0, 0, 0, 0)
    for number, segment in enumerate([code, data, data, data, data, data, task]):
        sregs[number * SEGMENT.size : (number + 1) * SEGMENT.size] = segment
    struct.pack_into("<QH6x", sregs, SREGS_TABLES, entry.gdt_gpa, len(LONG_MODE_GDT) - 1)
    struct.pack_into("<4Q", sregs, SREGS_CRS, CR0_LONG, 0, entry.page_tables_gpa, CR4_PAE)
    struct.pack_into("<Q", sregs, SREGS_CRS + 40, EFER_LONG)
    kvm_call(fd, "KVM_SET_SREGS", bytes(sregs))
    kvm_call(fd, "KVM_SET_REGS", REGS.pack(*regs.values()))


def set_fpu(fd: int) -> None:
    """As FNINIT leaves it: all exceptions masked, 64-bit precision."""
    fpu = bytearray(416)  # struct kvm_fpu: fpr[8][16], fcw, …, mxcsr near the end
    kvm_call(fd, "KVM_GET_FPU", fpu)
    struct.pack_into("<H", fpu, 128, 0x37F)
    struct.pack_into("<I", fpu, 408, 0x1F80)
    kvm_call(fd, "KVM_SET_FPU", bytes(fpu))


def set_lapic_lines(fd: int) -> None:
    """LINT0 takes the 8259's interrupts, LINT1 is the NMI, as firmware leaves a PC."""
    lapic = bytearray(LAPIC_SIZE)
    kvm_call(fd, "KVM_GET_LAPIC", lapic)
    for register, mode in ((LINT0, DELIVER_EXTINT), (LINT1, DELIVER_NMI)):
        (value,) = struct.unpack_from("<I", lapic, register)
        struct.pack_into("<I", lapic, register, value & ~DELIVERY_MASK | mode)
    kvm_call(fd, "KVM_SET_LAPIC", bytes(lapic))


def describe(fd: int, code_at: Callable[[int], bytes]) -> str:
    """RIP and instruction bytes first, then registers, segments and control registers."""
    raw, sregs = bytearray(REGS.size), bytearray(SREGS_SIZE)
    kvm_call(fd, "KVM_GET_REGS", raw)
    kvm_call(fd, "KVM_GET_SREGS", sregs)
    regs = dict(zip(REG_NAMES, REGS.unpack(raw), strict=True))
    segments = [SEGMENT.unpack_from(sregs, number * SEGMENT.size) for number in range(len(SEGMENTS))]
    linear = segments[0][0] + regs["rip"]
    code = code_at(linear).hex(" ") or "not readable"
    lines = [f"rip={regs['rip']:#x} linear={linear:#x} code: {code}"]
    names = REG_NAMES[:16]
    lines += [" ".join(f"{name}={regs[name]:#018x}" for name in names[row : row + 4]) for row in range(0, 16, 4)]
    cr0, cr2, cr3, cr4, _, efer, apic = struct.unpack_from("<7Q", sregs, SREGS_CRS)
    lines.append(f"rflags={regs['rflags']:#x} cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x} efer={efer:#x}")
    for name, segment in zip(SEGMENTS, segments, strict=True):
        base, limit, selector, kind, present, dpl, db, _, long_mode, *_ = segment
        lines.append(
            f"{name}={selector:#06x} base={base:#x} limit={limit:#x} type={kind:#x} dpl={dpl} "
            f"{'present' if present else 'absent'}{' 64-bit' if long_mode else ' 32-bit' if db else ''}"
        )
    for number, name in enumerate(("gdt", "idt")):
        base, limit = struct.unpack_from("<QH", sregs, SREGS_TABLES + 16 * number)
        lines.append(f"{name} base={base:#x} limit={limit:#x}")
    return "\n".join([*lines, f"apic_base={apic:#x}"])
