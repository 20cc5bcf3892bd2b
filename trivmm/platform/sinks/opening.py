"""From a line's configuration to its sink."""

from __future__ import annotations

import errno
import os
import stat
from typing import TypeAlias

from trivmm.config import ConsoleConfig, SerialConfig
from trivmm.errors import ConfigError, reason_of
from trivmm.platform.sinks.clients import PtySink, SocketSink
from trivmm.platform.sinks.ends import Sink
from trivmm.platform.sinks.plain import FdSink, NullSink

__all__ = ["LineConfig", "open_sink"]

LineConfig: TypeAlias = SerialConfig | ConsoleConfig


def open_sink(config: LineConfig, field: str = "serial", *, incoming: bool = False) -> Sink:
    """The sink that ``--serial`` or ``--console`` asks for; ``field`` says which. A file is truncated, or continued
    when the VM is ``incoming``.

    :raises ConfigError: when it cannot be opened.
    """
    match config.mode:
        case "Tty":
            return FdSink(_open_stdout())
        case "File":
            return FdSink(_open_file(config.file or "", field, os.O_APPEND if incoming else os.O_TRUNC))
        case "Pty":
            return PtySink(field)
        case "Socket":
            return SocketSink(config.socket or "", field)
        case _:
            return NullSink()


def _open_stdout() -> int:
    # An open file description of our own: O_NONBLOCK on a shared one would surprise its other users. A regular file
    # needs none, and with a position of its own our log, or the shell's next line, overwrites what the guest says.
    if stat.S_ISREG(os.fstat(1).st_mode):
        return os.dup(1)
    try:
        return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:  # a socket, or no /proc
        return os.dup(1)


def _open_file(path: str, field: str, how: int) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | how, 0o644)
    except (OSError, ValueError) as error:
        why = "a FIFO that nobody reads" if getattr(error, "errno", None) == errno.ENXIO else reason_of(error)
        raise ConfigError(f"{field}.file", path, f"cannot open it ({why})", "give a writable path") from error
