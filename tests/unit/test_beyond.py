"""What a crash report calls an instruction that is beyond the emulation assist."""

from __future__ import annotations

import random

import pytest

from trivmm.hypervisor.kvm.beyond import name_refused


@pytest.mark.parametrize(
    ("code", "sort"),
    [
        ("62f17c4858c1", "AVX-512 (EVEX)"),
        ("c4e26990040a", "a gather of AVX2"),
        ("c4e26d2c00", "a masked move of AVX"),
        ("c5f058c1", "AVX (VEX map 1, opcode 58)"),
        ("c4e2", "AVX (VEX), cut short"),
        ("d927", "x87"),
        ("0ff7c1", "MASKMOVQ or MASKMOVDQU"),
        ("660ff7c1", "MASKMOVQ or MASKMOVDQU"),
        ("0f0b", "UD2"),
        ("0f01d0", "a system instruction"),
        ("f0f3480fb8c3", "opcode 0f b8 with LOCK"),
        ("660f38f8c0", "opcode 0f 38 f8"),
        ("8b07", "opcode 8b"),
        ("4c8b07", "opcode 8b"),
        ("0f", "opcode 0f, cut short"),
        ("6648", "prefixes and no opcode"),
    ],
)
def test_sorts(code: str, sort: str) -> None:
    raw = bytes.fromhex(code)
    assert name_refused(raw) == f"{sort}: {raw.hex(' ')}"


def test_no_bytes() -> None:
    assert name_refused(b"") == "not in 64-bit mode, or its bytes can't be read"


def test_any_bytes_have_a_name_of_one_line() -> None:
    dice = random.Random(1)
    for _ in range(5000):
        name = name_refused(dice.randbytes(dice.randrange(16)))
        assert name.isascii()
        assert name.isprintable()
        assert len(name) < 120
