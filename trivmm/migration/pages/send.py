"""The source's pages: which are still to be sent, and the plain-Python way to make frames of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from trivmm._native import ffi, lib
from trivmm.memory.guest import MemoryRegion
from trivmm.migration.pages.frames import encode_pages, encode_zero
from trivmm.migration.wire.frame import FRAME_PAGES, FRAME_RUNS, PAGE_BYTES

__all__ = ["DirtySet", "PageCounts", "page_frames"]


@attrs.define(eq=False)
class PageCounts:
    """What went through a connection: bytes on the wire, pages with content, pages sent as zero."""

    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0

    @property
    def all_pages(self) -> int:
        return self.pages + self.zero_pages

    def add(self, other: PageCounts) -> None:
        self.bytes += other.bytes
        self.pages += other.pages
        self.zero_pages += other.zero_pages


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


def page_frames(dirty: DirtySet, limit: int) -> Iterator[tuple[bytes, list[int], int]]:
    """Frames for at most ``limit`` pages: (frame, its pages, how many of them are sent as zero). The caller
    discards the pages once the frame is sent."""
    region, slot = dirty.region, dirty.region.slot
    full: list[tuple[int, bytes]] = []
    zero: list[int] = []
    for taken, page in enumerate(dirty):
        if taken == limit:
            break
        content = bytes(ffi.buffer(ffi.cast("uint8_t *", region.hva + page * PAGE_BYTES), PAGE_BYTES))
        if content.strip(b"\0"):
            full.append((page, content))
        else:
            zero.append(page)
        if len(full) == FRAME_PAGES:
            yield encode_pages(slot, full), [each for each, _ in full], 0
            full = []
        if len(zero) == FRAME_RUNS:
            yield encode_zero(slot, zero), zero, len(zero)
            zero = []
    if full:
        yield encode_pages(slot, full), [each for each, _ in full], 0
    if zero:
        yield encode_zero(slot, zero), zero, len(zero)
