"""The x86/HVM direct boot ABI (PVH): kernel, initramfs, command line and start_info into guest RAM.

Runs at boot and at every reboot, in the caller's thread; it reads files, so an event loop calls it through a thread
that it does not abandon. Layout as in Cloud Hypervisor: see ``layout``. Source: Xen's ``start_info.h``, version 1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

from trivmm.boot.acpi import acpi_tables
from trivmm.boot.bzimage import open_kernel
from trivmm.boot.elf import CHUNK, Segment, UserFile, parse_kernel
from trivmm.boot.memory_map import memory_map
from trivmm.config import PayloadConfig
from trivmm.errors import ConfigError, GuestMemoryError
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
    memory: GuestMemory, payload: PayloadConfig, vcpus: int = 1, checkpoint: Callable[[], None] = lambda: None
) -> PvhEntry:
    """Everything that a PVH guest needs to start; ``vcpus`` are listed in the ACPI tables. ``checkpoint`` is called
    between pieces of work and may raise to end them.

    :raises ConfigError: for whatever is wrong with kernel, initramfs or command line; RAM may then be half written.
    """
    is_firmware = payload.firmware is not None
    cmdline = _cmdline("" if is_firmware else payload.cmdline)
    tables = acpi_tables(vcpus)
    taken = [
        (layout.PVH_START_INFO, PAGE_SIZE, "the start info"),
        (layout.PVH_MEMMAP, PAGE_SIZE, "the memory map"),
        (layout.CMDLINE_START, len(cmdline), "the command line"),
        (layout.ACPI_START, len(tables), "the ACPI tables"),
    ]
    with open_kernel(*_file(payload), checkpoint) as file:
        image = parse_kernel(file)
        for segment in image.segments:
            _check_segment(memory, file, segment, taken)
        initramfs = _load_initramfs(memory, None if is_firmware else payload.initramfs, image.segments)
        for segment in image.segments:
            for position, data in file.chunks(segment.offset, segment.filesz):
                memory.write(segment.gpa + position, data)
                checkpoint()
            for gpa in range(segment.gpa + segment.filesz, segment.end, CHUNK):
                memory.write(gpa, ZEROS[: min(CHUNK, segment.end - gpa)])
                checkpoint()
    _write_boot_data(memory, cmdline, initramfs, tables)
    return PvhEntry(image.entry_gpa, layout.PVH_START_INFO)


def _file(payload: PayloadConfig) -> tuple[str, str]:
    """Its path and the field that names it."""
    if payload.firmware is not None:
        return payload.firmware, "payload.firmware"
    return payload.kernel, "payload.kernel"


def _cmdline(text: str) -> bytes:
    try:
        cmdline = os.fsencode(text) + b"\0"
    except UnicodeEncodeError:
        raise ConfigError("payload.cmdline", text, "half a surrogate pair is no text", "leave it out") from None
    if len(cmdline) > layout.CMDLINE_MAX_SIZE:
        shown, limit = text[:40] + "…", layout.CMDLINE_MAX_SIZE - 1
        raise ConfigError("payload.cmdline", shown, f"{len(cmdline) - 1} bytes are too long", f"give at most {limit}")
    if b"\0" in cmdline[:-1]:
        raise ConfigError("payload.cmdline", text[:40], "it has a NUL byte", "leave it out")
    return cmdline


def _check_segment(memory: GuestMemory, file: UserFile, segment: Segment, taken: list[tuple[int, int, str]]) -> None:
    if not any(gpa <= segment.gpa and segment.end <= gpa + size for gpa, size in memory.ram):
        raise file.error(
            f"its segment {segment.gpa:#x}..{segment.end:#x} is outside the guest's RAM", "give more memory (--memory)"
        )
    for start, size, what in taken:
        if segment.gpa < start + size and start < segment.end:
            raise file.error(
                f"its segment {segment.gpa:#x}..{segment.end:#x} would overwrite {what} at {start:#x}",
                "link it at 1 MiB or above",
            )


def _load_initramfs(memory: GuestMemory, path: str | None, segments: tuple[Segment, ...]) -> tuple[int, int] | None:
    """At the top of low RAM, page-aligned, as Cloud Hypervisor. Gives (gpa, size)."""
    if path is None:
        return None
    with UserFile("payload.initramfs", path) as file:
        low = memory.ram[0][1]
        gpa = (low - file.size) & -PAGE_SIZE
        if not file.size:
            raise file.error("it is empty", "leave it out, or give an archive")
        if gpa < layout.HIGH_RAM_START or any(each.gpa < low and each.end > gpa for each in segments):
            raise file.error(f"{file.size} bytes do not fit beside the kernel", "give more memory (--memory)")
        for position, data in file.chunks(0, file.size):
            memory.write(gpa + position, data)
        return gpa, file.size


def _write_boot_data(memory: GuestMemory, cmdline: bytes, initramfs: tuple[int, int] | None, tables: bytes) -> None:
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
        memory.write(layout.CMDLINE_START, cmdline)
        memory.write(layout.ACPI_START, tables)
        memory.write(layout.PVH_START_INFO, info)
        memory.write(layout.PVH_MODLIST, module)
        memory.write(layout.PVH_MEMMAP, b"".join(MEMMAP_ENTRY.pack(*entry, 0) for entry in entries))
    except GuestMemoryError as error:
        raise ConfigError("memory.size", memory.size, "too little for the boot data", "give 2M or more") from error
