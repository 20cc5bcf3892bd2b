"""Frames of guest pages, as bytes: the format of their bodies, and its checks. Pure.

Bodies, little-endian:

- PAGES: slot u32, count u32, count x page u32; payload: count x 4096 bytes
- ZERO: slot u32, count u32, count x (first page u32, pages u32)

Page numbers count from the region's start and ascend. ``ffi/pages.h`` and its files make and take the same frames on
sockets with the GIL released and are what migrations use; what is here is their oracle, and what memory streams use in
virtual time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.wire.frame import FRAME_PAGES, FRAME_RUNS, PAGE_BYTES, Frame, MessageType, encode_frame

__all__ = ["PAGE_FRAMES", "PageRuns", "bad_page", "encode_pages", "encode_zero", "parse_pages"]

PAGE_FRAMES: Final = (MessageType.PAGES, MessageType.ZERO)
HEAD: Final = struct.Struct("<II")
PAGE: Final = struct.Struct("<I")
RUN: Final = struct.Struct("<II")


@attrs.frozen
class PageRuns:
    """What a frame says: ``runs`` of (first page, pages) of a memory slot; ``content`` None: they are zero."""

    slot: int
    runs: tuple[tuple[int, int], ...]
    content: bytes | None


def encode_pages(slot: int, pages: Sequence[tuple[int, bytes]]) -> bytes:
    """A PAGES frame, number 0, of at most FRAME_PAGES (page, content)."""
    body = HEAD.pack(slot, len(pages)) + b"".join(PAGE.pack(page) for page, _ in pages)
    return encode_frame(MessageType.PAGES, body, b"".join(content for _, content in pages))


def encode_zero(slot: int, pages: Sequence[int]) -> bytes:
    """A ZERO frame, number 0, of at most FRAME_RUNS pages."""
    body = HEAD.pack(slot, len(pages)) + b"".join(RUN.pack(page, 1) for page in pages)
    return encode_frame(MessageType.ZERO, body)


def parse_pages(frame: Frame, regions: Sequence[int]) -> PageRuns:
    """Of a PAGES or ZERO frame, all of it checked; ``regions`` is how many pages each slot has.

    :raises ProtocolError: names the slot, page or length at fault."""
    what, full = frame.type.name, frame.type is MessageType.PAGES
    entry, limit = (PAGE, FRAME_PAGES) if full else (RUN, FRAME_RUNS)
    if len(frame.body) < HEAD.size:
        raise ProtocolError(f"{what}: bad length")
    slot, count = HEAD.unpack_from(frame.body)
    if not 1 <= count <= limit or len(frame.body) != HEAD.size + count * entry.size:
        raise ProtocolError(f"{what}: bad length")
    if len(frame.payload) != (count * PAGE_BYTES if full else 0):
        raise ProtocolError(f"{what}: bad length")
    if slot >= len(regions):
        raise ProtocolError(f"{what}: there is no memory slot {slot}")
    runs = tuple((each[0], 1 if full else each[1]) for each in entry.iter_unpack(frame.body[HEAD.size :]))
    after = 0
    for first, pages in runs:
        if not pages or first < after or first + pages > regions[slot]:
            raise bad_page(slot, first)
        after = first + pages
    return PageRuns(slot, runs, frame.payload if full else None)


def bad_page(slot: int, page: int) -> ProtocolError:
    return ProtocolError(f"page {page:#x} of memory slot {slot} is outside the region, or comes twice in one frame")
