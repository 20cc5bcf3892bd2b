"""The two ends of a console line, as they see each other. Pure.

A sink takes output from the line's ring itself, and tells it in the very step in which it has some: no await stands
between, so a state that is saved at any moment has what the sink has not, and nothing else. Only what a thread is
writing can't be told apart; it is the sink's from the start.
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["GuestInput", "GuestOutput", "Sink"]


class GuestOutput(Protocol):
    """The guest's end of a line, as its sink takes from it."""

    def peek(self) -> bytes:
        """The oldest output, at most a piece. Nothing where there is none, or where it is a saved state's by now."""

    def consume(self, count: int) -> None:
        """The sink has the first so many bytes of the last :meth:`peek`. Called in the step in which it got them."""

    def lend(self, count: int) -> None:
        """A thread writes the first so many bytes of the last :meth:`peek` from now on: they are the sink's, whatever
        comes of it. 0: it has ended; :meth:`consume` says so too."""


class Sink(Protocol):
    async def take(self, output: GuestOutput) -> None:
        """Wait until this sink can take something, then take it, if it is still there. What a thread has begun to
        write is not abandoned: cancellation takes effect before it or at the next. :raises OSError: when it cannot."""

    def close(self) -> None: ...


class GuestInput(Protocol):
    """The guest's end of a line, as a sink's client types on it."""

    @property
    def room(self) -> int:
        """Bytes that :meth:`push_input` would take now."""

    async def until_room(self) -> None: ...

    def push_input(self, data: bytes) -> int: ...
