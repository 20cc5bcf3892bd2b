"""The destination's pages: how they land in its RAM, and what came on which connection.

How is a strategy (:class:`Landing`): :class:`MemfdLanding` writes what lands for the first time through the region's
memfd, while nothing runs there yet. Another one would give the pages to a guest that waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.migration.pages.frames import parse_pages
from trivmm.migration.pages.send import PageCounts
from trivmm.migration.wire.frame import PAGE_BYTES, Frame

__all__ = ["Landing", "MemfdLanding", "PageSink"]


class Landing(Protocol):
    """RAM while pages land in it. It is fresh memory at the begin, all zero."""

    memory: GuestMemory

    def aim(self, native: Any) -> None:
        """Tell the C side (``struct tv_landing *``), which lives no longer than this, where pages land."""

    def fill(self, slot: int, page: int, content: bytes) -> None:
        """The plain-Python way: a page with content."""

    def clear(self, slot: int, page: int) -> None:
        """The plain-Python way: a page of zeros."""


class MemfdLanding:
    """Into the regions' memfds. A zero page costs nothing unless something landed there before: ``landed`` are bitmaps
    of what may not be zero any more, for the C side too."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.landed = [ffi.new("uint64_t[]", region.bitmap_words) for region in memory.regions]
        self._chunks = [ffi.new("uint8_t[]", region.size // lib.TV_HUGE_SIZE + 1) for region in memory.regions]

    def aim(self, native: Any) -> None:
        native.memory = self.memory.native
        for region, bits, chunks in zip(self.memory.regions, self.landed, self._chunks, strict=True):
            native.memfd[region.slot], native.landed[region.slot] = region.memfd, bits
            native.chunks[region.slot] = chunks
            native.chunk_count[region.slot] = region.size // lib.TV_HUGE_SIZE

    def _page(self, slot: int, page: int) -> Any:
        hva = self.memory.regions[slot].hva + page * PAGE_BYTES
        return ffi.buffer(ffi.cast("uint8_t *", hva), PAGE_BYTES)

    def fill(self, slot: int, page: int, content: bytes) -> None:
        self._page(slot, page)[:] = content
        self.landed[slot][page // 64] |= 1 << page % 64

    def clear(self, slot: int, page: int) -> None:
        if self.landed[slot][page // 64] >> page % 64 & 1:
            self._page(slot, page)[:] = bytes(PAGE_BYTES)
            self.landed[slot][page // 64] &= ~(1 << page % 64) & (1 << 64) - 1


@attrs.define(eq=False)
class PageSink:
    """Where one connection's pages go. ``report`` is called now and then; ``native`` (cffi ``struct tv_landing *``) is
    what the C side reads and counts in."""

    landing: Landing
    report: Callable[[], None] = lambda: None
    native: Any = attrs.field(factory=lambda: ffi.new("struct tv_landing *"), init=False)

    def __attrs_post_init__(self) -> None:
        self.landing.aim(self.native)

    @property
    def counts(self) -> PageCounts:
        """What came so far."""
        return PageCounts(self.native.bytes, self.native.sent_pages, self.native.zero_pages)

    def take(self, frame: Frame) -> None:
        """Apply a PAGES or ZERO frame, in plain Python; nothing lands before all of it is checked.

        :raises ProtocolError: names the slot, page or length at fault."""
        said = parse_pages(frame, [region.pages for region in self.landing.memory.regions])
        for place, (first, pages) in enumerate(said.runs):
            if said.content is not None:
                self.landing.fill(said.slot, first, said.content[place * PAGE_BYTES : (place + 1) * PAGE_BYTES])
                continue
            for page in range(first, first + pages):
                self.landing.clear(said.slot, page)
        total = sum(pages for _, pages in said.runs)
        self.native.bytes += len(frame.body) + len(frame.payload)
        if said.content is not None:
            self.native.sent_pages += total
        else:
            self.native.zero_pages += total
