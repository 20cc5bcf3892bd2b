"""Flat firmware: a PC BIOS in ROM, and what it asks its machine for at power-on.

The image lies at the end of the 16 MiB from ``layout.ROM_START``: its last 16 bytes are the reset vector F000:FFF0.
Its last 256 KiB are copied to the RAM below 1 MiB. There a PC has shadow RAM, which firmware unlocks through its host
bridge; here it is RAM from the start, as SeaBIOS finds it on a bridge that it does not know.

SeaBIOS takes from ``fw_cfg`` what it can't find out by itself: the memory map, the number of CPUs, and the ACPI and
SMBIOS tables, which it places where it likes (:mod:`trivmm.boot.table_loader`). Its console goes to the serial port,
since there is no display. Sources: SeaBIOS' src/fw/paravirt.c and src/boot.c; QEMU's docs/specs/fw_cfg.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from trivmm.boot.acpi import acpi_tables
from trivmm.boot.elf import UserFile
from trivmm.boot.memory_map import E820_RAM, memory_map
from trivmm.boot.smbios import smbios_files
from trivmm.boot.table_loader import loader_files
from trivmm.config import PlatformConfig
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory

__all__ = ["FIRMWARE_REMEDY", "MIN_SIZE", "firmware_items", "is_flat", "load_firmware"]

MIN_SIZE: Final = 16  # the reset vector
FIRMWARE_REMEDY: Final = "give a flat PC firmware image such as SeaBIOS' bios-256k.bin, or an ELF file with a PVH entry"

SIGNATURE, VERSION, NO_GRAPHICS, CPUS, BOOT_MENU, MAX_CPUS, FILES = 0x00, 0x01, 0x04, 0x05, 0x0E, 0x0F, 0x19
FIRST_FILE: Final = 0x20
FILE_NAME: Final = 56
TRADITIONAL: Final = 1  # the ports, and no DMA
E820_ENTRY: Final = struct.Struct("<QQI")
NEVER: Final = (1 << 32) - 1  # retry to boot: a guest without a bootable disk says so and stands still


def _open(path: str) -> UserFile:
    return UserFile("payload.firmware", path)


def is_flat(path: str) -> bool:
    """Whether it goes into ROM; else it is an ELF file, and booted as a kernel is.

    :raises ConfigError: when it can't be read, or is no firmware that fits."""
    with _open(path) as file:
        if file.read(0, min(file.size, 4)) == b"\x7fELF":
            return False
        if not MIN_SIZE <= file.size <= layout.ROM_SIZE:
            size = f"{file.size} bytes are too {'many' if file.size > MIN_SIZE else 'few'} for a ROM"
            raise file.error(f"{size} ({MIN_SIZE} to {layout.ROM_SIZE >> 20}M)", FIRMWARE_REMEDY)
        return True


def load_firmware(memory: GuestMemory, path: str) -> None:
    """Into ROM and shadow RAM. :raises ConfigError: when it can't be read."""
    with _open(path) as file:
        image = b"".join(data for _, data in file.chunks(0, file.size))
    memory.fill_rom(image)
    shadow = image[-layout.SHADOW_SIZE :]
    memory.write(layout.SHADOW_START + layout.SHADOW_SIZE - len(shadow), shadow)


def firmware_items(
    ram: tuple[tuple[int, int], ...], vcpus: int, platform: PlatformConfig | None = None
) -> Mapping[int, bytes]:
    """``fw_cfg`` by key, for RAM ``ram`` of (gpa, size) each."""
    reserved = [entry for entry in memory_map(ram) if entry[2] != E820_RAM]
    # RAM in one piece: the hole below 1 MiB is the firmware's own to make.
    entries = [(gpa, size, E820_RAM) for gpa, size in ram] + reserved
    files = {
        "etc/e820": b"".join(E820_ENTRY.pack(*entry) for entry in entries),
        "etc/boot-fail-wait": NEVER.to_bytes(4, "little"),
        **loader_files(acpi_tables(vcpus)),
        **smbios_files(platform or PlatformConfig()),
    }
    directory = struct.pack(">I", len(files))
    items = {
        SIGNATURE: b"QEMU",
        VERSION: TRADITIONAL.to_bytes(4, "little"),
        NO_GRAPHICS: b"\1\0",
        CPUS: vcpus.to_bytes(2, "little"),
        BOOT_MENU: b"\0\0",
        MAX_CPUS: vcpus.to_bytes(2, "little"),
    }
    for key, (name, data) in enumerate(sorted(files.items()), FIRST_FILE):
        directory += struct.pack(f">IHH{FILE_NAME}s", len(data), key, 0, name.encode())
        items[key] = data
    return items | {FILES: directory}
