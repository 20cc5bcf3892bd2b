"""The ACPI tables as a guest walks them: sums, lengths, pointers, and what it learns."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from trivmm.boot import aml
from trivmm.boot.acpi import acpi_tables
from trivmm.memory import layout


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


def test_no_button_is_a_fixed_one() -> None:
    """FADT flags 4 and 5: the power button is a device of the namespace, and there is none for sleep."""
    (flags,) = struct.unpack_from("<I", _walk(1)[b"FACP"], 112)
    assert flags == 1 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20


def _packages(code: bytes, opcode: bytes) -> list[bytes]:
    """Bodies of the packages of a kind that have a four-byte name first, by their own lengths."""
    found, at = [], code.find(opcode)
    while at >= 0:
        start = at + len(opcode)
        more = code[start] >> 6
        length = code[start] & 0xF | int.from_bytes(code[start + 1 : start + 1 + more], "little") << 4
        body = code[start + 1 + more : start + length]
        if body[:4].replace(b"_", b"").isalnum():
            found.append(body)
        at = code.find(opcode, start)
    return found


def test_the_power_button_is_what_the_ged_event_notifies() -> None:
    dsdt = _walk(1)[b"DSDT"][36:]
    devices = {body[:4]: body for body in _packages(dsdt, b"\x5b\x82")}
    slots = {b"S%03d" % number for number in range(1, 32)}
    assert set(devices) == {b"PC00", b"MBRD", b"PHPR", b"COM1", b"PWRB", b"GEC_", b"GED_"} | slots
    assert b"_HID\x0c\x41\xd0\x0c\x0c" in devices[b"PWRB"]  # PNP0C0C
    assert b"_HID\x0dACPI0013\0" in devices[b"GED_"]
    assert bytes.fromhex("89 0600 03 01 0d000000 7900") in devices[b"GED_"]  # edge, active high, GSI 13, the end
    (event,) = _packages(devices[b"GED_"], b"\x14")
    assert event == b"_EVT\x09\\\x2f\x03_SB_GEC_ESCN"
    register = struct.pack("<I", layout.GED_START)
    assert b"\x5b\x80GDST\x00\x0c" + register + b"\x0a\x01" in devices[b"GEC_"]  # SystemMemory, one byte
    assert bytes.fromhex("86 0900 01") + register + struct.pack("<I", 1) in devices[b"GEC_"]
    (scan,) = _packages(devices[b"GEC_"], b"\x14")
    # Local0 = GDAT; If (Local0 & 4) { \\_SB.PHPR.PSCN () }; If (Local0 & 8) { Notify (\\_SB.PWRB, 0x80) }
    plugged = b"\xa0\x46\x01\x7b\x60\x0a\x04\x00\\\x2f\x03_SB_PHPRPSCN"
    pressed = b"\xa0\x44\x01\x7b\x60\x0a\x08\x00\x86\\\x2e_SB_PWRB\x0a\x80"
    assert scan == b"ESCN\x08\x70GDAT\x60" + plugged + pressed


def test_every_slot_but_the_host_bridges_can_be_ejected_and_is_notified() -> None:
    dsdt = _walk(1)[b"DSDT"][36:]
    devices = {body[:4]: body for body in _packages(dsdt, b"\x5b\x82")}
    registers = struct.pack("<I", layout.PCI_HOTPLUG_START)
    assert b"\x5b\x80PCST\x00\x0c" + registers + b"\x0a\x10" in devices[b"PHPR"]  # SystemMemory, 16 bytes
    assert b"PCIU\x20PCID\x20B0EJ\x20PSEG\x20" in devices[b"PHPR"]
    methods = {body[:4]: body for body in _packages(dsdt, b"\x14")}
    assert methods[b"PCEJ"] == b"PCEJ\x09\x79\x01\x68B0EJ"  # B0EJ = 1 << Arg0
    for number in range(1, 32):
        name = b"S%03d" % number
        eject = _packages(devices[name], b"\x14")[-1]
        assert eject == b"_EJ0\x09\\\x2f\x03_SB_PHPRPCEJ_SUN"
        assert b"_SUN" + aml.integer(number) + b"\x08_ADR" + aml.integer(number << 16) in devices[name]
        asked = b"\x7b\x68" + aml.integer(1 << number) + b"\x00\x86" + name + b"\x69"  # Arg0 & 1 << n: Notify (…, Arg1)
        assert asked in methods[b"DVNT"]
    assert b"S000" not in dsdt


def test_mcfg_names_the_window_that_a_motherboard_device_has() -> None:
    tables = _walk(1)
    assert struct.unpack("<8xQHBBI", tables[b"MCFG"][36:]) == (0xE800_0000, 0, 0, 0, 0)
    devices = {body[:4]: body for body in _packages(tables[b"DSDT"], b"\x5b\x82")}
    assert bytes.fromhex("86 0900 01") + struct.pack("<II", 0xE800_0000, 1 << 20) in devices[b"MBRD"]


def test_identities_and_lengths() -> None:
    assert aml.eisa("PNP0A03") == bytes.fromhex("0c 41d00a03")
    assert aml.eisa("PNP0501") == bytes.fromhex("0c 41d00501")
    assert aml.scope(b"ABCD", bytes(4095 - 6)).startswith(b"\x10\x4f\xffABCD")
    assert aml.scope(b"ABCD", bytes(4095 - 5)).startswith(b"\x10\x81\x00\x01ABCD")  # 4097, its third byte included
    with pytest.raises(ValueError, match="1048576"):
        aml.scope(b"ABCD", bytes((1 << 20) - 7))
    assert [aml.integer(value) for value in (0, 1, 2, 255)] == [b"\0", b"\1", b"\x0a\2", b"\x0a\xff"]
    assert [aml.integer(value) for value in (256, 1 << 31)] == [b"\x0b\0\1", b"\x0c\0\0\0\x80"]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (the package acpica-tools)")
def test_iasl_reads_the_namespace_and_compiles_it_again(tmp_path: Path) -> None:
    def iasl(*words: str) -> str:
        done = subprocess.run(["iasl", *words], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    (tmp_path / "dsdt.aml").write_bytes(_walk(2)[b"DSDT"])
    assert "Disassembly completed" in iasl("-d", "dsdt.aml")
    source = (tmp_path / "dsdt.dsl").read_text()
    for line in (
        "Device (PWRB)",
        'Name (_HID, EisaId ("PNP0C0C")',
        'Name (_HID, "ACPI0013"',
        "Notify (\\_SB.PWRB, 0x80)",
        "Device (PHPR)",
        "Device (S031)",
        "\\_SB.PHPR.PCEJ (_SUN)",
        "\\_SB.PC00.DVNT (PCID, 0x03)",
        "B0EJ = (One << Arg0)",
    ):
        assert line in source
    assert "0 Errors, 0 Warnings" in iasl("-we", "-p", "again", "dsdt.dsl")


@pytest.mark.skipif(shutil.which("iasl") is None, reason="needs iasl (the package acpica-tools)")
@pytest.mark.parametrize("vcpus", [1, 300])
def test_iasl_compiles_every_table_to_what_it_was(tmp_path: Path, vcpus: int) -> None:
    def iasl(*words: str) -> str:
        done = subprocess.run(["iasl", *words], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    found = _walk(vcpus)
    assert set(found) == {b"DSDT", b"FACP", b"APIC", b"MCFG"}
    for signature, table in found.items():
        name = signature.decode().lower()
        (tmp_path / f"{name}.aml").write_bytes(table)
        assert not re.search(r"\b(error|warning|invalid|mismatch)", iasl("-d", f"{name}.aml"), re.IGNORECASE)
        said = iasl("-we", "-p", f"{name}_again", f"{name}.dsl")
        assert "0 Errors, 0 Warnings" in said or re.search(r"Table data compiled|Table Output", said)
        assert not re.search(r"\b[1-9]\d* (Errors|Warnings)|^(Error|Warning) ", said, re.MULTILINE)
        if signature != b"DSDT":  # which the compiler may spell another way
            again = bytearray((tmp_path / f"{name}_again.aml").read_bytes())
            again[9], again[28:36] = table[9], table[28:36]  # the sum, and who compiled it
            assert again == table
