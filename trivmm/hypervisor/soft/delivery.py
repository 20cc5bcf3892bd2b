"""Taking an interrupt or exception: from a vector to the first instruction of the guest's handler.

Intel SDM volume 3, chapters 6 and 7: the gate's checks, the change of privilege through the TSS (or an IST stack),
the frame, and what a fault during delivery becomes: another exception, a double fault, at last a triple fault. Pure
over :class:`Env` and guest memory; the engine sees nothing of it until the registers are written back.
"""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.hypervisor.soft.env import (
    CR0_PE,
    CR4_LA57,
    CS,
    EFER_LMA,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_CS64,
    HF_INHIBIT_IRQ,
    HF_SS32,
    R11,
    RCX,
    RSP,
    SS,
    Env,
    Segment,
)
from trivmm.hypervisor.soft.paging import PAGE_FAULT, GuestFault, Physical, Virtual

__all__ = ["Event", "Shutdown", "deliver", "may_use_port", "syscall"]

DOUBLE_FAULT: Final = 8
INVALID_TSS: Final = 10
NOT_PRESENT: Final = 11
STACK_FAULT: Final = 12
PROTECTION: Final = 13
HAS_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17})
CONTRIBUTORY: Final = frozenset({0, 10, 11, 12, 13})
_DELIVERIES_MAX: Final = 4  # an exception, the one it meets, a double fault: the fourth is a shutdown

FLAT_LONG_CODE: Final = 0x00AF_9B00
FLAT_DATA: Final = 0x00CF_9300
DESC_PRESENT: Final = 1 << 15
DESC_SEGMENT: Final = 1 << 12
DESC_CODE: Final = 1 << 11
DESC_CONFORMING: Final = 1 << 10
DESC_BIG: Final = 1 << 22
DESC_LONG: Final = 1 << 21
DESC_GRANULAR: Final = 1 << 23


class Shutdown(Exception):
    """A triple fault: the CPU gives up."""


@attrs.frozen
class Event:
    """``kind``: ``interrupt`` (from outside), ``software`` (INT n, INT3, INTO) or ``exception``.

    ``length`` is how many bytes before RIP a software interrupt's own instruction begins: a fault points there."""

    vector: int
    kind: str
    error: int = 0
    length: int = 0

    @property
    def external(self) -> int:
        """The EXT bit of error codes that its delivery may cause."""
        return 0 if self.kind == "software" else 1


def deliver(physical: Physical, env: Env, rflags: int, event: Event) -> None:
    """Change ``env`` to the start of the handler. ``rflags`` holds all flags, the arithmetic ones too.

    For a software interrupt ``env.eip`` is the instruction after it. :raises Shutdown: a triple fault.
    """
    for _ in range(_DELIVERIES_MAX):
        try:
            _once(physical, env, rflags, event)
            return
        except GuestFault as fault:
            if fault.cr2 is not None:
                env.cr[2] = fault.cr2
            env.eip = (env.eip - event.length) & 0xFFFF_FFFF_FFFF_FFFF
            event = _escalate(event, fault)
    raise Shutdown


def _escalate(event: Event, fault: GuestFault) -> Event:
    if event.vector == DOUBLE_FAULT and event.kind == "exception":
        raise Shutdown
    serious = fault.vector in CONTRIBUTORY or fault.vector == PAGE_FAULT
    first = event.vector if event.kind == "exception" else None
    if (first in CONTRIBUTORY and fault.vector in CONTRIBUTORY) or (first == PAGE_FAULT and serious):
        return Event(DOUBLE_FAULT, "exception", 0)
    return Event(fault.vector, "exception", fault.error)


def _once(physical: Physical, env: Env, rflags: int, event: Event) -> None:
    if not env.cr[0] & CR0_PE:
        _real_mode(physical, env, rflags, event)
    elif env.efer & EFER_LMA:
        _long_mode(physical, env, rflags, event)
    else:
        _protected_mode(physical, env, rflags, event)
    env.hflags &= ~HF_INHIBIT_IRQ


