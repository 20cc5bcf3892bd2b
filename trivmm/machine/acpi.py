"""ACPI tables: RSDP, XSDT, FADT, MADT and a DSDT, so that a guest finds CPUs, power registers and the PCI bus.

Pure bytes, made at boot and at every reboot, and never looked at again: from then on they are guest RAM, which a
migration carries. They lie from ``layout.ACPI_START`` on, in RAM that the memory map does not mention.

The machine is *hardware-reduced* (ACPI 6.5 section 4.1): no PM1 registers; reset and S5 are the one byte of
``acpi_port``. There is no MCFG: configuration space is reached by CF8 and CFC only.
"""

from __future__ import annotations

import struct
from typing import Final

from trivmm.machine import layout
from trivmm.machine.acpi_port import ACPI_PORTS, RESET, S5
from trivmm.machine.serial import COM1, COM1_IRQ

__all__ = ["acpi_tables"]

HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
RSDP_SIZE: Final = 36
CREATOR: Final = b"TRIV"
ALIGNMENT: Final = 16

RESET_REGISTER, HARDWARE_REDUCED = 1 << 10, 1 << 20  # FADT flags; a CPU's WBINVD works too (bit 0)
NO_VGA: Final = 1 << 2
SYSTEM_IO: Final = 1
LAPIC_IDS: Final = 255  # of 8 bits; from here on an x2APIC entry is needed
ENABLED: Final = 1

PCI_ROOT: Final = 0x030A_D041  # PNP0A03, compressed (ACPI 6.5 section 19.6.36)
UART_16550: Final = 0x0105_D041  # PNP0501
FIXED_RANGE: Final = 0x0C
READ_WRITE: Final = 1
END_TAG: Final = b"\x79\x00"


def acpi_tables(vcpus: int) -> bytes:
    """Everything from ``layout.ACPI_START`` on, the RSDP first; vCPU n has APIC id n."""
    image = bytearray(RSDP_SIZE)

    def place(table: bytes) -> int:
        image.extend(bytes(-len(image) % ALIGNMENT))
        at = layout.ACPI_START + len(image)
        image.extend(table)
        return at

    dsdt = place(_table(b"DSDT", 2, _namespace()))
    tables = [place(_fadt(dsdt)), place(_madt(vcpus))]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    image[:RSDP_SIZE] = _rsdp(xsdt)
    return bytes(image)


def _sum(data: bytes) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = HEADER.pack(signature, HEADER.size + len(body), revision, 0, b"TRIVMM", b"TRIVMM  ", 1, CREATOR, 1)
    return header[:9] + bytes([_sum(header + body)]) + header[10:] + body


def _rsdp(xsdt: int) -> bytes:
    """ACPI 6.5 section 5.2.5.3: the first sum is over 20 bytes, the second over all."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"TRIVMM", 2, 0)
    first = first[:8] + bytes([_sum(first)]) + first[9:]
    rest = struct.pack("<IQ", RSDP_SIZE, xsdt)
    return first + rest + bytes([_sum(first + rest), 0, 0, 0])


def _fadt(dsdt: int) -> bytes:
    """Section 5.2.9, revision 6.5. Offsets below are the table's."""
    table = bytearray(276)
    register = struct.pack("<BBBBQ", SYSTEM_IO, 8, 0, 1, ACPI_PORTS[0])
    struct.pack_into("<H", table, 109, NO_VGA)
    struct.pack_into("<I", table, 112, 1 | RESET_REGISTER | HARDWARE_REDUCED)
    table[116:128] = register
    table[128] = RESET
    table[131] = 5  # minor revision
    struct.pack_into("<Q", table, 140, dsdt)
    table[244:256] = table[256:268] = register  # sleep control, sleep status
    table[268:276] = b"TRIVMM\0\0"
    return _table(b"FACP", 6, bytes(table[HEADER.size :]))


def _madt(vcpus: int) -> bytes:
    """Section 5.2.12: every vCPU, the I/O APIC, and the serial port's line as it is (ISA: edge, active high)."""
    body = bytearray(struct.pack("<II", layout.LAPIC_START, 0))
    for index in range(vcpus):
        if index < LAPIC_IDS:
            body += struct.pack("<BBBBI", 0, 8, index, index, ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, index, ENABLED, index)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC_START, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, COM1_IRQ, COM1_IRQ, 0)
    return _table(b"APIC", 5, bytes(body))


# --- AML: section 20 ---------------------------------------------------------------------------------------------


def _package(opcode: bytes, body: bytes) -> bytes:
    """PkgLength counts itself; two bytes hold 4095."""
    length = len(body) + 2
    return opcode + bytes([0x40 | length & 0xF, length >> 4]) + body


def _name(name: bytes, value: bytes) -> bytes:
    return b"\x08" + name + value


def _byte(value: int) -> bytes:
    return bytes([0x0A, value])


def _device(name: bytes, hardware_id: int, resources: bytes) -> bytes:
    resources += END_TAG
    buffer = _package(b"\x11", _byte(len(resources)) + resources)
    identity = _name(b"_HID", b"\x0c" + struct.pack("<I", hardware_id)) + _name(b"_UID", _byte(0))
    return _package(b"\x5b\x82", name + identity + _name(b"_CRS", buffer))


def _ports(first: int, count: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def _range(tag: int, kind: int, flags: int, width: str, first: int, last: int) -> bytes:
    """An address space descriptor: granularity, first, last, translation, length."""
    body = struct.pack(f"<BBB5{width}", kind, FIXED_RANGE, flags, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", tag, len(body)) + body


def _namespace() -> bytes:
    bus = (
        _range(0x88, 2, 0, "H", 0, 0)
        + _ports(0xCF8, 8)
        + _range(0x87, 0, READ_WRITE, "I", layout.BAR32_START, layout.BAR32_START + layout.BAR32_SIZE - 1)
        + _range(0x8A, 0, READ_WRITE, "Q", layout.BAR64_START, layout.BAR64_END - 1)
    )
    uart = _ports(*COM1) + struct.pack("<BH", 0x22, 1 << COM1_IRQ)
    devices = _device(b"PCI0", PCI_ROOT, bus) + _device(b"COM1", UART_16550, uart)
    sleep = _package(b"\x12", bytes([4]) + _byte(S5) + b"\0\0\0")
    return _package(b"\x10", b"\\_SB_" + devices) + _name(b"_S5_", sleep)
