"""AML by hand: the few terms that our DSDT is made of, as bytes (ACPI 6.5 section 20). Names are four bytes long.

A path is AML too: a backslash and one name, or for more than one step :func:`path`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

__all__ = [
    "ARG0",
    "ARG1",
    "LOCAL0",
    "address_range",
    "and_",
    "byte",
    "call",
    "device",
    "edge_interrupt",
    "eisa",
    "if_",
    "integer",
    "io_ports",
    "isa_irq",
    "memory_byte",
    "memory_dwords",
    "memory_range",
    "method",
    "name",
    "notify",
    "package",
    "path",
    "scope",
    "shift_left",
    "slot",
    "store",
    "text",
]

FIXED_RANGE: Final = 0x0C
END_TAG: Final = b"\x79\x00"
LOCAL0: Final = b"\x60"
ARG0: Final = b"\x68"
ARG1: Final = b"\x69"
NULL_NAME: Final = b"\x00"  # as a target: nowhere
SERIALIZED: Final = 1 << 3
SYSTEM_MEMORY: Final = 0
BYTE_ACCESS_WRITE_ZEROS: Final = 1 | 2 << 5
DWORD_ACCESS_WRITE_ZEROS: Final = 3 | 2 << 5
EDGE_CONSUMER: Final = 1 | 1 << 1  # active high, exclusive
MAX_PACKAGE: Final = 4095  # what two bytes of PkgLength hold; three hold a megabyte


def _package(opcode: bytes, body: bytes) -> bytes:
    """PkgLength (section 20.2.4) counts itself."""
    length = len(body) + 2
    if length <= MAX_PACKAGE:
        return opcode + bytes([0x40 | length & 0xF, length >> 4]) + body
    length += 1
    if length >> 20:
        raise ValueError(f"an AML package of {length} bytes")
    return opcode + bytes([0x80 | length & 0xF, length >> 4 & 0xFF, length >> 12]) + body


# --- names and data ----------------------------------------------------------------------------------------------


def path(*steps: bytes) -> bytes:
    """From the root, two steps or more."""
    prefix = b"\x2e" if len(steps) == 2 else bytes([0x2F, len(steps)])
    return b"\\" + prefix + b"".join(steps)


def name(what: bytes, value: bytes) -> bytes:
    return b"\x08" + what + value


def byte(value: int) -> bytes:
    return bytes([0x0A, value])


def integer(value: int) -> bytes:
    """Of up to 32 bits, in the shortest of its forms."""
    if value < 2:
        return bytes([value])
    if value < 1 << 8:
        return byte(value)
    return b"\x0b" + struct.pack("<H", value) if value < 1 << 16 else b"\x0c" + struct.pack("<I", value)


def text(value: str) -> bytes:
    return b"\x0d" + value.encode("ascii") + b"\0"


def eisa(identity: str) -> bytes:
    """``PNP0A03``, compressed into 32 bits (section 19.6.36)."""
    letters = [ord(each) - 0x40 for each in identity[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(identity[3:], 16)
    return b"\x0c" + packed.to_bytes(4, "big")


def package(*elements: bytes) -> bytes:
    return _package(b"\x12", bytes([len(elements)]) + b"".join(elements))


# --- objects -----------------------------------------------------------------------------------------------------


def scope(where: bytes, body: bytes) -> bytes:
    return _package(b"\x10", where + body)


def device(what: bytes, hardware_id: bytes, resources: bytes = b"", body: bytes = b"", number: int = 0) -> bytes:
    """``resources`` are descriptors for its _CRS; none makes none. ``number`` among those with its id."""
    identity = name(b"_HID", hardware_id) + name(b"_UID", byte(number))
    if resources:
        resources += END_TAG
        identity += name(b"_CRS", _package(b"\x11", byte(len(resources)) + resources))
    return _package(b"\x5b\x82", what + identity + body)


def slot(what: bytes, body: bytes) -> bytes:
    """A device that its bus enumerates, and that has an _ADR instead of a _HID."""
    return _package(b"\x5b\x82", what + body)


def method(what: bytes, arguments: int, body: bytes) -> bytes:
    return _package(b"\x14", what + bytes([arguments | SERIALIZED]) + body)


def memory_byte(region: bytes, field: bytes, gpa: int) -> bytes:
    """An operation region of one byte of MMIO, and the field that is all of it."""
    fields = _package(b"\x5b\x81", region + bytes([BYTE_ACCESS_WRITE_ZEROS]) + field + bytes([8]))
    return _region(region, gpa, 1) + fields


def memory_dwords(region: bytes, fields: Sequence[bytes], gpa: int) -> bytes:
    """An operation region of 32-bit registers, each a field."""
    listed = b"".join(field + bytes([32]) for field in fields)
    declared = _package(b"\x5b\x81", region + bytes([DWORD_ACCESS_WRITE_ZEROS]) + listed)
    return _region(region, gpa, 4 * len(fields)) + declared


def _region(what: bytes, gpa: int, size: int) -> bytes:
    return b"\x5b\x80" + what + bytes([SYSTEM_MEMORY]) + b"\x0c" + struct.pack("<I", gpa) + byte(size)


# --- statements --------------------------------------------------------------------------------------------------


def store(source: bytes, target: bytes) -> bytes:
    return b"\x70" + source + target


def and_(left: bytes, right: bytes) -> bytes:
    return b"\x7b" + left + right + NULL_NAME


def shift_left(value: bytes, count: bytes, target: bytes) -> bytes:
    """``target = value << count``"""
    return b"\x79" + value + count + target


def call(target: bytes, *arguments: bytes) -> bytes:
    return target + b"".join(arguments)


def if_(condition: bytes, body: bytes) -> bytes:
    return _package(b"\xa0", condition + body)


def notify(target: bytes, value: bytes) -> bytes:
    return b"\x86" + target + value


# --- resource descriptors: section 6.4 ---------------------------------------------------------------------------


def io_ports(first: int, count: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def isa_irq(line: int) -> bytes:
    return struct.pack("<BH", 0x22, 1 << line)


def edge_interrupt(gsi: int) -> bytes:
    return struct.pack("<BHBBI", 0x89, 6, EDGE_CONSUMER, 1, gsi)


def memory_range(first: int, size: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, first, size)


def address_range(tag: int, kind: int, flags: int, width: str, first: int, last: int) -> bytes:
    """An address space descriptor: granularity, first, last, translation, length."""
    body = struct.pack(f"<BBB5{width}", kind, FIXED_RANGE, flags, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", tag, len(body)) + body