def _real_mode(physical: Physical, env: Env, rflags: int, event: Event) -> None:
    if event.vector * 4 + 3 > env.idt.limit:
        raise GuestFault(PROTECTION, 0)
    vector = physical.read_int(env.idt.base + event.vector * 4, 4)
    sp = env.regs[RSP] & 0xFFFF
    for word in (rflags, env.segs[CS].selector, env.eip):
        sp = (sp - 2) & 0xFFFF
        physical.write(env.segs[SS].base + sp, (word & 0xFFFF).to_bytes(2, "little"))
    env.regs[RSP] = (env.regs[RSP] & ~0xFFFF) | sp
    env.eip = vector & 0xFFFF
    env.segs[CS].selector = vector >> 16
    env.segs[CS].base = (vector >> 16) << 4
    env.eflags &= ~(FLAG_IF | FLAG_TF | FLAG_RF)


def _code_segment(memory: Virtual, env: Env, selector: int, external: int) -> tuple[int, int, int]:
    """(base, limit, flags) of the handler's code segment."""
    if selector & ~3 == 0:
        raise GuestFault(PROTECTION, external)
    base, limit, flags = _descriptor(memory, env, selector, PROTECTION, external)
    if not flags & DESC_SEGMENT or not flags & DESC_CODE or (flags >> 13) & 3 > env.hflags & HF_CPL:
        raise GuestFault(PROTECTION, (selector & 0xFFFC) | external)
    if not flags & DESC_PRESENT:
        raise GuestFault(NOT_PRESENT, (selector & 0xFFFC) | external)
    return base, limit, flags


def _descriptor(memory: Virtual, env: Env, selector: int, vector: int, external: int) -> tuple[int, int, int]:
    table = env.ldt if selector & 4 else env.gdt
    if (selector & ~7) + 7 > table.limit:
        raise GuestFault(vector, (selector & 0xFFFC) | external)
    raw = memory.read_int(table.base + (selector & ~7), 8)
    low, high = raw & 0xFFFF_FFFF, raw >> 32
    base = (low >> 16) | (high & 0xFF) << 16 | (high & 0xFF00_0000)
    limit = (low & 0xFFFF) | (high & 0xF_0000)
    if high & DESC_GRANULAR:
        limit = limit << 12 | 0xFFF
    return base, limit, high & 0x00FF_FF00


def _gate_fault(event: Event) -> int:
    return event.vector * 8 + 2 + event.external


