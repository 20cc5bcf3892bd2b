"""Opening a kernel file: an ELF image as it is, or the one that is packed inside a distribution's bzImage.

A bzImage (``vmlinuz``) is a setup header and a packed vmlinux; the header says where (boot protocol 2.08 and later).
We never run the unpacking code in it: the vmlinux is unpacked here, into a memfd, piece by piece, and then read as any
other ELF file. The file is the user's and may be anything: lengths are checked against the file, what comes out
against what the file says and against ``MAX_VMLINUX``, and whatever is wrong is one :class:`ConfigError`.

Sources: Linux's Documentation/arch/x86/boot.rst; scripts/Makefile.lib for what ``size_append`` puts behind the packed
data; "LZ4 Frame Format Description", legacy frame. Unpacking is slow (a second or so): callers run it in a thread.
"""

from __future__ import annotations

import bz2
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import attrs

from trivmm._native import ffi, lib
from trivmm.boot.elf import CHUNK, REMEDY, NoPvhEntry, UserFile
from trivmm.errors import ConfigError

__all__ = ["MAX_VMLINUX", "open_kernel"]

MAX_VMLINUX: Final = 512 << 20  # bytes unpacked; a distribution's has 30 to 90 MiB, so a bomb ends here
MAX_DICTIONARY: Final = 256 << 20  # memory that xz and lzma may ask for; Linux is packed with at most 128 MiB
MAX_WINDOW: Final = 1 << 27  # bytes; what zstd --ultra -22 takes, with which Linux is packed
PACKED_CHUNK: Final = 1 << 18  # bytes of packed data given to a decoder at a time
LZ4_BLOCK: Final = 8 << 20  # bytes of a legacy frame's block, unpacked
LZ4_PACKED: Final = LZ4_BLOCK + LZ4_BLOCK // 255 + 16  # and packed, at worst
LZ4_MAGIC: Final = b"\x02\x21\x4c\x18"

HEADER: Final = 0x250  # the header's end, as far as we need it
SETUP_SECTS, BOOT_FLAG, MAGIC, VERSION, PAYLOAD = 0x1F1, 0x1FE, 0x202, 0x206, 0x248
MIN_VERSION: Final = 0x0208  # the first with payload_offset and payload_length
SIZE: Final = struct.Struct("<I")  # the unpacked size: the payload's last bytes
UNPACK_REMEDY: Final = "unpack it with Linux's scripts/extract-vmlinux and give what comes out"

# (offset, magic, what it is, remedy); the first that fits.
FOREIGN: Final = (
    (4, b"zimg", "an EFI zboot image, which is never for x86", REMEDY),
    (0x38, b"ARM\x64", "an arm64 kernel", REMEDY),
    (0x24, b"\x18\x28\x6f\x01", "an arm kernel", REMEDY),
    (0x38, b"RSC\x05", "a RISC-V kernel", REMEDY),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", REMEDY),
    (0, b"\xd0\x0d\xfe\xed", "a FIT image or device tree", REMEDY),
    (0, b"MZ", "an EFI program", "give the kernel in it (of a unified kernel image: objcopy -O binary -j .linux)"),
    (0, b"\x1f\x8b", "a gzip file", "unpack it (gunzip)"),
    (0, b"BZh", "a bzip2 file", "unpack it (bunzip2)"),
    (0, b"\xfd7zXZ\0", "an xz file", "unpack it (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it (unzstd)"),
    (0, LZ4_MAGIC, "an lz4 file", "unpack it (unlz4)"),
)


def _nothing() -> None:
    pass


