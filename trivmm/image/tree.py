"""A file system in memory: what an image is to hold, whatever its format. Pure."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final

import attrs

from trivmm.errors import ConfigError

__all__ = ["MAX_FILE", "Entry", "Tree"]

MAX_FILE: Final = 1 << 30  # bytes of one file: an archive is made in memory, and is unpacked to the guest's
MAX_NAME: Final = 255  # bytes of a name: Linux's NAME_MAX
MAX_PATH: Final = 4095  # bytes of a whole path: Linux's PATH_MAX with its end


@attrs.frozen
class Entry:
    """``path`` has no slash before or after it; ``mode`` has the type's bits; ``data`` is a file's content or a link's
    target; ``device`` is (major, minor). Everything belongs to root."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class Tree:
    """Folders come into being with what lies in them. What is added over something that is no folder replaces it."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def folder(self, path: str, mode: int = 0o755) -> None:
        self._put(Entry(_clean(path), stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        if len(data) > MAX_FILE:
            raise ConfigError(path, len(data), "too large a file for an image", f"leave it at {MAX_FILE} bytes")
        self._put(Entry(_clean(path), stat.S_IFREG | mode, data))

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._put(Entry(_clean(path), stat.S_IFLNK | 0o777, os.fsencode(target)))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._put(Entry(_clean(path), stat.S_IFCHR | mode, device=(major, minor)))

    def get(self, path: str) -> Entry | None:
        return self._entries.get(path)

    def __iter__(self) -> Iterator[Entry]:
        """A folder before what lies in it; the same order for the same entries."""
        return iter(sorted(self._entries.values(), key=lambda entry: entry.path.split("/")))

    def _put(self, entry: Entry) -> None:
        above = entry.path
        while "/" in above:
            above = above.rpartition("/")[0]
            found = self._entries.setdefault(above, Entry(above, stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(found.mode):
                raise ConfigError(f"/{entry.path}", above, "lies in something that is no folder", "use another path")
        old = self._entries.get(entry.path)
        if old is not None and stat.S_ISDIR(old.mode) != stat.S_ISDIR(entry.mode):
            raise ConfigError(f"/{entry.path}", entry.path, "is a folder, or was no folder before", "use another path")
        self._entries[entry.path] = entry


def _clean(path: str) -> str:
    """:raises ConfigError: a path that is none inside of an image."""
    parts = path.strip("/").split("/")
    if "\0" in path or "\n" in path or any(part in ("", ".", "..") for part in parts):
        raise ConfigError("path in the image", path, "not a plain path", "give one as /etc/motd")
    try:
        raw = [part.encode() for part in parts]
    except UnicodeEncodeError as error:
        raise ConfigError("path in the image", path, "not text", "give a path in UTF-8") from error
    if max(map(len, raw)) > MAX_NAME or sum(map(len, raw)) + len(raw) > MAX_PATH:
        raise ConfigError("path in the image", path, "too long", f"names have at most {MAX_NAME} bytes")
    return "/".join(parts)