def _long_mode(physical: Physical, env: Env, rflags: int, event: Event) -> None:
    memory = Virtual(physical, env)
    cpl = env.hflags & HF_CPL
    if event.vector * 16 + 15 > env.idt.limit:
        raise GuestFault(PROTECTION, _gate_fault(event))
    gate = memory.read_int(env.idt.base + event.vector * 16, 16)
    kind, gate_dpl = (gate >> 40) & 0x1F, (gate >> 45) & 3
    if kind not in (0xE, 0xF):
        raise GuestFault(PROTECTION, _gate_fault(event))
    if event.kind == "software" and gate_dpl < cpl:
        raise GuestFault(PROTECTION, _gate_fault(event))
    if not gate >> 47 & 1:
        raise GuestFault(NOT_PRESENT, _gate_fault(event))
    selector = (gate >> 16) & 0xFFFF
    offset = (gate & 0xFFFF) | (gate >> 32) & 0xFFFF_0000 | (gate >> 64 & 0xFFFF_FFFF) << 32
    ist = (gate >> 32) & 7
    base, limit, flags = _code_segment(memory, env, selector, event.external)
    if not flags & DESC_LONG or flags & DESC_BIG:
        raise GuestFault(PROTECTION, (selector & 0xFFFC) | event.external)
    dpl = cpl if flags & DESC_CONFORMING else (flags >> 13) & 3
    if ist:
        rsp = _tss_word(memory, env, 28 + ist * 8, 8)
    elif dpl < cpl:
        rsp = _tss_word(memory, env, 4 + dpl * 8, 8)
    else:
        rsp = env.regs[RSP]
    if (rsp >> 47) not in (0, 0x1FFFF) and not env.cr[4] & CR4_LA57:
        raise GuestFault(STACK_FAULT, event.external)
    rsp &= ~0xF
    words = [env.segs[SS].selector, env.regs[RSP], rflags, env.segs[CS].selector, env.eip]
    if event.kind == "exception" and event.vector in HAS_ERROR_CODE:
        words.append(event.error)
    rsp = (rsp - 8 * len(words)) & 0xFFFF_FFFF_FFFF_FFFF
    # The whole frame is one write: a fault in it leaves neither registers nor memory half changed.
    memory.write(rsp, b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in reversed(words)))
    if dpl < cpl:
        _set(env.segs[SS], dpl, 0, 0, dpl << 13)
    env.regs[RSP] = rsp
    _set(env.segs[CS], (selector & ~3) | dpl, base, limit, flags)
    env.eip = offset
    env.hflags = (env.hflags & ~(HF_CPL | HF_ADDSEG)) | dpl | HF_CS32 | HF_SS32 | HF_CS64
    _flags_after(env, interrupt_gate=kind == 0xE)


def _protected_mode(physical: Physical, env: Env, rflags: int, event: Event) -> None:
    memory = Virtual(physical, env)
    cpl = env.hflags & HF_CPL
    if event.vector * 8 + 7 > env.idt.limit:
        raise GuestFault(PROTECTION, _gate_fault(event))
    gate = memory.read_int(env.idt.base + event.vector * 8, 8)
    kind, gate_dpl = (gate >> 40) & 0x1F, (gate >> 45) & 3
    if kind not in (0x6, 0x7, 0xE, 0xF):  # hardware task switches are not done: as if the gate were malformed
        raise GuestFault(PROTECTION, _gate_fault(event))
    if event.kind == "software" and gate_dpl < cpl:
        raise GuestFault(PROTECTION, _gate_fault(event))
    if not gate >> 47 & 1:
        raise GuestFault(NOT_PRESENT, _gate_fault(event))
    wide = bool(kind & 8)
    size = 4 if wide else 2
    selector = (gate >> 16) & 0xFFFF
    offset = (gate & 0xFFFF) | ((gate >> 32) & 0xFFFF_0000 if wide else 0)
    base, limit, flags = _code_segment(memory, env, selector, event.external)
    dpl = cpl if flags & DESC_CONFORMING else (flags >> 13) & 3
    words = [rflags, env.segs[CS].selector, env.eip]
    new_stack: tuple[int, int, int, int] | None = None
    if dpl < cpl:
        tss_wide = bool(env.tr.flags >> 8 & 8)
        esp = _tss_word(memory, env, 4 + dpl * 8, 4) if tss_wide else _tss_word(memory, env, 2 + dpl * 4, 2)
        ss = _tss_word(memory, env, 8 + dpl * 8, 2) if tss_wide else _tss_word(memory, env, 4 + dpl * 4, 2)
        stack_base, stack_limit, stack_flags = _descriptor(memory, env, ss, INVALID_TSS, event.external)
        if ss & 3 != dpl or (stack_flags >> 13) & 3 != dpl or not stack_flags & DESC_SEGMENT:
            raise GuestFault(INVALID_TSS, (ss & 0xFFFC) | event.external)
        if not stack_flags & DESC_PRESENT:
            raise GuestFault(STACK_FAULT, (ss & 0xFFFC) | event.external)
        new_stack = (ss, stack_base, stack_limit, stack_flags)
        words = [env.segs[SS].selector, env.regs[RSP], *words]
        if rflags & FLAG_VM:
            words = [env.segs[each].selector for each in (5, 4, 3, 0)] + words
    else:
        esp, stack_base, stack_flags = env.regs[RSP], env.segs[SS].base, env.segs[SS].flags
    if event.kind == "exception" and event.vector in HAS_ERROR_CODE:
        words.append(event.error)
    mask = 0xFFFF_FFFF if stack_flags & DESC_BIG else 0xFFFF
    sp = (esp - size * len(words)) & mask
    frame = b"".join((word & (1 << size * 8) - 1).to_bytes(size, "little") for word in reversed(words))
    memory.write((stack_base + sp) & 0xFFFF_FFFF, frame)
    env.regs[RSP] = (esp & ~mask & 0xFFFF_FFFF) | sp
    if new_stack is not None:
        _set(env.segs[SS], *new_stack)
        if rflags & FLAG_VM:
            for each in (0, 3, 4, 5):
                _set(env.segs[each], 0, 0, 0, 0)
    _set(env.segs[CS], (selector & ~3) | dpl, base, limit, flags)
    env.eip = offset
    env.hflags &= ~(HF_CPL | HF_CS32 | HF_SS32 | HF_CS64 | HF_ADDSEG)
    env.hflags |= dpl | (HF_CS32 if flags & DESC_BIG else 0) | (HF_SS32 if stack_flags & DESC_BIG else 0)
    if any(env.segs[each].base for each in (0, 2, 3)) or not flags & DESC_BIG:
        env.hflags |= HF_ADDSEG
    _flags_after(env, interrupt_gate=not kind & 1)


