"""The process's log, for ``trivmm run``: where it goes, how much of it, and one line a record, whatever is in it."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import Final, TypeAlias

from trivmm.errors import ConfigError, one_line, reason_of

__all__ = ["set_up_log"]

LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
FORMAT: Final = "trivmm: %(relativeCreated)10.1f ms <%(threadName)s> %(levelname)s:%(name)s -- %(message)s"
MAX_MESSAGE: Final = 8192  # characters: more than a line of the guest's debug console, all of it escaped

_ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Formatter(logging.Formatter):
    """Guests and peers have a part in what is logged: none of it moves a cursor, or looks like a record of ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message, MAX_MESSAGE)
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"  {one_line(line, MAX_MESSAGE)}" for line in lines)


def set_up_log(path: str | None, verbose: int) -> None:
    """To ``path``, or standard error. :raises ConfigError: it can't be written."""
    try:
        if path is not None:  # a FIFO that nobody reads is an error here, where logging's open would hang
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
        handler = logging.StreamHandler() if path is None else logging.FileHandler(path)
    except (OSError, ValueError) as error:
        raise ConfigError("--log-file", path, reason_of(error), "give another path") from error
    handler.setFormatter(_Formatter(FORMAT))
    logging.basicConfig(handlers=[handler], level=LEVELS[min(verbose, len(LEVELS) - 1)])
