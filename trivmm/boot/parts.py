"""What every way to boot a kernel directly puts into RAM beside it: command line and initramfs, each checked."""

from __future__ import annotations

import os
from collections.abc import Iterable

from trivmm.boot.elf import UserFile
from trivmm.errors import ConfigError, GuestMemoryError
from trivmm.memory import layout
from trivmm.memory.guest import PAGE_SIZE, GuestMemory

__all__ = ["check_place", "load_cmdline", "load_initramfs", "too_little"]


def too_little(memory: GuestMemory) -> ConfigError:
    return ConfigError("memory.size", memory.size, "too little for the boot data", "give 2M or more")


def check_place(
    memory: GuestMemory, file: UserFile, gpa: int, size: int, taken: Iterable[tuple[int, int, str]]
) -> None:
    """``taken``: (gpa, size, what it is). :raises ConfigError: a part of the file that can't lie there."""
    end = gpa + size
    if not any(start <= gpa and end <= start + length for start, length in memory.ram):
        raise file.error(f"its segment {gpa:#x}..{end:#x} is outside the guest's RAM", "give more memory (--memory)")
    for start, length, what in taken:
        if gpa < start + length and start < end:
            problem = f"its segment {gpa:#x}..{end:#x} would overwrite {what} at {start:#x}"
            raise file.error(problem, "link it at 1 MiB or above")


def load_cmdline(memory: GuestMemory, text: str, longest: int = layout.CMDLINE_MAX_SIZE - 1) -> int:
    """To its place, with a NUL; gives how many bytes that are. ``longest`` is what the kernel takes, without it.

    :raises ConfigError: when it is no text for a kernel."""
    try:
        cmdline = os.fsencode(text) + b"\0"
    except UnicodeEncodeError:
        raise ConfigError("payload.cmdline", text, "half a surrogate pair is no text", "leave it out") from None
    limit = min(longest, layout.CMDLINE_MAX_SIZE - 1)
    if len(cmdline) - 1 > limit:
        shown = text[:40] + "…"
        raise ConfigError("payload.cmdline", shown, f"{len(cmdline) - 1} bytes are too long", f"give at most {limit}")
    if b"\0" in cmdline[:-1]:
        raise ConfigError("payload.cmdline", text[:40], "it has a NUL byte", "leave it out")
    try:
        memory.write(layout.CMDLINE_START, cmdline)
    except GuestMemoryError as error:
        raise too_little(memory) from error
    return len(cmdline)


def load_initramfs(
    memory: GuestMemory, path: str | None, taken: Iterable[tuple[int, int]], highest: int | None = None
) -> tuple[int, int] | None:
    """At the top of low RAM, page-aligned, as Cloud Hypervisor. Gives (gpa, size in bytes).

    ``taken``: (gpa, end) of what the kernel fills; ``highest``: the last address that it takes one at.

    :raises ConfigError: when it can't be read, is empty, or does not fit."""
    if path is None:
        return None
    with UserFile("payload.initramfs", path) as file:
        low = memory.ram[0][1]
        end = low if highest is None else min(low, highest + 1)
        gpa = (end - file.size) & -PAGE_SIZE
        if not file.size:
            raise file.error("it is empty", "leave it out, or give an archive")
        if gpa < layout.HIGH_RAM_START or any(start < end and stop > gpa for start, stop in taken):
            raise file.error(f"{file.size} bytes do not fit beside the kernel", "give more memory (--memory)")
        for position, data in file.chunks(0, file.size):
            memory.write(gpa + position, data)
        return gpa, file.size
