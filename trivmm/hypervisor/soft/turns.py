"""Whose turn it is: the vCPUs of a soft VM share one emulated CPU, and one of them has it at a time.

They take turns because two engines over one memory lose atomic increments: the emulator's read-modify-write
instructions are atomic between instructions only. First come, first served, so nobody starves; a turn lasts a slice of
guest code at the most where somebody waits. What a halted, parked or slow vCPU does (a device's register, a wait) it
does without the turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from trivmm.errors import HypervisorError

__all__ = ["Turns"]

LOOK_S: Final = 0.5  # who waits looks around at least this often, even if a wake were lost
LIMIT_S: Final = 2.0  # for those who wait on behalf of the VMM: a turn takes milliseconds


class Turns:
    """Any thread. ``who`` is an object of the caller's own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: object | None = None

    def take(self, who: object, stop: Callable[[], bool]) -> bool:
        """Wait for the turn; False, and it is not had, once ``stop()`` says so: asked again at each :meth:`wake`."""
        with self._changed:
            if self._owner is None and not self._queue:
                self._owner = who
                return True
            self._queue.append(who)
            try:
                while self._owner is not None or self._queue[0] is not who:
                    if stop():
                        return False
                    self._changed.wait(LOOK_S)
                self._owner = who
                return True
            finally:
                self._queue.remove(who)
                if self._owner is None:
                    self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._owner = None
            if self._queue:
                self._changed.notify_all()

    def wake(self) -> None:
        """Those who wait ask their ``stop`` again."""
        with self._changed:
            if self._queue:
                self._changed.notify_all()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """For the VMM. :raises HypervisorError: a vCPU has kept its turn for 2 s."""
        until = time.monotonic() + LIMIT_S
        if not self.take(object(), lambda: time.monotonic() > until):
            raise HypervisorError("soft CPU", f"a vCPU has kept it for {LIMIT_S:g} s")
        try:
            yield
        finally:
            self.release()
