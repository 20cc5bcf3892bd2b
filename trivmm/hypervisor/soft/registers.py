"""A soft vCPU's registers as a whole: out of reset, as PVH boots it, and told in a crash report. Stateless.

Each function fills the registers as fetched from an engine; its owner commits them.
"""

from __future__ import annotations

from typing import Final

from trivmm.hypervisor.base import LONG_MODE_GDT, LongModeEntry, PvhEntry
from trivmm.hypervisor.soft.env import CR4_PAE, CS, HF_ADDSEG, HF_CS32, HF_CS64, HF_LMA, HF_PE, HF_SS32, RBX, RSI, Env

__all__ = ["describe", "set_long_mode", "set_pvh", "set_reset", "set_startup"]

FLAT_CODE: Final = 0x00CF_9B00
FLAT_DATA: Final = 0x00CF_9300
LONG_CODE: Final = 0x00AF_9B00
CR0_LONG: Final = 1 << 31 | 0x11  # PG, ET, PE
EFER_LONG: Final = 1 << 10 | 1 << 8  # LMA, LME
REAL_CODE: Final = 0x0000_9B00
REAL_DATA: Final = 0x0000_9300
BUSY_TSS: Final = 0x0000_8B00
MXCSR_RESET: Final = 0x1F80  # every exception masked; the engine leaves 0
GENERAL: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


def set_reset(env: Env) -> None:
    """Intel SDM volume 3, table 9-1."""
    env.hflags, env.efer = HF_ADDSEG, 0  # as after a far jump in real mode: bases of data segments count
    env.cr[0], env.cr[2], env.cr[3], env.cr[4] = 0x6000_0010, 0, 0, 0
    for index in range(6):
        segment = env.segs[index]
        segment.selector, segment.base, segment.limit, segment.flags = 0, 0, 0xFFFF, REAL_DATA
    code = env.segs[CS]
    code.selector, code.base, code.flags = 0xF000, 0xFFFF_0000, REAL_CODE
    env.idt.limit = env.gdt.limit = 0xFFFF
    env.eip, env.eflags, env.mxcsr = 0xFFF0, 2, MXCSR_RESET


def set_startup(env: Env, vector: int) -> None:
    """What a STARTUP IPI makes of a CPU after its INIT: real mode at ``vector`` times 4 KiB. Volume 3, section 9.4."""
    code = env.segs[CS]
    code.selector, code.base = vector << 8, vector << 12
    env.eip = 0


def set_pvh(env: Env, entry: PvhEntry) -> None:
    """The x86/HVM direct boot ABI: flat 32-bit protected mode without paging, EBX the start info."""
    env.hflags = HF_PE | HF_CS32 | HF_SS32
    env.efer = 0
    env.cr[0], env.cr[2], env.cr[3], env.cr[4] = 0x11, 0, 0, 0
    for index in range(6):
        segment = env.segs[index]
        segment.selector, segment.base, segment.limit = 0x10, 0, 0xFFFF_FFFF
        segment.flags = FLAT_DATA
    env.segs[CS].selector, env.segs[CS].flags = 0x08, FLAT_CODE
    env.tr.selector, env.tr.base, env.tr.limit, env.tr.flags = 0x18, 0, 0x67, BUSY_TSS
    env.gdt.limit = env.idt.limit = 0
    env.regs[RBX] = entry.start_info_gpa
    env.eip, env.eflags, env.mxcsr = entry.entry_gpa, 2, MXCSR_RESET


def set_long_mode(env: Env, entry: LongModeEntry) -> None:
    """64-bit mode, flat, RSI the zero page."""
    env.hflags = HF_PE | HF_LMA | HF_CS32 | HF_SS32 | HF_CS64
    env.efer = EFER_LONG
    env.cr[0], env.cr[2], env.cr[3], env.cr[4] = CR0_LONG, 0, entry.page_tables_gpa, CR4_PAE
    for index in range(6):
        segment = env.segs[index]
        segment.selector, segment.base, segment.limit, segment.flags = 0x18, 0, 0xFFFF_FFFF, FLAT_DATA
    env.segs[CS].selector, env.segs[CS].flags = 0x10, LONG_CODE
    env.tr.base, env.tr.limit, env.tr.flags = 0, 0xFFFF, BUSY_TSS
    env.gdt.base, env.gdt.limit, env.idt.limit = entry.gdt_gpa, len(LONG_MODE_GDT) - 1, 0
    env.regs[RSI] = entry.zero_page_gpa
    env.eip, env.eflags, env.mxcsr = entry.entry_gpa, 2, MXCSR_RESET


def describe(env: Env, rflags: int, code: bytes) -> str:
    """Several lines. ``rflags`` has the lazy flags computed; ``code`` are the bytes at RIP, as far as mapped."""
    words = [f"{name} {env.regs[index]:#018x}" for index, name in enumerate(GENERAL)]
    return "\n".join(
        [
            f"rip {env.eip:#x} cs {env.segs[CS].selector:#x} rflags {rflags:#x} code {code.hex(' ') or 'not mapped'}",
            *("  ".join(words[row : row + 4]) for row in range(0, 16, 4)),
            f"cr0 {env.cr[0]:#x} cr2 {env.cr[2]:#x} cr3 {env.cr[3]:#x} cr4 {env.cr[4]:#x} efer {env.efer:#x}",
        ]
    )
