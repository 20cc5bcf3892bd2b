"""A file that is there whole or not at all: written beside its place, then renamed over it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trivmm.errors import ConfigError, reason_of

__all__ = ["replacing", "source_date"]

LATEST = (1 << 32) - 1  # of the formats' 32-bit times


@contextmanager
def replacing(option: str, path: Path) -> Iterator[Path]:
    """Write to the path that it gives; at the end that becomes ``path``, and without an end it is gone.

    :raises ConfigError: there can be no file, in the words of ``option``."""
    if path.is_dir():
        raise ConfigError(option, str(path), "a folder", "give the path of a file")
    made = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    try:
        os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except (OSError, ValueError) as error:
        raise ConfigError(option, str(path), reason_of(error), "give a path that can be written") from error
    try:
        yield made
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
    except BaseException:
        with suppress(OSError):
            made.unlink()
        raise


def source_date() -> int:
    """The time that everything in an image has, in seconds since 1970: ``SOURCE_DATE_EPOCH``, or 0.

    https://reproducible-builds.org/specs/source-date-epoch/ :raises ConfigError: it is no such number."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= LATEST):
        raise ConfigError("SOURCE_DATE_EPOCH", text, "not seconds since 1970, below 2^32", "unset it, or give a number")
    return int(text)
