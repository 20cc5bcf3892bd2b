"""The ACPI tables as a guest walks them: sums, lengths, pointers, and what it learns."""

from __future__ import annotations

import struct

import pytest

from trivmm.machine import layout
from trivmm.machine.acpi import acpi_tables


def _walk(vcpus: int) -> dict[bytes, bytes]:
    image = acpi_tables(vcpus)

    def table(gpa: int) -> bytes:
        at = gpa - layout.ACPI_START
        (length,) = struct.unpack_from("<I", image, at + 4)
        found = image[at : at + length]
        assert len(found) == length
        assert not sum(found) & 0xFF
        assert not gpa % 16
        return found

    assert image.startswith(b"RSD PTR ")
    assert not sum(image[:20]) & 0xFF
    assert not sum(image[:36]) & 0xFF
    xsdt = table(struct.unpack_from("<Q", image, 24)[0])
    assert xsdt[:4] == b"XSDT"
    tables = {each[:4]: each for each in map(table, struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]))}
    dsdt = table(struct.unpack_from("<Q", tables[b"FACP"], 140)[0])
    return tables | {dsdt[:4]: dsdt}


@pytest.mark.parametrize("vcpus", [1, 2, 254, 300])
def test_every_vcpu_is_listed_once(vcpus: int) -> None:
    madt = _walk(vcpus)[b"APIC"]
    found, at = [], 44
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        if kind == 0:
            found.append(madt[at + 3])
        elif kind == 9:
            found.append(struct.unpack_from("<I", madt, at + 4)[0])
        at += length
    assert at == len(madt)
    assert found == list(range(vcpus))


def test_tables_end_below_high_ram() -> None:
    assert layout.ACPI_START + len(acpi_tables(300)) <= layout.HIGH_RAM_START


def test_reset_and_sleep_are_the_acpi_port() -> None:
    fadt = _walk(1)[b"FACP"]
    register = struct.pack("<BBBBQ", 1, 8, 0, 1, 0x600)
    assert fadt[116:128] == fadt[244:256] == fadt[256:268] == register
    assert fadt[128] == 1


def test_namespace_lengths_nest() -> None:
    """Each package ends inside its parent; the scope and \\_S5 fill the DSDT."""
    aml = _walk(1)[b"DSDT"][36:]
    length = aml[1] & 0xF | aml[2] << 4
    assert aml[0] == 0x10
    assert aml[1] >> 6 == 1
    assert aml[1 + length :] == b"\x08_S5_\x12\x48\x00\x04\x0a\x05\x00\x00\x00"
