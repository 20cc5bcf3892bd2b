"""The migration protocol's sequence and its frames. Pure: bytes in, frames out, and back; see also ``messages``.

A migration, seen from the wire (source on the left; one connection)::

    source                                   destination
    HELLO session, role             ───────▶           a connection's first frame
    SETUP machine, memory           ───────▶           build the machine, nothing runs
                                    ◀───────  SETUP_OK            (or SETUP_FAIL reason)
    PAGES, ZERO …                   ───────▶           pages land
    ROUND_END n, pages              ───────▶           are all of them here?
                                    ◀───────  ROUND_ACK n         barrier, measures the round trip
      … rounds; then the machine stops, saves, harvests the last pages …
    PAGES, ZERO …, ROUND_END n, pages ─────▶
                                    ◀───────  ROUND_ACK n
    STATE                           ───────▶           load it, still nothing runs
                                    ◀───────  READY resume_ms, loaded_ms
    COMMIT                          ───────▶           take the locks, run
                                    ◀───────  RUNNING             (or REFUSED reason: it never ran)
    DONE                            ───────▶           the verdict was heard

    UNDO, any time after a ROUND_END, STATE or READY and before COMMIT: the source runs again, ◀ UNDONE, rounds go on
    ABORT reason, from either side before RUNNING: the end; from the destination a promise that it never ran
    HELLO, QUERY on a new connection: ◀ VERDICT (running, refused, pending or unknown), DONE ▶

Which message may come when is the table in ``session``. A frame, little-endian::

    0 magic "TVMg" · 4 version u16 · 6 type u16 · 8 length u32 · 12 body u32 · 16 sequence u64 · 24 body CRC32C ·
    28 pages CRC32C · 32 zero, not looked at · 52 CRC32C of 0..51

``length`` counts all bytes after the header, ``body`` those of them that the body CRC covers: for all types but
PAGES the two are equal and the body is a JSON object (ZERO and PAGES: see ``pages``). What follows the body are the
guest's pages, and their CRC that of all of them, side by side as they were sent; without any it is 0. Limits are
checked on the header, before anything is allocated.

One CRC a frame is as good as one a page: whatever hits 32 bits in a row or fewer, and any three bits, is found with
certainty in a frame of 512 KiB (CRC32C has that distance up to 256 MiB), all else with 2^-32 to be missed, as before;
pages that changed places are such a case. The list that says where they go has its own, checked before any lands.

``sequence`` counts a connection's frames from 0, in each direction. A frame that is whole but not the next one was
lost, repeated or moved on its way (a proxy that cuts and mends the stream): CRCs can't tell, and a lost frame of pages
would leave old memory in a running guest. ROUND_END says besides how many pages went out on its connection (zero
pages included, each time that one was sent), and the destination compares that with what landed.

Magic and version stay where they are in every version, so that a peer of another one is named and not taken for
damage. The rule is that current and previous are spoken. Version 1 had no sequence numbers, version 2 no HELLO and a
CRC for each page; nobody depends on either: today :data:`SUPPORTED` is version 3 alone.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import ProtocolError

__all__ = [
    "FRAME_PAGES",
    "FRAME_RUNS",
    "HEADER_BYTES",
    "PAGE_BYTES",
    "SUPPORTED",
    "VERSION",
    "Frame",
    "FrameReader",
    "Header",
    "MessageType",
    "bad_pages_crc",
    "check_content",
    "crc32c",
    "encode_frame",
    "numbered",
    "parse_header",
]

MAGIC: Final = b"TVMg"
VERSION: Final = 3
SUPPORTED: Final = (3,)  # current and previous; but 1 and 2 are refused, as said above
HEADER: Final = struct.Struct("<4sHHIIQII20xI")  # as long as TV_FRAME_HEADER in ffi/pages.h, where the reason stands
HEADER_BYTES: Final = HEADER.size
SEQUENCE: Final = struct.Struct("<Q")
CRC: Final = struct.Struct("<I")
SEQUENCE_AT: Final = 16
CHECKED: Final = HEADER_BYTES - 4  # bytes of the header that its own CRC covers
PAGE_BYTES: Final = 4096
FRAME_PAGES: Final = 128  # as TV_FRAME_PAGES in ffi/pages.h, where the reason stands
FRAME_RUNS: Final = 512
SMALL: Final = 16 << 10  # a body with at most one reason in it


class MessageType(enum.IntEnum):
    SETUP = 1
    SETUP_OK = 2
    SETUP_FAIL = 3
    ROUND_END = 4
    ROUND_ACK = 5
    STATE = 6
    READY = 7
    UNDO = 8
    UNDONE = 9
    COMMIT = 10
    RUNNING = 11
    REFUSED = 12
    DONE = 13
    QUERY = 14
    VERDICT = 15
    PAGES = 16
    ZERO = 17
    ABORT = 18
    HELLO = 19


MAX_BODY: Final[dict[MessageType, int]] = {
    **dict.fromkeys(MessageType, SMALL),
    MessageType.SETUP: 1 << 20,  # a configuration and a CPUID table
    MessageType.STATE: 4 << 20,  # 8 vCPUs of some 20 KiB and 64 devices of some 1 KiB, ten times over
    MessageType.PAGES: 8 + 4 * FRAME_PAGES,
    MessageType.ZERO: 8 + 8 * FRAME_RUNS,
}


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli, RFC 3720) of ``data``."""
    return int(lib.tv_crc32c(0, ffi.from_buffer("uint8_t[]", data), len(data)))


