"""The CONTROL role: a session over a connection, messages in the order that the session's table allows.

Owned by one sender or receiver, for one connection. What the state is and how it moves is ``wire.session``'s alone.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final, TypeVar

import attrs
import trio

from trivmm.errors import DeadlineError, MigrationError, ProtocolError
from trivmm.migration.link.halves import Connection, LinkLost
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.wire.messages import Abort, Message
from trivmm.migration.wire.session import Session, SessionState

__all__ = ["FAREWELL_S", "Link", "PeerAborted"]

FAREWELL_S: Final = 0.5  # a reason for the peer is a courtesy: it learns of the end from the closed connection too

M = TypeVar("M")


class PeerAborted(MigrationError):
    """The peer gave up, and said why."""


@attrs.define(eq=False)
class Link:
    """``session`` is this side's view of the conversation."""

    connection: Connection
    session: Session

    @property
    def name(self) -> str:
        """Which connection, for messages."""
        return self.connection.name

    @property
    def state(self) -> SessionState:
        return self.session.state

    async def send(self, message: Message) -> None:
        data = self.session.send(message)
        try:
            return await self.connection.sender.send(data)
        except LinkLost as error:
            lost = error
        raise await self._last_word(lost)

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        self.session.send_pages()
        try:
            return await self.connection.sender.send_pages(dirty, limit, counts)
        except LinkLost as error:
            lost = error
        raise await self._last_word(lost)

    async def _last_word(self, lost: LinkLost) -> LinkLost | PeerAborted:
        """What a peer that closed the connection said before, if anything: a better error than the lost link."""
        if not self.session.may_be_told_why:
            return lost
        with trio.move_on_after(FAREWELL_S):
            try:
                await self.receive()
            except PeerAborted as said:
                said.__cause__ = lost
                return said
            except (MigrationError, DeadlineError):
                pass
        return lost

    async def receive(self, sink: PageSink | None = None) -> Message:
        """The peer's next message. Pages go into ``sink`` where the session allows any.

        :raises PeerAborted: it was ABORT (after COMMIT that is a verdict, and returned).
        """
        frame = await self.connection.receiver.receive(sink if self.session.takes_pages else None)
        message = self.session.receive(frame)
        if isinstance(message, Abort) and self.session.over:
            raise PeerAborted(f"{self.name}: the peer gave up: {message.reason}")
        return message

    async def expect(self, kind: type[M]) -> M:
        """The peer's next message, which must be a ``kind``. :raises ProtocolError: it is another one."""
        message = await self.receive()
        if not isinstance(message, kind):
            raise ProtocolError(f"the peer sent {type(message).__name__}, {kind.__name__} was due")
        return message

    async def abort(self, reason: str) -> None:
        """Tell the peer, if it can still be told, and close. Never raises for the peer's sake; short, shielded."""
        await self.say_abort(reason)
        await self.close()

    async def say_abort(self, reason: str) -> None:
        """:meth:`abort` without the close. A destination that said it first hears that it was heard (DONE)."""
        # Out of order, broken or gone: then it sees the connection close.
        with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
            await self.connection.sender.send(self.session.farewell(reason))

    async def close(self) -> None:
        with trio.move_on_after(FAREWELL_S, shield=True):
            await self.connection.aclose()
