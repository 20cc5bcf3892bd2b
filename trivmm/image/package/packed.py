"""Packed bytes as a stream that is read forwards, with a bound on what comes out and on the memory that it takes.

xz, gzip and zstd, by the name's end: what Debian packs a package's tar and its kernel's modules with.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, Final, Protocol, cast

import zstandard

__all__ = ["Damaged", "Source", "Stream", "open_packed"]

PIECE: Final = 1 << 16  # bytes read at a time
UNPACKED: Final = 1 << 20  # bytes unpacked at a time
MAX_WINDOW: Final = 256 << 20  # bytes of memory for a decoder: `xz -9` takes 65 MiB, `zstd -19` 8


class Damaged(Exception):
    """The bytes are not what they should be, or more of them than is allowed. One sentence, without the file."""


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Stream:
    """``limit``: bytes that it may give before it is refused."""

    def __init__(self, pieces: Iterator[bytes], limit: int) -> None:
        self._pieces = pieces
        self._held = b""
        self._left = limit

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, none only at the end. :raises Damaged:"""
        if not self._held:
            try:
                self._held = next((piece for piece in self._pieces if piece), b"")
            except (lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError, MemoryError) as error:
                raise Damaged(f"can't be unpacked: {error or 'too large'}") from error
            self._left -= len(self._held)
            if self._left < 0:
                raise Damaged("unpacks to more than there may be")
        given, self._held = self._held[:size], self._held[size:]
        return given

    def exactly(self, size: int) -> bytes:
        """``size`` bytes. :raises Damaged: there are fewer."""
        parts = []
        while size:
            part = self.read(min(size, UNPACKED))
            if not part:
                raise Damaged("ends too early")
            size -= len(part)
            parts.append(part)
        return b"".join(parts)

    def drain(self) -> None:
        """To its end, where checksums are."""
        while self.read(UNPACKED):
            pass

    def skip(self, size: int) -> None:
        while size:
            part = self.read(min(size, UNPACKED))
            if not part:
                raise Damaged("ends too early")
            size -= len(part)


def open_packed(source: Source, suffix: str, limit: int) -> Stream:
    """``suffix``: ``.xz``, ``.gz``, ``.zst``, or nothing. :raises Damaged: another one."""
    match suffix:
        case "":
            pieces = _plain(source)
        case ".xz":
            pieces = _unpacked(source, lzma.LZMADecompressor(memlimit=MAX_WINDOW))
        case ".gz":
            pieces = _inflated(source)
        case ".zst":
            pieces = _zstd(source)
        case other:
            raise Damaged(f"packed in a way that is not known ({other[:16]})")
    return Stream(pieces, limit)


def _plain(source: Source) -> Iterator[bytes]:
    while piece := source.read(PIECE):
        yield piece


def _unpacked(source: Source, decoder: Any) -> Iterator[bytes]:
    while not decoder.eof:
        piece = source.read(PIECE) if decoder.needs_input else b""
        if decoder.needs_input and not piece:
            raise EOFError("it ends too early")
        yield decoder.decompress(piece, UNPACKED)


def _inflated(source: Source) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    held = b""
    while not decoder.eof:
        held = held or source.read(PIECE)
        if not held:
            raise EOFError("it ends too early")
        yield decoder.decompress(held, UNPACKED)
        held = decoder.unconsumed_tail


def _zstd(source: Source) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(cast(IO[bytes], source)) as reader:
        while piece := reader.read(UNPACKED):
            yield piece