def open_kernel(path: str, field: str = "payload.kernel", checkpoint: Callable[[], None] = _nothing) -> UserFile:
    """The ELF file to load, open; ``field`` names it in errors. ``checkpoint`` is called between pieces of work and may
    raise to end them.

    :raises ConfigError: when it is neither an ELF file nor a bzImage that can be unpacked."""
    file = UserFile(field, path)
    try:
        head = file.read(0, min(file.size, HEADER))
        if head.startswith(b"\x7fELF"):
            return file
        if head[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa" and head[MAGIC : MAGIC + 4] == b"HdrS":
            unpacked = _unpack(file, _payload(file, head), checkpoint)
            file.close()
            return unpacked
        raise _named(file, head)
    except BaseException:
        file.close()
        raise


def _named(file: UserFile, head: bytes) -> ConfigError:
    for offset, magic, what, remedy in FOREIGN:
        if head[offset:].startswith(magic):
            return file.error(f"not an ELF file but {what}", remedy)
    return file.error("not an ELF file and not a bzImage")


@attrs.define
class _Payload:
    """The packed data of a file, read from its start to its end; ``size`` is what they say to have unpacked."""

    file: UserFile
    at: int
    end: int
    size: int

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes; none at the end."""
        data = self.file.read(self.at, min(count, self.end - self.at))
        self.at += len(data)
        return data

    def pieces(self) -> Iterator[bytes]:
        while data := self.read(PACKED_CHUNK):
            yield data


def _payload(file: UserFile, head: bytes) -> _Payload:
    if len(head) < HEADER:
        raise file.error("truncated: its setup header is not all there")
    (version,) = struct.unpack_from("<H", head, VERSION)
    if version < MIN_VERSION:
        said = f"{version >> 8}.{version & 0xFF:02}"
        raise file.error(
            f"boot protocol {said} doesn't say where its vmlinux is", "give the vmlinux, or a newer kernel"
        )
    offset, length = struct.unpack_from("<II", head, PAYLOAD)
    if not length:
        raise file.error("there is no vmlinux in it", kind=NoPvhEntry)
    start = (1 + (head[SETUP_SECTS] or 4)) * 512 + offset
    if length <= 2 * SIZE.size or start + length > file.size:
        raise file.error(f"truncated: its vmlinux, {length} bytes packed at {start:#x}, is not in the file")
    (size,) = SIZE.unpack(file.read(start + length - SIZE.size, SIZE.size))
    # gzip ends with the size; to what the others make it was added.
    end = start + length - (0 if file.read(start, 2) == b"\x1f\x8b" else SIZE.size)
    return _Payload(file, start, end, size)


def _unpack(file: UserFile, payload: _Payload, checkpoint: Callable[[], None]) -> UserFile:
    magic = file.read(payload.at, 8)
    name, decode = next(((name, made) for each, name, made in DECODERS if magic.startswith(each)), ("", None))
    if decode is None:
        packing = name or f"something unknown ({magic.hex()})"
        raise file.error(f"its vmlinux is packed by {packing}", UNPACK_REMEDY, NoPvhEntry)
    if not 0 < payload.size <= MAX_VMLINUX:
        raise file.error(f"its vmlinux has {payload.size} bytes unpacked; 1 to {MAX_VMLINUX} are taken")
    fd = os.memfd_create("vmlinux", os.MFD_CLOEXEC)
    try:
        made = 0
        for data in _decoded(file, name, decode(payload)):
            made += len(data)
            if made > payload.size:
                break
            _write(file, fd, data)
            checkpoint()
        if made != payload.size:
            less = "less" if made < payload.size else "more"
            problem = f"damaged: its vmlinux ({name}) unpacks to {less} than the {payload.size} bytes it says"
            raise file.error(problem, "get it again")
        return UserFile(file.field, file.path, fd=fd, part="in its vmlinux: ")
    except BaseException:
        os.close(fd)
        raise


def _write(file: UserFile, fd: int, data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(fd, left) :]
    except OSError as error:
        raise file.error(f"cannot hold its vmlinux in memory ({error.strerror})", "free some memory") from error


def _decoded(file: UserFile, name: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces, with whatever a decoder raises as our own error."""
    try:
        yield from pieces
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, MemoryError) as error:
        why = str(error) or type(error).__name__
        raise file.error(f"damaged: its vmlinux cannot be unpacked ({name}: {why:.200})", "get it again") from error


# --- decoders: packed data to pieces of at most CHUNK bytes (lz4: a block) -------------------------------------------


def _gzip(payload: _Payload) -> Iterator[bytes]:
    engine = zlib.decompressobj(16 + zlib.MAX_WBITS)
    for data in payload.pieces():
        while True:  # ends: each turn makes CHUNK bytes, takes input, or is the last
            made = engine.decompress(data, CHUNK)
            yield made
            data = engine.unconsumed_tail
            if engine.eof:
                return
            if not data and len(made) < CHUNK:
                break
    raise EOFError("it ends too early")


def _stream(make: Callable[[], Any]) -> Callable[[_Payload], Iterator[bytes]]:
    def decode(payload: _Payload) -> Iterator[bytes]:
        engine = make()
        for data in payload.pieces():
            while True:  # ends: each turn makes CHUNK bytes, or wants input
                yield engine.decompress(data, CHUNK)
                if engine.eof:
                    return
                if engine.needs_input:
                    break
                data = b""
        raise EOFError("it ends too early")

    return decode


def _zstd(payload: _Payload) -> Iterator[bytes]:
    import zstandard  # 20 ms to import, and most kernels here are plain ELF files

    source = cast("Any", payload)  # all it needs is read()
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(source, closefd=False)
        while data := reader.read(CHUNK):
            yield data
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _lz4(payload: _Payload) -> Iterator[bytes]:
    payload.read(len(LZ4_MAGIC))
    room = ffi.new("uint8_t[]", LZ4_BLOCK)
    while head := payload.read(SIZE.size):
        size = int.from_bytes(head, "little") if len(head) == SIZE.size else 0
        if head == LZ4_MAGIC:  # frames may follow each other
            continue
        if not 0 < size <= LZ4_PACKED:
            raise ValueError(f"a block of {size} bytes")
        block = payload.read(size)
        made = lib.tv_lz4_block(block, len(block), room, LZ4_BLOCK)
        if made < 0 or len(block) < size:
            raise ValueError("a block that makes no sense")
        yield bytes(ffi.buffer(room, made))


DECODERS: Final[tuple[tuple[bytes, str, Callable[[_Payload], Iterator[bytes]] | None], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _stream(bz2.BZ2Decompressor)),
    (b"\xfd7zXZ\0", "xz", _stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_DICTIONARY))),
    (b"\x5d\0\0", "lzma", _stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, MAX_DICTIONARY))),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (LZ4_MAGIC, "lz4", _lz4),
    (b"\x89LZO", "lzo, which is not unpacked here", None),
)
