"""Kernel files for tests: any ELF image wrapped as a bzImage, packed in each way that Linux's build knows."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["PACKINGS", "make_bzimage", "make_pvh", "with_own_entry", "wrap"]

SETUP_SECTORS: Final = 3
STUB: Final = bytes(700)  # stands for the unpacking code that comes before the payload
LZ4_BLOCK: Final = 8 << 20


def _gzip(data: bytes) -> bytes:
    engine = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    return engine.compress(data) + engine.flush()  # its last four bytes are the size


def _sized(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """As the build's ``size_append``."""
    return lambda data: pack(data) + struct.pack("<I", len(data))


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


def _zstd(data: bytes) -> bytes:
    import zstandard

    engine = zstandard.ZstdCompressor(level=3).compressobj()  # a stream: its header tells no size, as the build's
    return engine.compress(data) + engine.flush()


def _lz4(data: bytes) -> bytes:
    """A legacy frame."""
    import lz4.block

    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), LZ4_BLOCK):
        block = lz4.block.compress(data[at : at + LZ4_BLOCK], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


PACKINGS: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "gzip": _gzip,
    "bzip2": _sized(bz2.compress),
    "xz": _sized(_xz),
    "lzma": _sized(lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)),
    "zstd": _sized(_zstd),
    "lz4": _sized(_lz4),
}
"""Payloads by the name of their packing."""


def wrap(
    payload: bytes, *, version: int = 0x020F, setup_sectors: int = SETUP_SECTORS, length: int | None = None
) -> bytes:
    """A bzImage around ``payload`` as it is (Linux's Documentation/arch/x86/boot.rst); ``length`` may lie."""
    setup = bytearray(512 * (1 + (setup_sectors or 4)))
    setup[0x1F1] = setup_sectors
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    struct.pack_into("<II", setup, 0x248, len(STUB), len(payload) if length is None else length)
    return bytes(setup) + STUB + payload + bytes(64)


def make_bzimage(vmlinux: bytes, packing: str) -> bytes:
    return wrap(PACKINGS[packing](vmlinux))


def with_own_entry(
    code: bytes,
    *,
    preferred: int = 1 << 20,
    room: int = 1 << 16,
    cmdline_size: int = 255,
    initrd_max: int = 0x7FFF_FFFF,
) -> bytes:
    """A bzImage with nothing packed in it, that begins at its 64-bit entry: ``code`` + 0x200."""
    setup = bytearray(512 * (1 + SETUP_SECTORS))
    setup[0x1F1], setup[0x201], setup[0x211] = SETUP_SECTORS, 0x66, 1
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", 0x020F)
    struct.pack_into("<IIBBHI", setup, 0x22C, initrd_max, 1 << 21, 1, 21, 1, cmdline_size)
    struct.pack_into("<QI", setup, 0x258, preferred, room)
    return bytes(setup) + code


def make_pvh(code: bytes, gpa: int = 1 << 20) -> bytes:
    """A PVH ELF that is nothing but ``code``, 32-bit, loaded and begun at ``gpa``."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", gpa)
    start_at = 64 + 2 * 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, gpa, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, start_at, gpa, gpa, len(code), 4096, 4096)
    header += struct.pack("<IIQQQQQQ", 4, 4, start_at + len(code), 0, 0, len(note), len(note), 4)
    return header + code + note
