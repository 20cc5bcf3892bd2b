"""CPUID of a soft vCPU: the engine's own answers, and what it knows nothing of. Intel SDM vol. 2, CPUID.

Leaf 15H tells the clocks' rates: a guest can't calibrate them here by counting loops, since every access to a timer
leaves the engine. Nor is it to watch the TSC by counting ticks, which come late here: the TSC is invariant. The
topology is one package of cores with one thread each, as on ``kvm``; a single vCPU has the engine's.
"""

from __future__ import annotations

import functools
import time
from typing import Any, Final

import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from trivmm._native import lib

__all__ = ["REGISTERS", "Clock", "answer"]

_unicorn: Any = unicorn  # its Python package is not typed

HIGHEST_LEAF: Final = 0xD  # of the engine's CPU
TSC_LEAF: Final = 0x15
POWER_LEAF: Final = 0x8000_0007
TSC_ADJUST: Final = 1 << 1  # the MSR is the engine's
INVARIANT_TSC: Final = 1 << 8  # the host's; with the MSR, Linux takes it for reliable
RATIO_OF: Final = 1000  # the TSC's rate is told in thousandths of the crystal's
VENDOR: Final = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX
REGISTERS: Final = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)
HTT: Final = 1 << 28
OSXSAVE: Final = 1 << 27
CR4_OSXSAVE: Final = 1 << 18
LAST_CACHE: Final = 3  # of leaf 4 that the engine knows; all behind it are none
SMT_LEVEL, CORE_LEVEL = 1, 2
CODE_GPA: Final = 0x1000

Answer = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


class Clock:
    """The rate of the TSC, told from two looks that lie far enough apart."""

    ENOUGH_NS: Final = 50_000_000

    def __init__(self) -> None:
        self._tsc, self._ns = int(lib.tv_tsc()), time.monotonic_ns()
        self._khz = 0

    def tsc_khz(self) -> int:
        """Sleeps for what is missing to 50 ms since the start, once. A vCPU's thread only."""
        if not self._khz:
            time.sleep(max(0, self._ns + self.ENOUGH_NS - time.monotonic_ns()) / 1e9)
            self._khz = (int(lib.tv_tsc()) - self._tsc) * 1_000_000 // (time.monotonic_ns() - self._ns)
        return self._khz


@functools.cache
def engine_says(leaf: int, subleaf: int) -> Answer:
    """What an engine without hooks answers: one is made for it, once a leaf."""
    uc = _unicorn.Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_64)
    uc.mem_map(CODE_GPA, 0x1000)
    uc.mem_write(CODE_GPA, b"\x0f\xa2")
    uc.reg_write(x86.UC_X86_REG_RAX, leaf)
    uc.reg_write(x86.UC_X86_REG_RCX, subleaf)
    uc.emu_start(CODE_GPA, CODE_GPA + 2)
    eax, ebx, ecx, edx = (int(uc.reg_read(register)) & 0xFFFF_FFFF for register in REGISTERS)
    return eax, ebx, ecx, edx


def answer(leaf: int, subleaf: int, cr4: int, clock: Clock, crystal_hz: int, cpu: int, cpus: int) -> Answer | None:
    """For vCPU ``cpu`` of ``cpus``; None where the engine's own answer is right."""
    if leaf == 0:
        return (TSC_LEAF, *VENDOR)
    if leaf == TSC_LEAF:
        return RATIO_OF, clock.tsc_khz() * 1000 * RATIO_OF // crystal_hz, crystal_hz, 0
    if HIGHEST_LEAF < leaf < TSC_LEAF:
        return 0, 0, 0, 0
    if leaf == 7 and subleaf == 0:
        eax, ebx, ecx, edx = engine_says(leaf, subleaf)
        return eax, ebx | TSC_ADJUST, ecx, edx
    if leaf == POWER_LEAF:
        return 0, 0, 0, INVARIANT_TSC
    if cpus == 1:
        return None
    bits = (cpus - 1).bit_length()
    match leaf:
        case 1:
            eax, ebx, ecx, edx = engine_says(1, 0)
            ecx = ecx & ~OSXSAVE | (OSXSAVE if cr4 & CR4_OSXSAVE else 0)
            return eax, ebx & 0xFFFF | cpus << 16 | cpu << 24, ecx, edx | HTT
        case 0x4 if subleaf > LAST_CACHE:  # a guest may ask for 4 milliards: each is an engine made and an answer kept
            return 0, 0, 0, 0
        case 0x4:
            eax, ebx, ecx, edx = engine_says(leaf, subleaf)
            if eax & 0x1F:
                sharing = (1 << bits) - 1 if eax >> 5 & 7 >= 3 else 0
                eax = eax & 0x3FFF | sharing << 14 | (1 << bits) - 1 << 26
            return eax, ebx, ecx, edx
        case 0xB:
            levels = {0: (0, 1, SMT_LEVEL << 8), 1: (bits, cpus, CORE_LEVEL << 8 | 1)}
            return (*levels.get(subleaf, (0, 0, subleaf & 0xFF)), cpu)
        case _:
            return None
