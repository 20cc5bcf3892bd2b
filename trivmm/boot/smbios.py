"""SMBIOS: who made this machine, its serial number and UUID, and whatever texts its owner has for the guest.

A 2.8 entry point in the segment in which an OS looks for one, and the structures behind it: BIOS, system, chassis, OEM
strings, end. Pure bytes, made at boot and at every reboot. Firmware takes both from ``fw_cfg`` and places them itself.
Source: DMTF DSP0134, sections 5.2.1 (entry point), 6.1.3 (strings), 7.1, 7.2, 7.4, 7.12, 7.45.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from typing import Final

from trivmm.config import PlatformConfig
from trivmm.memory import layout

__all__ = ["smbios", "smbios_files", "smbios_image"]

ENTRY_POINT: Final = struct.Struct("<4sBBBBHB5s5sBHIHB")
VERSION: Final = (2, 8)
ALIGNMENT: Final = 16  # tables begin at the next paragraph
VENDOR, PRODUCT = "TriVMM", "trivmm"
NO_CHARACTERISTICS: Final = 1 << 3  # of a BIOS: "not supported"
IS_VIRTUAL: Final = 1 << 4  # second extension byte
POWER_SWITCH: Final = 6  # what woke the system
CHASSIS_OTHER: Final = 1
STATE_UNKNOWN: Final = 2
STATE_SAFE: Final = 3
SECURITY_NONE: Final = 3


def smbios(platform: PlatformConfig) -> tuple[bytes, bytes]:
    """(entry point, structures), for the structures right behind the entry point at ``layout.SMBIOS_START``."""
    structures = [
        _structure(
            *(0, "BBHBBQBB", VENDOR, PRODUCT, 0, "0", 0, NO_CHARACTERISTICS, 0, IS_VIRTUAL),
        ),
        _structure(
            *(1, "BBBB16sBBB", platform.system_manufacturer or VENDOR, platform.system_product_name or PRODUCT),
            *(platform.system_version, platform.system_serial_number, _uuid(platform), POWER_SWITCH),
            *(platform.system_sku_number, platform.system_family),
        ),
        _structure(
            *(3, "BBBBBBBBBIBBBBB", platform.system_manufacturer or VENDOR, CHASSIS_OTHER, None, None),
            *(platform.chassis_asset_tag, STATE_SAFE, STATE_SAFE, STATE_UNKNOWN, SECURITY_NONE, 0, 0, 0, 0, 0, None),
        ),
    ]
    if platform.oem_strings:
        structures.append(_structure(11, "B", len(platform.oem_strings), more=platform.oem_strings))
    structures.append(_structure(127, ""))
    tables = b"".join(part[:2] + struct.pack("<H", handle) + part[4:] for handle, part in enumerate(structures))
    return _entry_point(tables, structures), tables


def smbios_image(platform: PlatformConfig) -> bytes:
    """Everything from ``layout.SMBIOS_START`` on, for a guest that is booted without firmware."""
    entry, tables = smbios(platform)
    return entry.ljust(_behind_entry(), b"\0") + tables


def smbios_files(platform: PlatformConfig) -> dict[str, bytes]:
    """``fw_cfg`` files by name."""
    entry, tables = smbios(platform)
    return {"etc/smbios/smbios-anchor": entry, "etc/smbios/smbios-tables": tables}


def _behind_entry() -> int:
    return -(-ENTRY_POINT.size // ALIGNMENT) * ALIGNMENT


def _uuid(platform: PlatformConfig) -> bytes:
    """Its first three fields little-endian (section 7.2.1); zeros: it has none."""
    return bytes(16) if platform.system_uuid is None else uuid.UUID(platform.system_uuid).bytes_le


def _structure(kind: int, form: str, *fields: int | bytes | str | None, more: Sequence[str] = ()) -> bytes:
    """With a handle of 0. A text among ``fields`` becomes its number among the texts behind the fields; ``more``
    texts have no field."""
    texts: list[str] = []
    values: list[int | bytes] = []
    for field in fields:
        if isinstance(field, str):
            texts.append(field)
            values.append(len(texts))
        else:
            values.append(0 if field is None else field)
    body = struct.pack(f"<{form}", *values)
    strings = b"".join(text.encode() + b"\0" for text in (*texts, *more)) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), 0) + body + strings + b"\0"


def _entry_point(tables: bytes, structures: Sequence[bytes]) -> bytes:
    major, minor = VERSION
    largest = max(map(len, structures))
    made = bytearray(
        ENTRY_POINT.pack(
            *(b"_SM_", 0, ENTRY_POINT.size, major, minor, largest, 0, bytes(5), b"_DMI_", 0, len(tables)),
            *(layout.SMBIOS_START + _behind_entry(), len(structures), major << 4 | minor),
        )
    )
    made[21] = -sum(made[16:]) & 0xFF  # of the intermediate part
    made[4] = -sum(made) & 0xFF
    return bytes(made)
