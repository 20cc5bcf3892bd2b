"""A user's own files in an image: ``FILE:/path``, a file or a folder with all that is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from trivmm.errors import ConfigError, reason_of
from trivmm.image.tree import MAX_FILE, Tree

__all__ = ["add_extra", "read_file"]

ADD: Final = "--add"
MAX_FILES: Final = 100_000  # of one folder: a home folder that was given by mistake has more


def read_file(option: str, path: Path) -> tuple[bytes, int]:
    """Content and permissions of a regular file. :raises ConfigError: in the words of ``option``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO is not waited for
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError(option, str(path), "not a regular file", "give one")
            if about.st_size > MAX_FILE:
                raise ConfigError(option, str(path), "too large", f"give a file of at most {MAX_FILE >> 20} MiB")
            return file.read(MAX_FILE), stat.S_IMODE(about.st_mode) & 0o777
    except (OSError, ValueError) as error:
        raise ConfigError(option, str(path), reason_of(error), "give a file that can be read") from error


def add_extra(tree: Tree, given: str) -> None:
    """Links in a folder stay links; anything that is no file, folder or link is refused. :raises ConfigError:"""
    name, colon, place = given.rpartition(":")
    if not colon or not name or not place.startswith("/"):
        raise ConfigError(ADD, given, "not FILE:/PATH", "give a file or folder of this host, and its path in the guest")
    source = Path(name)
    if not source.is_dir():
        data, mode = read_file(ADD, source)
        tree.file(place, data, mode)
        return
    count = 0
    for folder, folders, names in os.walk(source, onerror=_refuse):
        inside = f"{place.rstrip('/')}/{os.path.relpath(folder, source)}".removesuffix("/.")
        if inside:  # not the root, which is there
            tree.folder(inside, stat.S_IMODE(os.stat(folder).st_mode) & 0o777)
        links = [each for each in folders if os.path.islink(os.path.join(folder, each))]
        for each in (*names, *links):
            path = Path(folder, each)
            if path.is_symlink():
                tree.link(f"{inside}/{each}", os.readlink(path))
            else:
                data, mode = read_file(ADD, path)
                tree.file(f"{inside}/{each}", data, mode)
            count += 1
            if count > MAX_FILES:
                raise ConfigError(ADD, given, f"more than {MAX_FILES} files", "give a smaller folder")


def _refuse(error: OSError) -> None:
    raise ConfigError(ADD, error.filename, reason_of(error), "give a folder that can be read") from error
