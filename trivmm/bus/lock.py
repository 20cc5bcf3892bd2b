"""A lock for registers: held for a few copies, waited for with a bound. Whoever waits longer has found a bug."""

from __future__ import annotations

import threading

from trivmm.errors import DeadlineError

__all__ = ["BoundedLock"]


class BoundedLock:
    """``what`` names it in the error. ``limit_s`` and ``deadline`` are a row of ``trivmm.deadlines``: ``lock``, or
    ``kernel`` where the holder waits for the kernel.

    Not reentrant; ``with`` is the only way to hold it. Waits twice: a process that was stopped finds its time over
    before the holder has had a chance."""

    __slots__ = ("_deadline", "_limit_s", "_lock", "_what")

    def __init__(self, what: str, limit_s: float, deadline: str = "lock") -> None:
        self._what, self._limit_s, self._deadline = what, limit_s, deadline
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        """:raises DeadlineError: naming the lock."""
        if not self._lock.acquire(timeout=self._limit_s) and not self._lock.acquire(timeout=self._limit_s):
            raise DeadlineError(self._deadline, self._limit_s, f"{self._what} is held by somebody else")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