@attrs.frozen
class Header:
    """A checked header. ``length`` and ``body`` in bytes; ``sequence`` is the frame's number in its direction;
    ``pages_crc`` is 0 where there are no pages."""

    version: int
    type: MessageType
    length: int
    body: int
    sequence: int
    body_crc: int
    pages_crc: int


@attrs.frozen
class Frame:
    """A whole frame. ``payload`` are the bytes after the body: only PAGES has any."""

    version: int
    type: MessageType
    body: bytes
    payload: bytes = b""


def _check_start(raw: bytes) -> None:
    """Magic and version, as far as they came: who speaks something else may have a shorter header, or none."""
    if not MAGIC.startswith(raw[:4]):
        raise ProtocolError(f"bad magic {raw[:4]!r}: the peer does not speak this migration protocol")
    if len(raw) >= 6 and (version := int.from_bytes(raw[4:6], "little")) not in SUPPORTED:
        raise ProtocolError(f"bad version {version}: this side speaks {', '.join(map(str, SUPPORTED))}")


def parse_header(raw: bytes) -> Header:
    """:raises ProtocolError: on a wrong magic, CRC, version, type or length; ``raw`` is HEADER_BYTES long."""
    _check_start(raw)
    _, version, number, length, body, sequence, body_crc, pages_crc, header_crc = HEADER.unpack(raw)
    if header_crc != crc32c(raw[:CHECKED]):
        raise ProtocolError("bad header CRC: the stream is damaged")
    try:
        kind = MessageType(number)
    except ValueError:
        raise ProtocolError(f"bad type {number}: no such message in version {version}") from None
    payload = length - body
    if body > MAX_BODY[kind] or payload < 0 or (payload and kind is not MessageType.PAGES):
        raise ProtocolError(f"bad length: {kind.name} of {length} bytes with a body of {body}")
    if payload > FRAME_PAGES * PAGE_BYTES or payload % PAGE_BYTES:
        raise ProtocolError(f"bad length: {payload} bytes of pages in one frame")
    return Header(version, kind, length, body, sequence, body_crc, pages_crc)


def check_content(header: Header, body: bytes, payload: bytes) -> None:
    """:raises ProtocolError: when a CRC does not fit."""
    if crc32c(body) != header.body_crc:
        raise ProtocolError(f"bad CRC of frame {header.sequence} ({header.type.name}): the stream is damaged")
    if crc32c(payload) != header.pages_crc:
        raise bad_pages_crc(header.sequence, int.from_bytes(body[:4], "little"))


def bad_pages_crc(sequence: int, slot: int) -> ProtocolError:
    """The pages of frame ``sequence`` are not those that were sent."""
    return ProtocolError(f"bad CRC of the pages in frame {sequence}, of memory slot {slot}: the stream is damaged")


def check_sequence(header: Header, due: int) -> None:
    """:raises ProtocolError: when the frame is not number ``due``."""
    if header.sequence != due:
        what = "lost or moved" if header.sequence > due else "repeated"
        raise ProtocolError(
            f"frame {header.sequence} ({header.type.name}) came where {due} was due: the link {what} frames"
        )


def encode_frame(kind: MessageType, body: bytes, payload: bytes = b"") -> bytes:
    """A whole frame, number 0: whoever sends it says which one it is (:func:`numbered`)."""
    if len(body) > MAX_BODY[kind]:
        raise ProtocolError(f"{kind.name} of {len(body)} bytes does not fit; {MAX_BODY[kind]} is the limit")
    length, crcs = len(body) + len(payload), (crc32c(body), crc32c(payload))
    head = HEADER.pack(MAGIC, VERSION, kind, length, len(body), 0, *crcs, 0)[:CHECKED]
    return head + CRC.pack(crc32c(head)) + body + payload


def numbered(frame: bytes, sequence: int) -> bytes:
    """``frame``, a whole one, as number ``sequence`` of its connection and direction."""
    head = frame[:SEQUENCE_AT] + SEQUENCE.pack(sequence) + frame[SEQUENCE_AT + SEQUENCE.size : CHECKED]
    return head + CRC.pack(crc32c(head)) + frame[HEADER_BYTES:]


class FrameReader:
    """Cuts a byte stream into frames and checks that none is missing, twice or early. Holds at most one frame's bytes
    beyond what it was fed. ``due`` is the number of the next frame; whoever takes frames past this reader counts on."""

    def __init__(self) -> None:
        self.due = 0
        self._buffer = bytearray()
        self._header: Header | None = None

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None: feed more. :raises ProtocolError: the stream is useless from here on."""
        if self._header is None:
            if len(self._buffer) < HEADER_BYTES:
                _check_start(bytes(self._buffer[:6]))
                return None
            header = parse_header(bytes(self._buffer[:HEADER_BYTES]))
            check_sequence(header, self.due)
            self._header = header
        header = self._header
        if len(self._buffer) < HEADER_BYTES + header.length:
            return None
        start, end = HEADER_BYTES + header.body, HEADER_BYTES + header.length
        body, payload = bytes(self._buffer[HEADER_BYTES:start]), bytes(self._buffer[start:end])
        check_content(header, body, payload)
        del self._buffer[:end]
        self._header = None
        self.due += 1
        return Frame(header.version, header.type, body, payload)

    @property
    def wanted(self) -> int:
        """Bytes that are missing to the end of the header or, once that is there, of the frame: a reader that asks
        for no more than this never takes bytes of the next frame."""
        whole = HEADER_BYTES if self._header is None else HEADER_BYTES + self._header.length
        return max(whole - len(self._buffer), 0)

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)
