"""A Debian package's files, without dpkg: an ``ar`` archive around a packed tar (deb(5))."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from trivmm.errors import ConfigError, reason_of
from trivmm.image.package.packed import Damaged, Stream, open_packed
from trivmm.image.package.tar import read_tar

__all__ = ["FIELD", "MAX_FILE", "MAX_UNPACKED", "read_deb"]

FIELD: Final = "package"  # what mistakes are told of
MAGIC: Final = b"!<arch>\n"
HEAD: Final = 60  # bytes of a member's header
MAX_MEMBERS: Final = 16  # a package has three
MAX_UNPACKED: Final = 4 << 30  # bytes of one package: a distribution's largest kernel has an eighth of it
MAX_FILE: Final = 64 << 20  # bytes of one file that is wanted: a kernel has a quarter of it


def read_deb(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of its regular files whose path (``usr/bin/x``) is ``wanted``; nothing is written anywhere, and
    no owner, mode or link is looked at. :raises ConfigError: it can't be read, is no package, or one that lies."""
    try:
        with package.open("rb") as file:
            seen: set[str] = set()
            content = _data(file)
            for member in read_tar(content):
                if not wanted(member.path):
                    continue
                if not member.is_file or member.path in seen:
                    raise Damaged(f"{member.path[:80]}: a link, a device, or there twice")
                seen.add(member.path)
                yield member.path, member.data(MAX_FILE)
            content.drain()
    except Damaged as error:
        raise ConfigError(FIELD, str(package), str(error), "fetch it again, from its distribution") from error
    except (OSError, ValueError) as error:
        raise ConfigError(FIELD, str(package), reason_of(error), "give a .deb file") from error


class _Section:
    """``size`` bytes of a file from where it is."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int, /) -> bytes:
        piece = self._file.read(min(size, self._left))
        self._left -= len(piece)
        return piece


def _data(file: BinaryIO) -> Stream:
    """The tar in it, unpacked as it is read."""
    if file.read(len(MAGIC)) != MAGIC:
        raise Damaged("not a Debian package")
    for _ in range(MAX_MEMBERS):
        head = file.read(HEAD)
        if len(head) < HEAD:
            break
        name, size = head[:16].decode("latin-1").strip().rstrip("/"), head[48:58].strip()
        if not size.isdigit() or head[58:] != b"`\n":
            raise Damaged("the archive in it is damaged")
        if name.startswith("data.tar"):
            return open_packed(_Section(file, int(size)), name.removeprefix("data.tar"), MAX_UNPACKED)
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise Damaged("holds no files")
