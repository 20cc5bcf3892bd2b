"""Linux' own 64-bit entry: a bzImage as it is, with the boot parameters ("zero page") that its loader would make.

For a kernel that has no PVH entry. Its own code unpacks it, in ring 0, so where it has one that way is much shorter.
The image says where it wants to lie and how much room it takes to unpack itself; the CPU starts in long mode with the
lowest 4 GiB mapped one to one. Places are Cloud Hypervisor's. Source: Linux' Documentation/arch/x86/boot.rst (protocol
2.12 has the 64-bit entry) and zero-page.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

import attrs

from trivmm.boot.acpi import acpi_tables
from trivmm.boot.elf import UserFile
from trivmm.boot.memory_map import memory_map
from trivmm.boot.parts import check_place, load_cmdline, load_initramfs
from trivmm.config import PayloadConfig
from trivmm.hypervisor.base import LONG_MODE_GDT, LongModeEntry
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory

__all__ = ["check_linux", "has_own_entry", "load_linux"]

HEADER_START: Final = 0x1F1
HEADER_END: Final = 0x268  # as far as we read it: with init_size
SETUP_SECTS, BOOT_FLAG, JUMP, MAGIC, VERSION = 0x1F1, 0x1FE, 0x201, 0x202, 0x206
LOADER_TYPE, LOAD_FLAGS, RAMDISK, CMDLINE = 0x210, 0x211, 0x218, 0x228
INITRD_MAX, LOADER_FLAGS, CMDLINE_SIZE, PREFERRED, INIT_SIZE = 0x22C, 0x236, 0x238, 0x258, 0x260
PROTOCOL: Final = 0x020C
LOADED_HIGH: Final = 1 << 0  # of the load flags
ENTRY_64: Final = 1 << 0  # of xloadflags
ENTRY_OFFSET: Final = 0x200
UNKNOWN_LOADER: Final = 0xFF
RSDP, E820_COUNT, E820_TABLE, E820_MAX = 0x70, 0x1E8, 0x2D0, 128  # of the zero page
E820_ENTRY: Final = struct.Struct("<QQI")
SECTOR: Final = 512
PAGE: Final = 4096

PRESENT_WRITABLE: Final = 3
LARGE: Final = 1 << 7
MAPPED_GIB: Final = 4


@attrs.frozen
class _Image:
    """``header`` from byte 0 of the file; the rest, from ``offset`` on, goes to ``gpa``, with ``room`` bytes there."""

    header: bytes
    offset: int
    gpa: int
    room: int


def has_own_entry(field: str, path: str) -> bool:
    """Whether the file is a bzImage with a 64-bit entry. :raises ConfigError: when it can't be read."""
    with UserFile(field, path) as file:
        header = file.read(0, min(file.size, HEADER_END))
    if len(header) < HEADER_END or header[BOOT_FLAG : BOOT_FLAG + 2] != b"\x55\xaa" or header[MAGIC:VERSION] != b"HdrS":
        return False
    (version,) = struct.unpack_from("<H", header, VERSION)
    return version >= PROTOCOL and bool(header[LOADER_FLAGS] & ENTRY_64) and bool(header[LOAD_FLAGS] & LOADED_HIGH)


def _parse(file: UserFile) -> _Image:
    header = file.read(0, HEADER_END)
    offset = (1 + (header[SETUP_SECTS] or 4)) * SECTOR
    (gpa,), (room,) = struct.unpack_from("<Q", header, PREFERRED), struct.unpack_from("<I", header, INIT_SIZE)
    if offset + ENTRY_OFFSET >= file.size:
        raise file.error("truncated: its 64-bit entry is not in the file")
    return _Image(header, offset, gpa, max(room, file.size - offset))


def check_linux(path: str) -> None:
    """:raises ConfigError: when it can't be loaded into any RAM."""
    with UserFile("payload.kernel", path) as file:
        _parse(file)


def load_linux(
    memory: GuestMemory, payload: PayloadConfig, vcpus: int, checkpoint: Callable[[], None], smbios: bytes = b""
) -> LongModeEntry:
    """Of a file that :func:`has_own_entry`. :raises ConfigError: naming what is wrong; RAM may then be half written."""
    tables = acpi_tables(vcpus)
    with UserFile("payload.kernel", payload.kernel) as file:
        image = _parse(file)
        check_place(memory, file, image.gpa, image.room, [(0, layout.HIGH_RAM_START, "what lies below 1 MiB")])
        (longest,), (highest,) = (struct.unpack_from("<I", image.header, at) for at in (CMDLINE_SIZE, INITRD_MAX))
        load_cmdline(memory, payload.cmdline, longest)
        initramfs = load_initramfs(memory, payload.initramfs, [(image.gpa, image.gpa + image.room)], highest)
        for position, data in file.chunks(image.offset, file.size - image.offset):
            memory.write(image.gpa + position, data)
            checkpoint()
    memory.write(layout.ACPI_START, tables)
    memory.write(layout.SMBIOS_START, smbios)
    memory.write(layout.ZERO_PAGE, _zero_page(image.header, memory.ram, initramfs))
    memory.write(layout.PAGE_TABLES, _page_tables())
    memory.write(layout.BOOT_GDT, LONG_MODE_GDT)
    return LongModeEntry(image.gpa + ENTRY_OFFSET, layout.ZERO_PAGE, layout.PAGE_TABLES, layout.BOOT_GDT)


def _zero_page(header: bytes, ram: tuple[tuple[int, int], ...], initramfs: tuple[int, int] | None) -> bytes:
    page = bytearray(PAGE)
    end = min(JUMP + 1 + header[JUMP], len(header))
    page[HEADER_START:end] = header[HEADER_START:end]
    page[LOADER_TYPE] = UNKNOWN_LOADER
    struct.pack_into("<I", page, CMDLINE, layout.CMDLINE_START)
    if initramfs is not None:
        struct.pack_into("<II", page, RAMDISK, *initramfs)
    struct.pack_into("<Q", page, RSDP, layout.ACPI_START)
    entries = memory_map(ram)[:E820_MAX]
    page[E820_COUNT] = len(entries)
    for number, entry in enumerate(entries):
        E820_ENTRY.pack_into(page, E820_TABLE + number * E820_ENTRY.size, *entry)
    return bytes(page)


def _page_tables() -> bytes:
    """A PML4, a PDPT and a directory a GiB: pages of 2 MiB, one to one."""
    pdpt = layout.PAGE_TABLES + PAGE
    root = struct.pack("<Q", pdpt | PRESENT_WRITABLE).ljust(PAGE, b"\0")
    upper = b"".join(struct.pack("<Q", pdpt + PAGE * (1 + gib) | PRESENT_WRITABLE) for gib in range(MAPPED_GIB))
    pages = b"".join(struct.pack("<Q", page << 21 | PRESENT_WRITABLE | LARGE) for page in range(MAPPED_GIB * 512))
    return root + upper.ljust(PAGE, b"\0") + pages
