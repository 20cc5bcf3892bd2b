"""The emulator's CPU state as it lies in memory: where each register is, and which bytes of a stranger are safe.

The register API of the engine has no segment limits, no error codes and no way back to 32-bit mode, so the state is
taken as the engine's raw context (``uc_context_save``) and read through the layout below. The layout belongs to one
version of the engine: :data:`ENGINE_VERSION` is part of a saved state's name, and another version is refused.

A context that came over a network is checked field by field where a wild value would make the *emulator* (not the
guest) misbehave: see :func:`refusal`.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["CONTEXT_BYTES", "ENGINE_VERSION", "HEADER_BYTES", "Env", "Segment", "merged", "refusal"]

ENGINE_VERSION: Final = (2, 1, 4)
HEADER_BYTES: Final = 40  # the engine's own bookkeeping before the registers; holds host pointers, never saved
CONTEXT_BYTES: Final = 5568

# Segment numbers, as instructions encode them.
ES, CS, SS, DS, FS, GS = range(6)

# hflags: what the translator keys its code on.
HF_CPL: Final = 3
HF_INHIBIT_IRQ: Final = 1 << 3
HF_CS32: Final = 1 << 4
HF_SS32: Final = 1 << 5
HF_ADDSEG: Final = 1 << 6
HF_PE: Final = 1 << 7
HF_LMA: Final = 1 << 14
HF_CS64: Final = 1 << 15
HF_SAVED: Final = sum(1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 14, 15, 22, 23))
"""The flags that a saved CPU may have; the others are never set here (system management, nested guests), or copies."""

CR0_PE: Final = 1
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
EFER_SCE: Final = 1
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11

FLAG_TF: Final = 1 << 8
FLAG_IF: Final = 1 << 9
FLAG_NT: Final = 1 << 14
FLAG_RF: Final = 1 << 16
FLAG_VM: Final = 1 << 17

_CC_OP_COUNT: Final = 64  # the lazy-flags operations of the translator are fewer than this


class Segment(ctypes.Structure):
    """``flags`` is the high word of the descriptor, bits 8-23 in place."""

    _fields_ = (
        ("selector", ctypes.c_uint32),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )

    selector: int
    base: int
    limit: int
    flags: int


class Env(ctypes.Structure):
    """The registers, laid over the engine's context of version 2.1.4."""

    _fields_ = (
        ("regs", ctypes.c_uint64 * 16),
        ("eip", ctypes.c_uint64),
        ("eflags", ctypes.c_uint64),  # without the arithmetic flags, which are lazy
        ("cc_dst", ctypes.c_uint64),
        ("cc_src", ctypes.c_uint64),
        ("cc_src2", ctypes.c_uint64),
        ("cc_op", ctypes.c_uint32),
        ("df", ctypes.c_int32),
        ("hflags", ctypes.c_uint32),
        ("hflags2", ctypes.c_uint32),
        ("segs", Segment * 6),
        ("ldt", Segment),
        ("tr", Segment),
        ("gdt", Segment),
        ("idt", Segment),
        ("cr", ctypes.c_uint64 * 5),
        ("_a", ctypes.c_uint8 * (592 - 464)),
        ("efer", ctypes.c_uint64),
        ("_b", ctypes.c_uint8 * (604 - 600)),
        ("fpstt", ctypes.c_uint32),
        ("_c", ctypes.c_uint8 * (776 - 608)),
        ("x87_status", ctypes.c_uint8 * 8),  # rounding modes of the emulator's own arithmetic, derived from FPCW
        ("_ft0", ctypes.c_uint8 * 16),
        ("sse_status", ctypes.c_uint8 * 16),  # the same for MMX and SSE, derived from MXCSR
        ("mxcsr", ctypes.c_uint32),
        ("_d", ctypes.c_uint8 * (5384 - 820)),
        ("error_code", ctypes.c_int32),
        ("exception_is_int", ctypes.c_int32),
        ("exception_next_eip", ctypes.c_uint64),
        ("dr", ctypes.c_uint64 * 8),
        ("breakpoints", ctypes.c_uint64 * 4),  # host pointers; zero unless the guest armed a debug register
        ("old_exception", ctypes.c_int32),
    )

    regs: ctypes.Array[ctypes.c_uint64]
    eip: int
    eflags: int
    cc_op: int
    df: int
    hflags: int
    hflags2: int
    segs: ctypes.Array[Segment]
    ldt: Segment
    tr: Segment
    gdt: Segment
    idt: Segment
    cr: ctypes.Array[ctypes.c_uint64]
    efer: int
    fpstt: int
    x87_status: ctypes.Array[ctypes.c_uint8]
    sse_status: ctypes.Array[ctypes.c_uint8]
    mxcsr: int
    error_code: int
    exception_is_int: int
    exception_next_eip: int
    dr: ctypes.Array[ctypes.c_uint64]
    breakpoints: ctypes.Array[ctypes.c_uint64]
    old_exception: int


RAX, RCX, RDX, RBX, RSP, RBP, RSI = range(7)
R11: Final = 11


def refusal(raw: bytes) -> str | None:
    """Why these context bytes cannot be given to the engine, or None when they can."""
    if len(raw) != CONTEXT_BYTES:
        return f"the register block has {len(raw)} bytes, not {CONTEXT_BYTES}"
    env = Env.from_buffer_copy(raw)
    if env.cc_op >= _CC_OP_COUNT:
        return "its lazy flags name no operation"
    if env.df not in (1, -1):
        return "its direction flag is neither way"
    if env.fpstt > 7:
        return "its x87 stack top is outside the stack"
    if env.hflags & ~HF_SAVED:
        return "it is in a mode that this CPU does not have"
    modes = ((HF_PE, env.cr[0] & CR0_PE), (HF_LMA, env.efer & EFER_LMA))
    if any(bool(env.hflags & flag) != bool(register) for flag, register in modes):
        return "its mode does not agree with its control registers"
    return None


def merged(raw: bytes, pristine: bytes) -> bytes:
    """``raw`` where a guest's own registers lie, ``pristine`` where the emulator keeps what is its own."""
    into = bytearray(pristine)
    for start, end in _GUEST_RANGES:
        into[start:end] = raw[start:end]
    return bytes(into)


def _at(name: str) -> int:
    return int(getattr(Env, name).offset)


_GUEST_RANGES: Final = (
    (0, _at("hflags2")),
    (_at("segs"), _at("_a")),
    (_at("efer"), _at("_b")),
    (_at("fpstt"), _at("x87_status")),
    (_at("mxcsr"), _at("error_code")),
    (_at("dr"), _at("dr") + 7 * 8),  # not DR7: arming breakpoints makes the emulator allocate
)
