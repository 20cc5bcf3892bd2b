"""Reading a PVH kernel: an ELF image (32 or 64 bit) with a Xen note that names its 32-bit entry point.

Pure parsing over a :class:`UserFile`; the file is the user's and may be anything, so every count and offset is
checked against the file's size before it is used, and whatever is wrong is one :class:`ConfigError`.
Sources: System V gABI chapters 4 and 5, Xen's ``docs/misc/pvh`` and ``elfnote.h`` (type 18, PHYS32_ENTRY).
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Final

import attrs

from trivmm.errors import ConfigError, reason_of

__all__ = ["CHUNK", "REMEDY", "KernelImage", "NoPvhEntry", "Segment", "UserFile", "parse_kernel"]

CHUNK: Final = 4 << 20  # bytes of a file in memory at a time: images may be hundreds of MiB
MAX_PROGRAM_HEADERS: Final = 128  # real kernels have under 10; the table is read in one piece
MAX_NOTES_BYTES: Final = (
    1 << 16
)  # of all note segments: each byte may be looked at twice; real kernels have under a KiB
PT_LOAD: Final = 1
PT_NOTE: Final = 4
ET_EXEC, ET_DYN = 2, 3
MACHINES: Final = {3, 62}  # EM_386, EM_X86_64
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
REMEDY: Final = "give a PVH kernel for x86-64 (a vmlinux, or the bzImage of a distribution, built with CONFIG_PVH)"


class NoPvhEntry(ConfigError):
    """Nothing else is known to be wrong with the file: there may be another way in."""


class UserFile:
    """A regular file that the user named: ``field`` is the option, for its errors. A context manager.

    ``fd`` is one that stands for it, such as what was packed inside; it belongs to this object from here on, and
    ``part`` begins what is said to be wrong with it."""

    def __init__(self, field: str, path: str, *, fd: int | None = None, part: str = "") -> None:
        """:raises ConfigError: when it is missing, unreadable or no regular file."""
        self.field = field
        self.path = path
        self.part = part
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if fd is None else fd
        except (OSError, ValueError) as error:
            raise self.error(f"cannot open it ({reason_of(error)})", "give a readable file") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            what = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise self.error(f"it is {what}", "give a file")
        self.size = found.st_size

    def error(self, problem: str, remedy: str = REMEDY, kind: type[ConfigError] = ConfigError) -> ConfigError:
        return kind(self.field, self.path, f"{self.part}{problem}", remedy)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. :raises ConfigError: when the file has them not."""
        if offset + size <= self.size:
            try:
                data = os.pread(self._fd, size, offset)
            except OSError as error:
                raise self.error(f"cannot read it ({error.strerror})", "give a readable file") from error
            if len(data) == size:
                return data
        raise self.error(f"truncated: {size} bytes at offset {offset:#x} are not there")

    def chunks(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """``(position from 0, bytes)`` of a part of the file, piece by piece."""
        for position in range(0, size, CHUNK):
            yield position, self.read(offset + position, min(CHUNK, size - position))

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> UserFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@attrs.frozen
class Segment:
    """One PT_LOAD: ``filesz`` bytes at ``offset`` of the file go to ``gpa``; up to ``memsz`` follow as zeros."""

    offset: int
    gpa: int
    filesz: int
    memsz: int

    @property
    def end(self) -> int:
        return self.gpa + self.memsz


@attrs.frozen
class KernelImage:
    segments: tuple[Segment, ...]
    entry_gpa: int


@attrs.frozen
class _ProgramHeader:
    kind: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def parse_kernel(file: UserFile) -> KernelImage:
    """Segments and PVH entry of an image. :raises ConfigError: when it is not one."""
    headers = _program_headers(file)
    segments = []
    for header in headers:
        if header.kind != PT_LOAD or not header.memsz:
            continue
        if header.filesz > header.memsz or header.offset + header.filesz > file.size:
            raise file.error(f"truncated: a segment of {header.filesz} bytes at {header.offset:#x} is not in the file")
        segments.append(Segment(header.offset, header.paddr, header.filesz, header.memsz))
    if not segments:
        raise file.error("it has nothing to load")
    in_order = sorted(segments, key=lambda segment: segment.gpa)
    for before, after in itertools.pairwise(in_order):  # so that loading takes no longer than filling the RAM once
        if after.gpa < before.end:
            raise file.error(f"its segments at {before.gpa:#x} and {after.gpa:#x} overlap")
    entry = _pvh_entry(file, [header for header in headers if header.kind == PT_NOTE])
    if entry is None:
        raise file.error("it has no PVH entry note", kind=NoPvhEntry)
    if not any(segment.gpa <= entry < segment.end for segment in segments):
        raise file.error(f"its PVH entry {entry:#x} is in none of its segments")
    return KernelImage(tuple(segments), entry)


def _program_headers(file: UserFile) -> list[_ProgramHeader]:
    if file.size < 52 or file.read(0, 4) != b"\x7fELF":
        raise file.error("not an ELF file")
    wide, order, version = file.read(4, 3)
    if wide not in (1, 2) or order != 1 or version != 1:
        raise file.error("not a little-endian ELF file of 32 or 64 bits")
    form = "<HHIQQQIHHHHHH" if wide == 2 else "<HHIIIIIHHHHHH"
    fields = struct.unpack(form, file.read(16, struct.calcsize(form)))
    kind, machine, phoff, phentsize, phnum = fields[0], fields[1], fields[4], fields[8], fields[9]
    if machine not in MACHINES:
        raise file.error(f"made for another machine (e_machine {machine})")
    if kind not in (ET_EXEC, ET_DYN):
        raise file.error(f"not an executable (e_type {kind})")
    form = "<IIQQQQQQ" if wide == 2 else "<IIIIIIII"
    if not 0 < phnum <= MAX_PROGRAM_HEADERS or phentsize != struct.calcsize(form):
        raise file.error(f"{phnum} program headers of {phentsize} bytes make no sense")
    table = file.read(phoff, phnum * phentsize)
    headers = []
    for values in struct.iter_unpack(form, table):
        if wide == 2:
            kind, _, offset, _, paddr, filesz, memsz, align = values
        else:
            kind, offset, _, paddr, filesz, memsz, _, align = values
        headers.append(_ProgramHeader(kind, offset, paddr, filesz, memsz, align))
    return headers


def _pvh_entry(file: UserFile, headers: list[_ProgramHeader]) -> int | None:
    total = sum(header.filesz for header in headers)  # where segments overlap, each counts: each is walked
    if total > MAX_NOTES_BYTES:
        raise file.error(f"its note segments have {total} bytes, more than {MAX_NOTES_BYTES}")
    for header in headers:
        notes = file.read(header.offset, header.filesz)
        # The gABI says 8 in 64-bit files, everybody writes 4, and p_align is sometimes another section's.
        for align in (8, 4) if header.align == 8 else (4, 8):
            entry = _find_entry(notes, align)
            if entry is not None:
                return entry
    return None


def _find_entry(notes: bytes, align: int) -> int | None:
    position = 0
    while position + 12 <= len(notes):  # each turn moves on by at least the 12 bytes of the header
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        start = -(-(position + 12 + name_size) // align) * align
        if start + size > len(notes):
            return None
        name = notes[position + 12 : position + 12 + name_size].rstrip(b"\0")
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen" and size in (4, 8):
            entry = int.from_bytes(notes[start : start + size], "little")
            return entry if entry < 1 << 32 else None
        position = -(-(start + size) // align) * align
    return None
