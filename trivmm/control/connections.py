"""Which connection is given up when there are too many: a table without I/O.

A connection whose request is being handled or answered is never given up. The others stand in the order in which they
came to what they do: an idle one since it last was answered (or came), a half-sent request since its first byte, so
that a byte a second does not make it younger. The oldest goes first, idle or half-sent alike: an honest request is
half-sent for microseconds, and an honest client that was idle connects again.

Two things can be too many: connections, and bytes of half-sent bodies. Neither is a client's fault alone, so neither
is an error: whoever comes next is served.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Doing", "Table"]

C = TypeVar("C", bound=Hashable)


class Doing(enum.Enum):
    IDLE = "idle"
    READING = "reading"
    """Half-sent: its first byte is here, its last one is not."""
    BUSY = "busy"
    """Its handler runs, or its answer is being sent."""


class Table(Generic[C]):
    """At most ``limit`` connections, which hold at most ``max_held`` bytes of unfinished bodies together."""

    def __init__(self, limit: int, max_held: int) -> None:
        self.limit = limit
        self.max_held = max_held
        self._busy: set[C] = set()
        self._waiting: dict[C, Doing] = {}  # in the order of age: what comes to do something else goes to the end
        self._held: dict[C, int] = {}

    def __len__(self) -> int:
        return len(self._busy) + len(self._waiting)

    def __contains__(self, connection: C) -> bool:
        return connection in self._waiting or connection in self._busy

    @property
    def full(self) -> bool:
        return len(self) >= self.limit

    def add(self, connection: C) -> None:
        """A new one: idle until its first byte."""
        self._waiting[connection] = Doing.IDLE

    def remove(self, connection: C) -> Doing | None:
        """What it was doing, or None: it was not here (any more)."""
        self._held.pop(connection, None)
        if connection in self._busy:
            self._busy.remove(connection)
            return Doing.BUSY
        return self._waiting.pop(connection, None)

    def put(self, connection: C, doing: Doing) -> None:
        """It does that from now on. One that was given up stays so."""
        if connection not in self or self._waiting.get(connection) is doing:
            return
        self._waiting.pop(connection, None)
        self._busy.discard(connection)
        if doing is Doing.BUSY:
            self._held.pop(connection, None)
            self._busy.add(connection)
        else:
            self._waiting[connection] = doing

    def oldest(self, stirs: Callable[[C], bool]) -> C | None:
        """Whom to give up. ``stirs``: there is input from it that was not read yet, so what it does is about to
        change. An idle one that stirs may be sending a request and is spared; a half-sent one that stirs is spared
        while there is another choice."""
        stirring: C | None = None
        for connection, doing in self._waiting.items():
            if not stirs(connection):
                return connection
            if stirring is None and doing is Doing.READING:
                stirring = connection
        return stirring

    def hold(self, connection: C, count: int) -> list[C]:
        """It holds ``count`` bytes of its unfinished body. Gives those to be given up for that: the oldest half-sent
        ones that hold something, never itself, and no more than it takes."""
        if count:
            self._held[connection] = count
        else:
            self._held.pop(connection, None)
        excess = sum(self._held.values()) - self.max_held
        victims = []
        for other in self._waiting:
            if excess <= 0:
                break
            if other != connection and other in self._held:
                excess -= self._held[other]
                victims.append(other)
        return victims
