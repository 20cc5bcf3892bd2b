"""SMBIOS: who made the machine, its serial number and UUID, and a user's own words for the guest (OEM strings).

Pure bytes, made at boot and at every reboot. They lie from ``layout.SMBIOS_START`` on, the first place where an OS
looks for an entry point (DSP0134 section 5.2.2), in RAM that the memory map does not mention; the entry point is the
64-bit one, the structures follow it. Names are Cloud Hypervisor's where its guests may look for them, except that of
who made it. Source: DMTF's DSP0134 3.2.0.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable
from typing import Final

from trivmm.config import PlatformConfig
from trivmm.memory import layout

__all__ = ["ENTRY_SIZE", "smbios_tables"]

ENTRY: Final = struct.Struct("<5sBBBBBBBIQ")
ENTRY_SIZE: Final = 32  # the structures follow at the next 16 bytes
VERSION: Final = (3, 2, 0)
HEADER: Final = struct.Struct("<BBH")
BIOS, SYSTEM, CHASSIS, OEM_STRINGS, END = 0, 1, 3, 11, 127
MANUFACTURER: Final = "TriVMM"
PRODUCT: Final = "trivmm"
PCI_SUPPORTED: Final = 1 << 7  # of a BIOS' characteristics
VIRTUAL_MACHINE: Final = 1 << 4  # of their second extension byte: what systemd-detect-virt looks at
NOT_64K: Final = 0  # of a BIOS' ROM size: there is none
UNKNOWN: Final = 2
NO_SECURITY: Final = 3


class _Strings:
    """The string set of one structure; a field holds a string's number, 0 being none (section 6.1.3)."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str | None) -> int:
        if text is None:
            return 0
        self.texts.append(text)
        return len(self.texts)

    def packed(self) -> bytes:
        return b"".join(text.encode() + b"\0" for text in self.texts) + (b"\0" if self.texts else b"\0\0")


def smbios_tables(platform: PlatformConfig) -> bytes:
    """Everything from ``layout.SMBIOS_START`` on, the entry point first."""
    structures = b"".join(_numbered(platform))
    entry = ENTRY.pack(b"_SM3_", 0, ENTRY.size, *VERSION, 1, 0, len(structures), layout.SMBIOS_START + ENTRY_SIZE)
    entry = entry[:5] + bytes([-sum(entry) & 0xFF]) + entry[6:]
    return entry.ljust(ENTRY_SIZE, b"\0") + structures


def _numbered(platform: PlatformConfig) -> Iterable[bytes]:
    bodies = [_bios(), _system(platform)]
    if platform.chassis_asset_tag is not None:
        bodies.append(_chassis(platform.chassis_asset_tag))
    if platform.oem_strings:
        strings = _Strings()
        for text in platform.oem_strings:
            strings(text)
        bodies.append((OEM_STRINGS, bytes([len(strings.texts)]), strings))
    bodies.append((END, b"", _Strings()))
    for handle, (kind, body, strings) in enumerate(bodies):
        yield HEADER.pack(kind, HEADER.size + len(body), handle) + body + strings.packed()


def _bios() -> tuple[int, bytes, _Strings]:
    """Section 7.1."""
    strings = _Strings()
    vendor, version = strings(MANUFACTURER), strings("0")
    body = struct.pack("<BBHBBQBB", vendor, version, 0, 0, NOT_64K, PCI_SUPPORTED, 0, VIRTUAL_MACHINE)
    return BIOS, body, strings


def _system(platform: PlatformConfig) -> tuple[int, bytes, _Strings]:
    """Section 7.2. A UUID's first three fields are little-endian, all zeroes being none."""
    strings = _Strings()
    made = strings(platform.system_manufacturer or MANUFACTURER)
    product, version = strings(platform.system_product_name or PRODUCT), strings(platform.system_version)
    serial = strings(platform.serial)
    identity = uuid.UUID(platform.identity).bytes_le if platform.identity else bytes(16)
    sku, family = strings(platform.system_sku_number), strings(platform.system_family)
    body = struct.pack("<BBBB16sBBB", made, product, version, serial, identity, UNKNOWN, sku, family)
    return SYSTEM, body, strings


def _chassis(asset_tag: str) -> tuple[int, bytes, _Strings]:
    """Section 7.4, without contained elements."""
    strings = _Strings()
    made, tag = strings(MANUFACTURER), strings(asset_tag)
    states = (UNKNOWN, UNKNOWN, UNKNOWN, NO_SECURITY)  # at boot, of power supply, of heat; of security
    body = struct.pack("<BBBBBBBBBIBBBBB", made, UNKNOWN, 0, 0, tag, *states, 0, 0, 0, 0, 0, 0)
    return CHASSIS, body, strings
