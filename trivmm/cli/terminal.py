"""The process's terminal while a guest has it: raw, typed on, followed in its size, and given back as it was.

Ctrl-A x leaves: the VMM ends as by SIGTERM. Everything else that is typed is the guest's, Ctrl-C too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, TrivmmError

__all__ = ["Escape", "follow_size", "is_terminal", "is_typed_on", "raw_terminal", "restore_terminal", "type_into"]

logger = logging.getLogger(__name__)

TYPED_BYTES: Final = 256
CTRL_A: Final = 0x01
LEAVE: Final = (ord("x"), ord("X"))
NOTICE: Final = "trivmm: the guest has this terminal; Ctrl-A x ends the VMM, Ctrl-A Ctrl-A types one Ctrl-A"


class Escape:
    """Finds Ctrl-A x in what is typed. Pure; the keys may come one by one."""

    def __init__(self) -> None:
        self._pending = False

    def take(self, typed: bytes) -> tuple[bytes, bool]:
        """What of it is the guest's, and whether the user leaves (what comes after that is nobody's). A Ctrl-A waits
        for the key after it; with another key than ``x`` and itself, both are the guest's."""
        keys = bytearray()
        for key in typed:
            if not self._pending:
                self._pending = key == CTRL_A
                if not self._pending:
                    keys.append(key)
                continue
            self._pending = False
            if key in LEAVE:
                return bytes(keys), True
            keys.append(CTRL_A)
            if key != CTRL_A:
                keys.append(key)
        return bytes(keys), False


def is_terminal(fd: int) -> bool:
    try:
        return stat.S_ISCHR(os.fstat(fd).st_mode) and os.isatty(fd)
    except OSError:
        return False


def is_typed_on() -> bool:
    """Whether there is a terminal on stdin and we are what it talks to: a process in the background is stopped when it
    reads its terminal, or makes it raw."""
    try:
        return is_terminal(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal that is not the session's own: it has no foreground
        return True


async def type_into(vm: Any, line: str, deadlines: Deadlines) -> None:
    """What is typed goes to the line (``serial`` or ``console``) of a :class:`~trivmm.vm.Vm`, as the guest makes room;
    a guest that makes none for ``typing`` loses what is typed, until it does. Lives until the process ends, the
    terminal does, or the user leaves."""
    escape, deaf = Escape(), False
    fd = os.open("/proc/self/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    async with trio.lowlevel.FdStream(fd) as stream:
        while typed := await stream.receive_some(TYPED_BYTES):
            keys, leave = escape.take(typed)
            if leave:
                signal.raise_signal(signal.SIGTERM)
                return
            with contextlib.suppress(TrivmmError):  # between power-off and boot nobody reads
                if not deaf:
                    deaf = not await _typed(vm, line, keys, deadlines)
                else:
                    deaf = vm.console_input(keys, line) < len(keys)


async def _typed(vm: Any, line: str, keys: bytes, deadlines: Deadlines) -> bool:
    try:
        with deadlines.enter("typing", "the guest takes no input"):
            await vm.feed_console(keys, line)
    except DeadlineError as error:
        logger.warning("%s; what is typed is dropped until it does", error)
        return False
    return True


async def follow_size(vm: Any) -> None:
    """The guest is told of every new size. Lives until the process ends."""
    with trio.open_signal_receiver(signal.SIGWINCH) as signals:
        async for _ in signals:
            vm.terminal_resized()


_SAVED: list[Any] = []  # the terminal's attributes from before; one terminal a process


def restore_terminal() -> None:
    """Idempotent; any thread."""
    if _SAVED:
        with contextlib.suppress(termios.error, ValueError, OSError):
            termios.tcsetattr(0, termios.TCSADRAIN, _SAVED[0])


@contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Raw while the guest has the terminal (its own Ctrl-C included); as it was afterwards, whatever happened."""
    if not wanted or not is_typed_on():
        yield
        return
    _SAVED.append(termios.tcgetattr(0))
    try:
        tty.setraw(0)
        print(NOTICE, file=sys.stderr, end="\r\n" if is_terminal(2) else "\n", flush=True)
        yield
    finally:
        restore_terminal()
        _SAVED.clear()
