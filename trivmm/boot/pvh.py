"""The x86/HVM direct boot ABI (PVH): kernel, initramfs, command line and start_info into guest RAM.

Runs at boot and at every reboot, in the caller's thread; it reads files, so an event loop calls it through a thread
that it does not abandon. Layout as in Cloud Hypervisor: see ``layout``. Source: Xen's ``start_info.h``, version 1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from trivmm.boot.acpi import acpi_tables
from trivmm.boot.bzimage import open_kernel
from trivmm.boot.elf import CHUNK, parse_kernel
from trivmm.boot.memory_map import memory_map
from trivmm.boot.parts import check_place, load_cmdline, load_initramfs, too_little
from trivmm.config import PayloadConfig
from trivmm.errors import GuestMemoryError
from trivmm.hypervisor.base import PvhEntry
from trivmm.memory import layout
from trivmm.memory.guest import PAGE_SIZE, GuestMemory

__all__ = ["check_payload", "load_payload"]

START_MAGIC: Final = 0x336EC578
START_INFO: Final = struct.Struct("<IIIIQQQQII")
MODULE: Final = struct.Struct("<QQQQ")
MEMMAP_ENTRY: Final = struct.Struct("<QQII")
ZEROS: Final = bytes(CHUNK)


def check_payload(payload: PayloadConfig, checkpoint: Callable[[], None] = lambda: None) -> None:
    """:raises ConfigError: when there is no kernel in the payload's file that could be booted."""
    with open_kernel(*_file(payload), checkpoint) as file:
        parse_kernel(file)


def load_payload(
    memory: GuestMemory,
    payload: PayloadConfig,
    vcpus: int = 1,
    checkpoint: Callable[[], None] = lambda: None,
    smbios: bytes = b"",
) -> PvhEntry:
    """Everything that a PVH guest needs to start; ``vcpus`` are listed in the ACPI tables; ``smbios`` is put
    where an OS looks for it. ``checkpoint`` is called between pieces of work and may raise to end them.

    :raises ConfigError: for whatever is wrong with kernel, initramfs or command line; RAM may then be half written.
    """
    is_firmware = payload.firmware is not None
    cmdline = load_cmdline(memory, "" if is_firmware else payload.cmdline)
    tables = acpi_tables(vcpus)
    taken = [
        (layout.PVH_START_INFO, PAGE_SIZE, "the start info"),
        (layout.PVH_MEMMAP, PAGE_SIZE, "the memory map"),
        (layout.CMDLINE_START, cmdline, "the command line"),
        (layout.ACPI_START, len(tables), "the ACPI tables"),
        (layout.SMBIOS_START, len(smbios), "the SMBIOS tables"),
    ]
    with open_kernel(*_file(payload), checkpoint) as file:
        image = parse_kernel(file)
        for segment in image.segments:
            check_place(memory, file, segment.gpa, segment.memsz, taken)
        filled = [(segment.gpa, segment.end) for segment in image.segments]
        initramfs = load_initramfs(memory, None if is_firmware else payload.initramfs, filled)
        for segment in image.segments:
            for position, data in file.chunks(segment.offset, segment.filesz):
                memory.write(segment.gpa + position, data)
                checkpoint()
            for gpa in range(segment.gpa + segment.filesz, segment.end, CHUNK):
                memory.write(gpa, ZEROS[: min(CHUNK, segment.end - gpa)])
                checkpoint()
    _write_boot_data(memory, initramfs, tables, smbios)
    return PvhEntry(image.entry_gpa, layout.PVH_START_INFO)


def _file(payload: PayloadConfig) -> tuple[str, str]:
    """Its path and the field that names it."""
    if payload.firmware is not None:
        return payload.firmware, "payload.firmware"
    return payload.kernel, "payload.kernel"


def _write_boot_data(memory: GuestMemory, initramfs: tuple[int, int] | None, tables: bytes, smbios: bytes) -> None:
    entries = memory_map(memory.ram)
    module = MODULE.pack(*initramfs, 0, 0) if initramfs else b""
    info = START_INFO.pack(
        START_MAGIC,
        1,
        0,
        1 if initramfs else 0,
        layout.PVH_MODLIST if initramfs else 0,
        layout.CMDLINE_START,
        layout.ACPI_START,
        layout.PVH_MEMMAP,
        len(entries),
        0,
    )
    try:
        memory.write(layout.ACPI_START, tables)
        memory.write(layout.SMBIOS_START, smbios)
        memory.write(layout.PVH_START_INFO, info)
        memory.write(layout.PVH_MODLIST, module)
        memory.write(layout.PVH_MEMMAP, b"".join(MEMMAP_ENTRY.pack(*entry, 0) for entry in entries))
    except GuestMemoryError as error:
        raise too_little(memory) from error
