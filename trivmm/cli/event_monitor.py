"""``--event-monitor``: the event bus as Cloud Hypervisor's stream of JSON objects, into a file, a FIFO or a descriptor.

The writer is a task beside the VMM that outlives it, until the bus's last event is written or ``drain`` has passed.
Nothing ever waits for its reader: what a reader that stopped has no room for is dropped by the subscription, counted,
and told in the stream itself.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from trivmm.cli.options import parse_event_monitor
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, reason_of
from trivmm.events import EventBus, Subscription
from trivmm.platform.sinks import FdSink
from trivmm.unwrapped import unwrapped_nursery

__all__ = ["open_event_monitor"]

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_event_monitor(option: str | None, bus: EventBus, deadlines: Deadlines) -> AsyncIterator[None]:
    """Write the bus's events for the length of the block, and then what is left of them. ``option`` None: nowhere.

    :raises ConfigError: it can't be opened."""
    if option is None:
        yield
        return
    sink = FdSink(_opened(option))
    writing = trio.CancelScope(shield=True)  # what ends the VMM must not cut off what is told of its end
    try:
        async with unwrapped_nursery() as nursery:
            nursery.start_soon(_write_all, sink, bus.subscribe(), writing, name="event monitor")
            try:
                yield
            finally:
                bus.close()
                writing.deadline = trio.current_time() + deadlines.drain
    finally:
        sink.close()


@attrs.define(eq=False)
class _Text:
    """What is to be written, as :class:`FdSink` takes it."""

    left: bytes

    def peek(self) -> bytes:
        return self.left

    def consume(self, count: int) -> None:
        self.left = self.left[count:]

    def lend(self, count: int) -> None:
        return None


async def _write_all(sink: FdSink, events: Subscription, writing: trio.CancelScope) -> None:
    with writing:
        async for event in events:
            text = _Text((event.text(indent=2) + "\n\n").encode())
            try:
                while text.left:
                    await sink.take(text)
            except OSError as error:
                logger.warning(
                    "--event-monitor: cannot write any more (%s); the VMM goes on without it", reason_of(error)
                )
                return


def _opened(option: str) -> int:
    """A descriptor of our own that never blocks for want of a reader."""
    path, fd = parse_event_monitor(option)
    if path is None:
        assert fd is not None
        return _inherited(option, fd)
    try:
        # For reading too: then a FIFO needs no reader, and one that goes away is no error: the next finds the rest.
        fifo = stat.S_ISFIFO(os.stat(path).st_mode) if os.path.exists(path) else False
        access = os.O_RDWR if fifo else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        return os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o644)
    except (OSError, ValueError) as error:
        why = f"cannot open it ({reason_of(error)})"
        raise ConfigError("--event-monitor path", path, why, "give a writable path") from error


def _inherited(option: str, fd: int) -> int:
    try:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise ConfigError("--event-monitor fd", fd, "open for reading only", "pass one that can be written")
        os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError(
            "--event-monitor fd", fd, f"not open ({error.strerror})", "pass an open descriptor"
        ) from error
    if fd <= 2:
        return os.dup(fd)  # the terminal's stays as it is
    return fd
