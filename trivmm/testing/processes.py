"""For tests that know no trio: waiting for what other processes do, and moves between two of ``trivmm fake``.

What another process does has no event here, so it is looked at again and again, each time within a limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from trivmm.testing.plugin import FakeVmm

__all__ = ["FAKE_VM", "Receiving", "booted", "listens", "outcome", "phase", "receiving", "state", "until"]

LIMIT_S: Final = 60.0
POLL_S: Final = 0.01
ACCEPTS: Final = "00010000"  # __SO_ACCEPTCON as /proc/net/unix spells it
FAKE_VM: Final = {"payload": {"kernel": "none is looked for"}, "memory": {"size": 32 << 20}}


def until(true: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """:raises AssertionError: with ``what``, when it does not come true in time."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(POLL_S)


def listens(path: Path) -> bool:
    """A unix socket: between bind and listen the file is there and nobody answers."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[3] == ACCEPTS and row[-1] == str(path) for row in rows[1:])


def booted(fake: FakeVmm) -> FakeVmm:
    """It has a VM, which runs."""
    assert fake.call("PUT", "vm.create", FAKE_VM) == (204, None)
    assert fake.call("PUT", "vm.boot") == (204, None)
    return fake


def state(fake: FakeVmm) -> str:
    return str(fake.call("GET", "vm.info")[1]["state"])


def phase(fake: FakeVmm) -> str:
    """Of its migration; empty where there was none yet."""
    progress = fake.call("GET", "vm.migration-progress")[1]
    return "" if progress is None else str(progress["phase"])


def outcome(fake: FakeVmm) -> dict[str, Any]:
    """The progress of its migration once that has ended."""
    last: dict[str, Any] = {}

    def ended() -> bool:
        progress = fake.call("GET", "vm.migration-progress")[1]
        last.update(progress or {})
        return progress is not None and "Ongoing" not in progress["state"]

    until(ended, "the migration does not end")
    return last


def _made_at(path: Path) -> int | None:
    """When, in its file system's time; None: it is not there."""
    try:
        return path.stat().st_ctime_ns
    except FileNotFoundError:
        return None


@attrs.define
class Receiving:
    """``status`` is what receive-migration answered; None while it lasts, and where its process went away first."""

    url: str
    status: int | None = None


@contextmanager
def receiving(target: FakeVmm, path: Path) -> Iterator[Receiving]:
    """``target`` waits for a VM at ``path`` when the block begins; its call has ended after the block."""
    made = Receiving(f"unix:{path}")
    before = _made_at(path)  # a receiver that takes an address over makes its socket anew

    def receive() -> None:
        try:
            made.status = target.call("PUT", "vm.receive-migration", {"receiver_url": made.url})[0]
        except OSError:
            made.status = None

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        until(lambda: listens(path) and _made_at(path) != before, f"nobody listens at {path}")
        yield made
    finally:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "receive-migration does not end"