def _tss_word(memory: Virtual, env: Env, offset: int, size: int) -> int:
    if not env.tr.flags & DESC_PRESENT or offset + size - 1 > env.tr.limit:
        raise GuestFault(INVALID_TSS, env.tr.selector & 0xFFFC)
    return memory.read_int(env.tr.base + offset, size)


def _set(segment: Segment, selector: int, base: int, limit: int, flags: int) -> None:
    segment.selector, segment.base, segment.limit, segment.flags = selector, base, limit, flags


def _flags_after(env: Env, *, interrupt_gate: bool) -> None:
    env.eflags &= ~(FLAG_TF | FLAG_VM | FLAG_RF | FLAG_NT)
    if interrupt_gate:
        env.eflags &= ~FLAG_IF


def syscall(env: Env, rflags: int, star: int, target: int, mask: int) -> None:
    """SYSCALL, with ``env.eip`` after it: ring 0 at ``target``, without memory or checks (Intel SDM volume 2)."""
    env.regs[RCX] = env.eip
    env.regs[R11] = rflags & ~FLAG_RF
    selector = (star >> 32) & 0xFFFC
    _set(env.segs[CS], selector, 0, 0xFFFF_FFFF, FLAT_LONG_CODE)
    _set(env.segs[SS], selector + 8, 0, 0xFFFF_FFFF, FLAT_DATA)
    env.eip = target
    env.eflags &= ~(mask | FLAG_RF)
    env.hflags = (env.hflags & ~(HF_CPL | HF_ADDSEG | HF_INHIBIT_IRQ)) | HF_CS32 | HF_SS32 | HF_CS64
    # The arithmetic flags are lazy in the emulator and hold their values past a mask, as nothing reads them there.


def may_use_port(physical: Physical, env: Env, port: int, size: int) -> bool:
    """IOPL, else the I/O bitmap of the TSS (Intel SDM volume 1, section 19.5). The engine itself checks neither."""
    cpl = env.hflags & HF_CPL
    if not env.cr[0] & CR0_PE or (cpl <= env.eflags >> 12 & 3 and not env.eflags & FLAG_VM):
        return True
    try:
        base = _tss_word(Virtual(physical, env), env, 0x66, 2)
        bits = _tss_word(Virtual(physical, env), env, base + port // 8, 2)
    except GuestFault:
        return False
    return not bits >> (port & 7) & (1 << size) - 1
