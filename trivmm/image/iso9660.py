"""A CD's file system with some files in its root, as Linux mounts it: ECMA-119 with Rock Ridge. Pure.

Names of ECMA-119 are capitals with a version behind them, so the ones that a guest looks for (``user-data``) are in
Rock Ridge's NM entries (IEEE P1282; SUSP, IEEE P1281, says how they are announced). One folder, one sector for it: it
is made for a handful of files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from trivmm.errors import ConfigError

__all__ = ["SECTOR", "iso9660", "label_of"]

SECTOR: Final = 2048
VOLUME, TERMINATOR, PATHS_LE, PATHS_BE, ROOT, CONTINUATION, FIRST_FILE = 16, 17, 18, 19, 20, 21, 22  # sectors
IDENTIFIER: Final = b"CD001"
LABEL_AT: Final = 40  # in the volume descriptor
MAX_LABEL: Final = 32
SMALLEST: Final = 512  # sectors, 1 MiB: busybox and others look for file systems up to there, and give up at an end
FOLDER: Final = 2  # of a directory record's flags
FOLDER_MODE, FILE_MODE = 0o040555, 0o100444
NO_DATE: Final = b"0" * 16 + b"\0"


def iso9660(label: str, files: Mapping[str, bytes], time: int) -> bytes:
    """``time``: of everything, in seconds since 1970. ``label``: at most 32 capitals, digits and underscores.

    :raises ConfigError: more files than one sector tells of, or two whose names are alike in capitals."""
    stamp = datetime.fromtimestamp(time, UTC)
    day = bytes((stamp.year - 1900, stamp.month, stamp.day, stamp.hour, stamp.minute, stamp.second, 0))
    plain = {_plain_name(name): name for name in files}
    if len(plain) != len(files):
        raise ConfigError("files", sorted(files), "two have the same name in capitals", "give them other names")
    announced = b"SP\7\1\xbe\xef\0" + _posix(FOLDER_MODE, 2)
    announced += b"CE\x1c\1" + _both(CONTINUATION) + _both(0) + _both(len(_rock_ridge()))
    root = [_record(b"\0", ROOT, SECTOR, day, FOLDER, announced)]
    root.append(_record(b"\1", ROOT, SECTOR, day, FOLDER, _posix(FOLDER_MODE, 2)))
    contents, at = b"", FIRST_FILE
    for short in sorted(plain):
        name, data = plain[short], files[plain[short]]
        known = _posix(FILE_MODE, 1) + _entry(b"NM", b"\0" + name.encode())
        root.append(_record(short.encode(), at if data else 0, len(data), day, 0, known))
        contents += _padded(data)
        at += -(-len(data) // SECTOR)
    listing = b"".join(root)
    if len(listing) > SECTOR:
        raise ConfigError("files", len(files), "more than one folder's sector holds", "give fewer")
    at = max(at, SMALLEST)
    head = bytes(VOLUME * SECTOR) + _volume(label, at, _record(b"\0", ROOT, SECTOR, day, FOLDER, b""), stamp)
    end = _padded(b"\xff" + IDENTIFIER + b"\1")
    paths = [struct.pack(f"{order}BBIH", 1, 0, ROOT, 1) + bytes(2) for order in "<>"]  # of the root, alone
    made = head + end + b"".join(map(_padded, (*paths, listing, _rock_ridge()))) + contents
    return made.ljust(at * SECTOR, b"\0")


def label_of(start: bytes) -> str | None:
    """Of an image whose first 17 sectors these are; None: it is no such file system."""
    volume = start[VOLUME * SECTOR : (VOLUME + 1) * SECTOR]
    if len(volume) < SECTOR or not volume.startswith(b"\1" + IDENTIFIER):
        return None
    return volume[LABEL_AT : LABEL_AT + MAX_LABEL].decode("latin-1").rstrip()


def _both(value: int) -> bytes:
    """A number in both orders (ECMA-119 7.3.3)."""
    return struct.pack("<I", value) + struct.pack(">I", value)


def _both_short(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


def _plain_name(name: str) -> str:
    """ECMA-119 7.5, level 2: up to 30 characters, a dot, a version."""
    letters = "".join(char if char.isascii() and char.isalnum() else "_" for char in name).upper()
    return f"{letters[:30]}.;1"


def _record(name: bytes, sector: int, size: int, day: bytes, flags: int, system: bytes) -> bytes:
    """ECMA-119 9.1, with what Rock Ridge adds."""
    body = _both(sector) + _both(size) + day + bytes((flags, 0, 0)) + _both_short(1)
    body += bytes((len(name),)) + name
    body += bytes(len(body) % 2) + system  # with the two bytes before it, what follows a name has an even place
    body += bytes(len(body) % 2)
    return bytes((len(body) + 2, 0)) + body


def _entry(kind: bytes, content: bytes) -> bytes:
    return kind + bytes((4 + len(content), 1)) + content


def _posix(mode: int, links: int) -> bytes:
    """Root's. RRIP 1.09, which Linux and everybody else reads: without a serial number."""
    return _entry(b"PX", _both(mode) + _both(links) + _both(0) + _both(0))


def _rock_ridge() -> bytes:
    name = b"RRIP_1991A"
    return _entry(b"ER", bytes((len(name), 0, 0, 1)) + name)


def _volume(label: str, sectors: int, root: bytes, stamp: datetime) -> bytes:
    """The primary volume descriptor (ECMA-119 8.4)."""
    made = stamp.strftime("%Y%m%d%H%M%S00").encode() + b"\0"
    parts = (
        b"\1" + IDENTIFIER + b"\1\0",
        b" " * 32 + label.encode().ljust(MAX_LABEL) + bytes(8),
        _both(sectors) + bytes(32),
        _both_short(1) + _both_short(1) + _both_short(SECTOR),
        _both(10) + struct.pack("<II", PATHS_LE, 0) + struct.pack(">II", PATHS_BE, 0),
        root,
        b" " * (128 * 4 + 37 * 3),
        made + made + NO_DATE + NO_DATE + b"\1",
    )
    return _padded(b"".join(parts))
