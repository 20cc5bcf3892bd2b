"""Guest pages as frames: the bookkeeping of both sides, and the plain-Python way to make and take the frames.

``ffi/pages.h`` and its files do the same work on sockets with the GIL released and are what migrations use; this module
is their oracle, and what memory streams use in virtual time. Bodies, little-endian:

- PAGES: slot u32, count u32, count x page u32; payload: count x 4096 bytes
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
from trivmm.migration.wire import FRAME_PAGES, FRAME_RUNS, PAGE_BYTES, Frame, MessageType, encode_frame

__all__ = ["DirtySet", "Landing", "PageCounts", "page_frames"]

HEAD = struct.Struct("<II")
PAGE = struct.Struct("<I")
RUN = struct.Struct("<II")


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
    body = HEAD.pack(slot, len(pages)) + b"".join(PAGE.pack(page) for page, _ in pages)
    payload = b"".join(content for _, content in pages)
    return encode_frame(MessageType.PAGES, body, payload), [page for page, _ in pages], 0


def _zero(slot: int, pages: list[int]) -> tuple[bytes, list[int], int]:
    body = HEAD.pack(slot, len(pages)) + b"".join(RUN.pack(page, 1) for page in pages)
    return encode_frame(MessageType.ZERO, body), list(pages), len(pages)


class Landing:
    """The destination's RAM while pages land. It begins as fresh memory, all zero: a zero page costs nothing unless
    something landed there before. ``native`` (cffi ``struct tv_landing *``) is what the C side reads and counts in;
    ``landed`` has a bitmap a region, a bit a page."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.landed = [ffi.new("uint64_t[]", region.bitmap_words) for region in memory.regions]
        self.native = ffi.new("struct tv_landing *")
        self.native.memory = memory.native
        self._chunks = [ffi.new("uint8_t[]", region.size // lib.TV_HUGE_SIZE + 1) for region in memory.regions]
        for region, bits, chunks in zip(memory.regions, self.landed, self._chunks, strict=True):
            self.native.memfd[region.slot], self.native.landed[region.slot] = region.memfd, bits
            self.native.chunks[region.slot] = chunks
            self.native.chunk_count[region.slot] = region.size // lib.TV_HUGE_SIZE

    @property
    def counts(self) -> PageCounts:
        """What came so far."""
        return PageCounts(self.native.bytes, self.native.sent_pages, self.native.zero_pages)

    def take(self, frame: Frame) -> None:
        """Apply a PAGES or ZERO frame. :raises ProtocolError: names the slot, page or length at fault."""
        what, full = frame.type.name, frame.type is MessageType.PAGES
        entry, limit = (PAGE, FRAME_PAGES) if full else (RUN, FRAME_RUNS)
        if len(frame.body) < HEAD.size:
            raise ProtocolError(f"{what}: bad length")
        slot, count = HEAD.unpack_from(frame.body)
        if not 1 <= count <= limit or len(frame.body) != HEAD.size + count * entry.size:
            raise ProtocolError(f"{what}: bad length")
        if len(frame.payload) != (count * PAGE_BYTES if full else 0):
            raise ProtocolError(f"{what}: bad length")
        if slot >= len(self.memory.regions):
            raise ProtocolError(f"{what}: there is no memory slot {slot}")
        region = self.memory.regions[slot]
        runs = [(each[0], 1 if full else each[1]) for each in entry.iter_unpack(frame.body[HEAD.size :])]
        after = 0
        for first, pages in runs:
            if not pages or first < after or first + pages > region.pages:
                raise bad_page(slot, first)
            after = first + pages
        if full:
            self._fill(region, [page for page, _ in runs], frame.payload)
        else:
            self._clear(region, runs)
        self.native.bytes += len(frame.body) + len(frame.payload)

    def _fill(self, region: MemoryRegion, pages: list[int], payload: bytes) -> None:
        for place, page in enumerate(pages):
            _page(region, page)[:] = payload[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
            self.landed[region.slot][page // 64] |= 1 << page % 64
        self.native.sent_pages += len(pages)

    def _clear(self, region: MemoryRegion, runs: list[tuple[int, int]]) -> None:
        for first, pages in runs:
            for page in range(first, first + pages):
                if self.landed[region.slot][page // 64] >> page % 64 & 1:
                    _page(region, page)[:] = bytes(PAGE_BYTES)
                    self.landed[region.slot][page // 64] &= ~(1 << page % 64) & (1 << 64) - 1
            self.native.zero_pages += pages


def bad_page(slot: int, page: int) -> ProtocolError:
    return ProtocolError(f"page {page:#x} of memory slot {slot} is outside the region, or comes twice in one frame")
