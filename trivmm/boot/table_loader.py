"""QEMU's ACPI table loader: tables that firmware places itself, and the script that tells it how.

Our tables are made for one address (:mod:`trivmm.boot.acpi`). Here every address in them is turned into an offset into
the file that holds them, and the script has the firmware allocate that file, add its address to each pointer, and sum
the tables again. The RSDP is a file of its own, in the segment in which an OS looks for one.

Source: QEMU's hw/acpi/bios-linker-loader.c, SeaBIOS' src/fw/romfile_loader.h: entries of 128 bytes.
"""

from __future__ import annotations

import struct
from typing import Final

from trivmm.boot.acpi import DSDT_POINTER, DSDT_POINTER_32, HEADER, RSDP_SIZE, XSDT_POINTER
from trivmm.memory import layout

__all__ = ["loader_files"]

ENTRY: Final = 128
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
HIGH, F_SEGMENT = 1, 2
ALIGNMENT: Final = 64
RSDP_FILE, TABLES_FILE, SCRIPT_FILE = b"etc/acpi/rsdp", b"etc/acpi/tables", "etc/table-loader"
CHECKSUM: Final = 9  # of a table's header
RSDP_CHECKSUM, RSDP_FIRST_PART, RSDP_EXTENDED_CHECKSUM = 8, 20, 32


def loader_files(image: bytes) -> dict[str, bytes]:
    """``fw_cfg`` files by name, for ``image`` as :func:`~trivmm.boot.acpi.acpi_tables` gives it."""
    tables = bytearray(image)
    script = _allocate(RSDP_FILE, 16, F_SEGMENT) + _allocate(TABLES_FILE, ALIGNMENT, HIGH)
    xsdt = _relocate(tables, XSDT_POINTER)
    (length,) = struct.unpack_from("<I", tables, xsdt + 4)
    pointers = dict.fromkeys(range(xsdt + HEADER.size, xsdt + length, 8), 8)
    found = [_relocate(tables, each) for each in pointers]
    for table in list(found):
        if tables[table : table + 4] == b"FACP":
            pointers |= {table + DSDT_POINTER: 8, table + DSDT_POINTER_32: 4}
            found.append(_relocate(tables, table + DSDT_POINTER))
            struct.pack_into("<I", tables, table + DSDT_POINTER_32, found[-1])
    for at, size in pointers.items():
        script += _entry(ADD_POINTER, "<56s56sIB", TABLES_FILE, TABLES_FILE, at, size)
    for table in [xsdt, *found]:
        (length,) = struct.unpack_from("<I", tables, table + 4)
        tables[table + CHECKSUM] = 0
        script += _entry(ADD_CHECKSUM, "<56sIII", TABLES_FILE, table + CHECKSUM, table, length)
    rsdp = tables[:RSDP_SIZE]
    rsdp[RSDP_CHECKSUM] = rsdp[RSDP_EXTENDED_CHECKSUM] = 0
    script += _entry(ADD_POINTER, "<56s56sIB", RSDP_FILE, TABLES_FILE, XSDT_POINTER, 8)
    script += _entry(ADD_CHECKSUM, "<56sIII", RSDP_FILE, RSDP_CHECKSUM, 0, RSDP_FIRST_PART)
    script += _entry(ADD_CHECKSUM, "<56sIII", RSDP_FILE, RSDP_EXTENDED_CHECKSUM, 0, RSDP_SIZE)
    return {RSDP_FILE.decode(): bytes(rsdp), TABLES_FILE.decode(): bytes(tables), SCRIPT_FILE: script}


def _relocate(tables: bytearray, at: int) -> int:
    """The offset that the pointer at ``at`` leads to, which it holds from now on."""
    (address,) = struct.unpack_from("<Q", tables, at)
    offset = int(address) - layout.ACPI_START
    struct.pack_into("<Q", tables, at, offset)
    return offset


def _allocate(name: bytes, alignment: int, zone: int) -> bytes:
    return _entry(ALLOCATE, "<56sIB", name, alignment, zone)


def _entry(command: int, form: str, *values: bytes | int) -> bytes:
    return (struct.pack("<I", command) + struct.pack(form, *values)).ljust(ENTRY, b"\0")
