"""Names the instruction that neither KVM's emulator nor the emulation assist has, for a crash report.

By its encoding (Intel SDM volume 2, chapter 2 and appendix A), as far as a reader of the report needs it to say which
feature the guest should not have used; the bytes themselves are there too.
"""

from __future__ import annotations

from typing import Final

__all__ = ["name_refused"]

PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
LOCK: Final = 0xF0
VEX2, VEX3, EVEX, ESCAPE = 0xC5, 0xC4, 0x62, 0x0F
GATHERS: Final = range(0x90, 0x94)
MASKED_MOVES: Final = (0x2C, 0x2D, 0x2E, 0x2F, 0x8C, 0x8E)
X87: Final = range(0xD8, 0xE0)
TWO_BYTE_SORTS: Final = {
    0x00: "a descriptor table's or task's",
    0x01: "a system instruction",
    0x0B: "UD2",
    0x34: "SYSENTER",
    0x35: "SYSEXIT",
    0xAE: "FXSAVE's, XSAVE's or a fence's group",
    0xC7: "CMPXCHG16B's or XSAVEC's group",
    0xF7: "MASKMOVQ or MASKMOVDQU",
}


def name_refused(code: bytes) -> str:
    """``code``: the bytes at RIP as the assist has read them, none where it did not get so far; hostile.

    Gives the sort and the bytes: ``AVX-512 (EVEX): 62 f1 7c 48 58 c1``."""
    if not code:
        return "not in 64-bit mode, or its bytes can't be read"
    return f"{_sort(code)}: {code.hex(' ')}"


def _sort(code: bytes) -> str:
    at = 0
    while at < len(code) and code[at] in PREFIXES:
        at += 1
    locked = LOCK in code[:at]
    if at < len(code) and code[at] & 0xF0 == 0x40:  # REX
        at += 1
    rest = code[at:]
    if not rest:
        return "prefixes and no opcode"
    first = rest[0]
    if first == EVEX:
        return "AVX-512 (EVEX)"
    if first in (VEX2, VEX3):
        return _vex_sort(rest)
    what = _legacy_sort(rest)
    return f"{what} with LOCK" if locked else what


def _vex_sort(rest: bytes) -> str:
    short = rest[0] == VEX2
    opcode_at = 2 if short else 3
    if len(rest) <= opcode_at:
        return "AVX (VEX), cut short"
    space = 1 if short else rest[1] & 31
    opcode = rest[opcode_at]
    if space == 2 and opcode in GATHERS:
        return "a gather of AVX2"
    if space == 2 and opcode in MASKED_MOVES:
        return "a masked move of AVX"
    return f"AVX (VEX map {space}, opcode {opcode:02x})"


def _legacy_sort(rest: bytes) -> str:
    if rest[0] in X87:
        return "x87"
    if rest[0] != ESCAPE:
        return f"opcode {rest[0]:02x}"
    if len(rest) < 2:
        return "opcode 0f, cut short"
    if rest[1] in (0x38, 0x3A):
        return f"opcode {rest[:3].hex(' ')}"
    return TWO_BYTE_SORTS.get(rest[1], f"opcode 0f {rest[1]:02x}")
