"""A tar archive's regular files, as they come by (POSIX.1-1988 ustar, with GNU's long names and pax paths).

Python's ``tarfile`` is made for archives that one trusts: it takes in a long name or a pax header whatever its size,
and knows formats that no package has. Here a header is 512 bytes, and everything that it says is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from trivmm.image.package.packed import Damaged, Stream

__all__ = ["Member", "read_tar"]

BLOCK: Final = 512
MAX_MEMBERS: Final = 200_000  # a distribution's largest kernel has 10,000
MAX_NOTE: Final = 1 << 16  # bytes of a long name or of a pax header
FILES: Final = (b"0", b"\0", b"7")
FOLDER: Final = b"5"
OTHERS: Final = b"12346"  # links, devices, pipes: no data, whatever the size says
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"


class Member:
    """A file, or something else that is not a folder (``is_file`` False). Read it before the next one comes."""

    def __init__(self, stream: Stream, path: str, size: int, is_file: bool) -> None:
        self._stream = stream
        self.path = path
        self.size = size
        self.is_file = is_file
        self.left = size

    def data(self, limit: int) -> bytes:
        """All of it. :raises Damaged: more than ``limit`` bytes."""
        if self.size > limit:
            raise Damaged(f"{self.path[:80]}: larger than {limit} bytes")
        self.left = 0
        return self._stream.exactly(self.size)


def read_tar(stream: Stream) -> Iterator[Member]:
    """:raises Damaged: no tar, or one whose paths leave it."""
    long_name = ""
    for _ in range(MAX_MEMBERS):
        head = stream.exactly(BLOCK)
        if not any(head):
            return
        _check(head)
        size, kind = _number(head[124:136]), head[156:157]
        padding = -size % BLOCK
        if kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            if size > MAX_NOTE:
                raise Damaged("a name in it is too long")
            note = stream.exactly(size)
            stream.skip(padding)
            if kind == LONG_NAME:
                long_name = _text(note)
            elif kind == PAX:
                long_name = _pax_path(note) or long_name
            continue
        path, long_name = _path(long_name or _name(head)), ""
        if kind in FILES:
            member = Member(stream, path, size, True)
            yield member
            stream.skip(member.left + padding)
        elif kind in OTHERS and kind:
            yield Member(stream, path, 0, False)
        elif kind != FOLDER:
            raise Damaged("a kind of entry that no package has")
    raise Damaged("too many entries")


def _check(head: bytes) -> None:
    total = sum(head[:148]) + 8 * 0x20 + sum(head[156:])
    if _number(head[148:156]) != total:
        raise Damaged("not a tar archive where one should be")


def _number(field: bytes) -> int:
    """Octal digits; GNU's binary numbers are for sizes beyond 8 GiB, which nothing here has."""
    text = field.strip(b" \0")
    if not text or any(digit not in b"01234567" for digit in text):
        raise Damaged("a number in it is none")
    return int(text, 8)


def _text(raw: bytes) -> str:
    try:
        return raw.partition(b"\0")[0].decode()
    except UnicodeDecodeError as error:
        raise Damaged("a name in it is not UTF-8") from error


def _name(head: bytes) -> str:
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(head[:100])}" if prefix else _text(head[:100])


def _pax_path(note: bytes) -> str:
    """The path among ``length key=value`` lines, or nothing. A size of its own would be one beyond 8 GiB."""
    found = ""
    while note:
        length, space, _ = note.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not len(length) + 3 <= int(length) <= len(note):
            raise Damaged("a pax header in it is damaged")
        key, _, value = note[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"size":
            raise Damaged("a file in it is too large")
        if key == b"path":
            found = _text(value)
        note = note[int(length) :]
    return found


def _path(name: str) -> str:
    """Below the root, without ``./`` before it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise Damaged("a path in it leaves the package")
    return "/".join(parts)
