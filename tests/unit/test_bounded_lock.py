"""The lock of registers: whoever waits too long for it says so by name, but not before the holder had its chance."""

from __future__ import annotations

import threading

import pytest

from trivmm.bus.lock import BoundedLock
from trivmm.errors import DeadlineError


def test_a_lock_that_is_held_too_long_is_named() -> None:
    lock = BoundedLock("the registers of _disk0", 0.001)
    failures: list[DeadlineError] = []

    def wait() -> None:
        try:
            with lock:
                pass
        except DeadlineError as error:
            failures.append(error)

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
    assert [str(error) for error in failures] == [
        "deadline lock (0.001 s) expired: the registers of _disk0 is held by somebody else"
    ]
    with lock:
        pass


def test_one_that_waits_for_the_kernel_says_kernel() -> None:
    lock = BoundedLock("an MSI-X table", 0.001, "kernel")
    with lock, pytest.raises(DeadlineError, match=r"^deadline kernel"):
        lock.__enter__()


def test_a_process_that_was_stopped_gets_a_last_look() -> None:
    """Its time is over when it goes on, before the holder has had a chance to let go."""

    class Stopped:
        def __init__(self) -> None:
            self.waits: list[float] = []

        def acquire(self, timeout: float) -> bool:
            self.waits.append(timeout)
            return len(self.waits) == 2

        def release(self) -> None:
            return None

    lock = BoundedLock("it", 5)
    stopped = Stopped()
    lock._lock = stopped  # type: ignore[assignment]
    with lock:
        assert stopped.waits == [5, 5]
