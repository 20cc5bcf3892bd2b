"""A receiver's door: it listens, greets whoever comes, lets one source in, and answers questions about verdicts.

Strangers disturb nothing. Each has ``handshake`` to say what it wants; there are ``MAX_STRANGERS`` of them at most, and
one more takes the place of the oldest that has not said HELLO, then of the oldest that has said only that: a source
says what it wants at once, and who holds a place by silence loses it.

A door that let a source in stays open to answer that source's questions (:meth:`Door.stay`), however its link ended:
until the source says that it heard the verdict (DONE) or that it never sent COMMIT (ABORT), or for a while. How a link
ends says nothing: a middle box closes it in good order with COMMIT in flight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, MigrationError, ProtocolError
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.link.control import Link
from trivmm.migration.link.halves import LinkLost
from trivmm.migration.link.roles import greeted
from trivmm.migration.link.transports import Listener
from trivmm.migration.wire.frame import MessageType
from trivmm.migration.wire.messages import Done, Fate, Query, Setup, Verdict
from trivmm.migration.wire.session import Session, SessionState

__all__ = ["PENDING", "Arrival", "Door"]

logger = logging.getLogger(__name__)

MAX_STRANGERS: Final = 16  # greeted at once
PENDING: Final = Verdict(Fate.PENDING, "the destination has not settled it yet")
GIVEN_UP: Final = (SessionState.NEW, SessionState.OPEN)  # who goes first when it is full: said nothing, said HELLO


@attrs.frozen
class Arrival:
    """A source that has said HELLO and SETUP, and is let in."""

    link: Link
    session_id: bytes
    setup: Setup


@attrs.frozen(eq=False)
class _Stranger:
    link: Link
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


@attrs.define(eq=False)
class Door:
    """``question`` is asked what became of the session that came in. Its task is :meth:`keep_open`."""

    listener: Listener
    deadlines: Deadlines
    verdicts: Verdicts
    question: Callable[[], Verdict] = attrs.field(default=lambda: PENDING, init=False)
    stays: bool = attrs.field(default=False, init=False)
    _arrived: Arrival | None = attrs.field(default=None, init=False)
    _came: trio.Event = attrs.field(factory=trio.Event, init=False)
    _awaited: bool = attrs.field(default=False, init=False)  # somebody has it, and its link
    _strangers: list[_Stranger] = attrs.field(factory=list, init=False)  # the oldest first
    _turned_away: list[str] = attrs.field(factory=list, init=False)
    _open: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _staying: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self.listener.url

    async def arrival(self) -> Arrival:
        """Wait for a source. :raises DeadlineError: (accept) nobody came."""
        with self.deadlines.enter("accept", self._nobody):
            await self._came.wait()
        assert self._arrived is not None
        self._awaited = True
        return self._arrived

    def _nobody(self) -> str:
        if not self._turned_away:
            return f"{self.url}: no source came"
        return f"{self.url}: {len(self._turned_away)} came, none with a migration; the last: {self._turned_away[-1]}"

    # --- open and shut -------------------------------------------------------------------------------------------

    async def keep_open(self) -> None:
        """Until it is shut. The same door lets a source in and answers its questions: one that comes in between finds
        no gap."""
        try:
            with self._open:
                async with trio.open_nursery() as nursery:
                    await self._accept(nursery)
        finally:
            if self._arrived is not None and not self._awaited:  # let in when nobody waited any more
                await self._arrived.link.abort("nobody receives here any more")  # noqa: ASYNC102 - shields itself

    def shut(self) -> None:
        """Let nobody in any more, unless it :meth:`stay`\\ s."""
        if not self.stays:
            self._open.cancel()

    def close(self) -> None:
        """Stop listening, unless it :meth:`stay`\\ s: then that ends with closing."""
        if not self.stays:
            self.listener.close()

    def hand_over(self) -> None:
        """Stop answering at once, for a new receiver at the same address, which goes on with it."""
        self._staying.cancel()
        self.listener.close()

    def stay(self, nursery: trio.Nursery, seconds: float) -> None:
        """Answer for the session that came in for so long, as a task of ``nursery``."""
        try:
            nursery.start_soon(self._answer_questions, seconds)
        except RuntimeError:  # that nursery is closed already: nobody will answer
            return
        self.stays = True
        self.verdicts.only_answers(self.url, self.hand_over)

    async def _answer_questions(self, seconds: float) -> None:
        assert self._arrived is not None
        link = self._arrived.link
        try:
            self._staying.deadline = trio.current_time() + seconds
            with self._staying:
                await self._until_done(link)
                await trio.sleep_forever()
        finally:
            self.verdicts.closed(self.url, self.hand_over)
            self._open.cancel()
            self.listener.close()
            await link.close()  # noqa: ASYNC102 - shielded and bounded inside

    async def _until_done(self, link: Link) -> None:
        """DONE ends the waiting, and so does an ABORT that crossed ours: that source never sent COMMIT. No end of the
        link does, nor any silence: they are what the waiting is for."""
        assert self._arrived is not None
        try:
            while True:
                with suppress(DeadlineError):
                    if (await link.connection.receiver.receive()).type in (MessageType.DONE, MessageType.ABORT):
                        break
        except MigrationError:
            await link.close()
        else:
            self._heard(self._arrived.session_id)

    # --- strangers -----------------------------------------------------------------------------------------------

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection = await self.listener.accept()
            except trio.ClosedResourceError:
                return  # closed by its owner, or handed over
            stranger = _Stranger(Link(connection, Session(source=False)))
            if len(self._strangers) >= MAX_STRANGERS and not self._make_room():
                await stranger.link.close()  # all the others are being answered
                continue
            self._strangers.append(stranger)
            nursery.start_soon(self._greet, stranger)

    def _make_room(self) -> bool:
        for said in GIVEN_UP:
            for stranger in self._strangers:
                if stranger.link.state is said:
                    self._strangers.remove(stranger)
                    stranger.scope.cancel()
                    return True
        return False

    async def _greet(self, stranger: _Stranger) -> None:
        link, keep, why = stranger.link, False, ""
        try:
            with stranger.scope:
                keep = await self._ask_in(link)
            if stranger.scope.cancelled_caught:
                why = f"said nothing useful, and {MAX_STRANGERS} others came"
        except (MigrationError, DeadlineError) as error:
            why = str(error)
        finally:
            if stranger in self._strangers:
                self._strangers.remove(stranger)
            if why:
                logger.info("%s: turned away: %s", link.name, why)
                self._turned_away = [*self._turned_away[1 - MAX_STRANGERS :], why]
                await link.abort(why)  # noqa: ASYNC102 - shielded and bounded inside, as close is
            elif not keep:
                await link.close()  # noqa: ASYNC102

    async def _ask_in(self, link: Link) -> bool:
        """True when it is the source that is let in, whose link is kept.

        :raises ProtocolError: it wants what can't be had."""
        with self.deadlines.enter("handshake", f"{link.name}: connected and said nothing useful"):
            hello = await greeted(link)
            message = await link.receive()
        if isinstance(message, Query):
            with self.deadlines.enter("handshake", f"{link.name}: takes no answer"):
                await self._reply(link, hello.session)
            return False
        if not isinstance(message, Setup) or self._arrived is not None:
            raise ProtocolError("a migration is under way here already")
        self._arrived = Arrival(link, hello.session, message)
        self._came.set()
        return True

    # --- questions -----------------------------------------------------------------------------------------------

    async def _reply(self, link: Link, session_id: bytes) -> None:
        verdict = self._answer(session_id)
        await link.send(verdict)
        if verdict.fate.settled:
            with suppress(LinkLost):
                await link.expect(Done)
                self._heard(session_id)

    def _answer(self, session_id: bytes) -> Verdict:
        if self._arrived is not None and self._arrived.session_id == session_id:
            return self.question()
        return self.verdicts.of(session_id) or Verdict(Fate.UNKNOWN, "no such session here")

    def _heard(self, session_id: bytes) -> None:
        self.verdicts.heard(session_id)
        if self._arrived is not None and self._arrived.session_id == session_id:
            self._staying.cancel()
