"""What happens to a VMM and its VM, as a stream of events with Cloud Hypervisor's names.

An :class:`EventBus` belongs to whoever owns the longest life it tells of (``open_vmm``, or an embedder's ``open_vm``).
:meth:`EventBus.emit` never waits and never raises: who listens too slowly loses events, is told how many in the stream
itself (``vmm``/``events-dropped``), and still gets the last one. A :class:`Subscription` is an async iterator that ends
when the bus closes.

Sources and events: ``vmm`` starting, shutdown; ``vm`` booting, booted, pausing, paused, resuming, resumed, resizing,
resized, rebooting, rebooted, shutdown, deleted, migration-started, migration-memory-iteration, migration-finished,
migration-failed, migration-receive-ready, -started, -finished, -failed; ``virtio-device`` activated, reset, failed,
stuck, io-error; ``guest`` panic.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

import attrs
import trio

__all__ = ["Event", "EventBus", "Subscription"]

logger = logging.getLogger(__name__)

CAPACITY: Final = 1024  # events that a slow listener may be behind: some seconds of a guest that cycles its devices


@attrs.frozen
class Event:
    """``properties`` are texts by name, or None where there are none. ``at_s`` counts from the bus's own start."""

    source: str
    event: str
    properties: Mapping[str, str] | None
    at_s: float

    def json(self) -> dict[str, Any]:
        """As Cloud Hypervisor's ``--event-monitor`` writes it."""
        secs = int(self.at_s)
        return {
            "timestamp": {"secs": secs, "nanos": int((self.at_s - secs) * 1e9)},
            "source": self.source,
            "event": self.event,
            "properties": None if self.properties is None else dict(self.properties),
        }

    def text(self, *, indent: int | None = None) -> str:
        return json.dumps(self.json(), indent=indent)


@attrs.define(eq=False)
class EventBus:
    """Used from one trio program, in its thread."""

    _start: float = attrs.field(factory=time.monotonic)
    _listeners: list[Callable[[Event], None]] = attrs.field(factory=list)
    _subscriptions: list[Subscription] = attrs.field(factory=list)
    closed: bool = attrs.field(default=False, init=False)

    def emit(self, source: str, event: str, /, **properties: str) -> None:
        """Tell everybody. Without effect once the bus is closed."""
        if self.closed:
            return
        told = Event(source, event, properties or None, time.monotonic() - self._start)
        logger.info("event: %s %s %s", source, event, properties or "")
        for listener in tuple(self._listeners):
            try:
                listener(told)
            except Exception:  # it would end whoever tells: a device's actor, the control loop, a migration's verdict
                logger.exception("a listener failed at %s %s; the VM goes on", source, event)
        for subscription in tuple(self._subscriptions):
            subscription.put(told)

    def listen(self, callback: Callable[[Event], None]) -> None:
        """Call back on every event from now on. Callbacks must be quick; what one raises is logged."""
        self._listeners.append(callback)

    def subscribe(self, capacity: int = CAPACITY) -> Subscription:
        """The events from now on, until :meth:`Subscription.close`; at most ``capacity`` of them wait to be fetched."""
        made = Subscription(self, capacity)
        if self.closed:
            made.end()
        else:
            self._subscriptions.append(made)
        return made

    def close(self) -> None:
        """No more events: every subscription ends after those that it holds. Idempotent."""
        self.closed = True
        for subscription in tuple(self._subscriptions):
            subscription.end()


@attrs.define(eq=False)
class Subscription:
    """An async iterator over events, and a context manager that closes it."""

    _bus: EventBus
    _capacity: int
    dropped: int = attrs.field(default=0, init=False)
    _waiting: deque[Event] = attrs.field(factory=deque, init=False)
    _missed: Event | None = attrs.field(default=None, init=False)  # the latest of those that found no room
    _told: int = attrs.field(default=0, init=False)  # of ``dropped``
    _ended: bool = attrs.field(default=False, init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more events for this one. Idempotent."""
        if self in self._bus._subscriptions:
            self._bus._subscriptions.remove(self)
        self.end()

    def put(self, event: Event) -> None:
        if len(self._waiting) >= self._capacity:
            self.dropped += 1
            self._missed = event
        else:
            self._tell_of_dropped(event.at_s)
            self._waiting.append(event)
        self._wake()

    def end(self) -> None:
        if self._missed is not None:  # always a last event: it is not among the dropped
            last, self.dropped = self._missed, self.dropped - 1
            self._tell_of_dropped(last.at_s)
            self._waiting.append(last)
        self._ended = True
        self._wake()

    def _tell_of_dropped(self, at_s: float) -> None:
        count, self._told, self._missed = self.dropped - self._told, self.dropped, None
        if count:
            self._waiting.append(Event("vmm", "events-dropped", {"count": str(count)}, at_s))

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._ended:
                raise StopAsyncIteration
            await self._news.wait()  # bounded by the caller: nothing may happen for a VM's whole life
        return self._waiting.popleft()
