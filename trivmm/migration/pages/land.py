"""Guest pages as frames: the bookkeeping of both sides, and the plain-Python way to make and take the frames.

``ffi/pages.c`` does the same work on sockets with the GIL released and is what migrations use; this module is its
oracle, and what memory streams use in virtual time. Bodies, little-endian:

- PAGES: slot u32, count u32, count x (page u32, CRC32C of the page u32); payload: count x 4096 bytes
- ZERO: slot u32, count u32, count x (first page u32, pages u32)

Page numbers count from the region's start and ascend; nothing lands before all of a frame's numbers are checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import ProtocolError
from trivmm.memory.guest import GuestMemory, MemoryRegion
from trivmm.migration.wire.frame import FRAME_PAGES, FRAME_RUNS, PAGE_BYTES, Frame, MessageType, crc32c, encode_frame

__all__ = ["DirtySet", "Landing", "PageCounts", "page_frames"]

HEAD = struct.Struct("<II")
PAIR = struct.Struct("<II")


@attrs.define(eq=False)
class PageCounts:
    """What went through: bytes on the wire, pages with content, pages sent as zero."""

    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0


@attrs.frozen(eq=False)
class DirtySet:
    """The pages of one region that are still to be sent. ``bits`` is a cffi ``uint64_t *``, a bit a page."""

    region: MemoryRegion
    bits: Any

    @classmethod
    def of(cls, region: MemoryRegion) -> DirtySet:
        """An empty set."""
        return cls(region, ffi.new("uint64_t[]", region.bitmap_words))

    def add_touched(self) -> None:
        """Add every page that was ever touched; holes of the memfd read as zero, as the destination's RAM does."""
        lib.tv_pages_mark_data(self.region.memfd, self.region.size, self.bits)

    @property
    def count(self) -> int:
        return int(lib.tv_pages_count(self.bits, self.region.bitmap_words))

    def discard(self, page: int) -> None:
        self.bits[page // 64] &= ~(1 << page % 64) & (1 << 64) - 1

    def __iter__(self) -> Iterator[int]:
        for word in range(self.region.bitmap_words):
            bits = self.bits[word]
            while bits:
                lowest = bits & -bits
                yield word * 64 + lowest.bit_length() - 1
                bits ^= lowest


def _page(region: MemoryRegion, page: int, count: int = 1) -> Any:
    """A writable buffer over ``count`` pages."""
    return ffi.buffer(ffi.cast("uint8_t *", region.hva + page * PAGE_BYTES), count * PAGE_BYTES)


def page_frames(dirty: DirtySet, limit: int) -> Iterator[tuple[bytes, list[int], int]]:
    """Frames for at most ``limit`` pages: (frame, its pages, how many of them are sent as zero). The caller
    discards the pages once the frame is sent."""
    slot = dirty.region.slot
    full: list[tuple[int, bytes]] = []
    zero: list[int] = []
    for taken, page in enumerate(dirty):
        if taken == limit:
            break
        content = bytes(_page(dirty.region, page))
        if content.strip(b"\0"):
            full.append((page, content))
        else:
            zero.append(page)
        if len(full) == FRAME_PAGES:
            yield _full(slot, full)
            full = []
        if len(zero) == FRAME_RUNS:
            yield _zero(slot, zero)
            zero = []
    if full:
        yield _full(slot, full)
    if zero:
        yield _zero(slot, zero)


def _full(slot: int, pages: list[tuple[int, bytes]]) -> tuple[bytes, list[int], int]:
    body = HEAD.pack(slot, len(pages)) + b"".join(PAIR.pack(page, crc32c(content)) for page, content in pages)
    payload = b"".join(content for _, content in pages)
    return encode_frame(MessageType.PAGES, body, payload), [page for page, _ in pages], 0


def _zero(slot: int, pages: list[int]) -> tuple[bytes, list[int], int]:
    body = HEAD.pack(slot, len(pages)) + b"".join(PAIR.pack(page, 1) for page in pages)
    return encode_frame(MessageType.ZERO, body), list(pages), len(pages)


class Landing:
    """The destination's RAM while pages land. It begins as fresh memory, all zero: a zero page costs nothing unless
    something landed there before. ``native`` are the ``landed`` bitmaps for the C side."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.counts = PageCounts()
        self.landed = [ffi.new("uint64_t[]", region.bitmap_words) for region in memory.regions]

    def take(self, frame: Frame) -> None:
        """Apply a PAGES or ZERO frame. :raises ProtocolError: names the slot, page or length at fault."""
        what = frame.type.name
        if len(frame.body) < HEAD.size:
            raise ProtocolError(f"{what}: bad length")
        slot, count = HEAD.unpack_from(frame.body)
        limit = FRAME_PAGES if frame.type is MessageType.PAGES else FRAME_RUNS
        if not 1 <= count <= limit or len(frame.body) != HEAD.size + count * PAIR.size:
            raise ProtocolError(f"{what}: bad length")
        if slot >= len(self.memory.regions):
            raise ProtocolError(f"{what}: there is no memory slot {slot}")
        region = self.memory.regions[slot]
        pairs = [PAIR.unpack_from(frame.body, HEAD.size + i * PAIR.size) for i in range(count)]
        after = 0
        for first, second in pairs:
            pages = 1 if frame.type is MessageType.PAGES else second
            if not pages or first < after or first + pages > region.pages:
                raise bad_page(slot, first)
            after = first + pages
        if frame.type is MessageType.PAGES:
            self._fill(region, pairs, frame.payload)
        else:
            self._clear(region, pairs)
        self.counts.bytes += len(frame.body) + len(frame.payload)

    def _fill(self, region: MemoryRegion, pairs: list[tuple[int, int]], payload: bytes) -> None:
        if len(payload) != len(pairs) * PAGE_BYTES:
            raise ProtocolError("PAGES: bad length")
        for place, (page, crc) in enumerate(pairs):
            content = payload[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
            if crc32c(content) != crc:
                raise bad_page_crc(region.slot, page)
            _page(region, page)[:] = content
            self.landed[region.slot][page // 64] |= 1 << page % 64
        self.counts.pages += len(pairs)

    def _clear(self, region: MemoryRegion, runs: list[tuple[int, int]]) -> None:
        for first, pages in runs:
            for page in range(first, first + pages):
                if self.landed[region.slot][page // 64] >> page % 64 & 1:
                    _page(region, page)[:] = bytes(PAGE_BYTES)
                    self.landed[region.slot][page // 64] &= ~(1 << page % 64) & (1 << 64) - 1
            self.counts.zero_pages += pages


def bad_page(slot: int, page: int) -> ProtocolError:
    return ProtocolError(f"page {page:#x} of memory slot {slot} is outside the region, or comes twice in one frame")


def bad_page_crc(slot: int, page: int) -> ProtocolError:
    return ProtocolError(f"bad CRC of page {page:#x} of memory slot {slot}: the stream is damaged")
