"""From COMMIT to a verdict: exactly one side runs the machine, or an operator is asked.

After COMMIT the source never runs by itself again. RUNNING means that the destination does; REFUSED (or an ABORT that
crossed COMMIT) is its promise that it never did and never will. A link that dies in between proves nothing, and neither
does one that is silent: the source dials again and asks by session id (QUERY), while it still listens on the old link.

**Why both may be heard at once.** The destination decides in one place, once, and before it tells anybody: its verdict
is written down first (``Receiver._settle``), then RUNNING, REFUSED, ABORT and every VERDICT report what is written
there. A question that comes before COMMIT was read *is* such a decision: the verdict becomes "refused", and a COMMIT
that is read later finds it and is discarded. So whichever answer comes first is the answer, and the other one, if it
comes at all, says the same. What asking early can cost is a COMMIT that was still under way after ``PATIENCE_S``: the
source, which runs again then, and never a second copy.

**When.** ``min(commit / 4, PATIENCE_S)`` after COMMIT, or at once when the link breaks; then again and again, each
question bounded, until ``commit``. Then there is one last look at what lies in the old link's socket, beside a last
question, bounded on their own: a source that was stopped (SIGSTOP, a suspended host) for longer than ``commit`` finds
its deadline expired before it has read anything, although the answer has come long ago. Only then the verdict is *in
doubt*, and :func:`ask` is how an operator asks later (``doubt``).

A destination keeps answering until the source says DONE: on the link, or on the connection on which it asked.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, MigrationError, ProtocolError
from trivmm.migration.link.control import FAREWELL_S, Link
from trivmm.migration.link.halves import LinkLost
from trivmm.migration.link.roles import open_control
from trivmm.migration.link.transports import Dialer
from trivmm.migration.wire.messages import Abort, Commit, Done, Fate, Query, Refused, Running, Verdict
from trivmm.migration.wire.session import LAST_LOOK_S, SessionState

__all__ = ["Finding", "ask", "ask_for_verdict", "say_done"]

logger = logging.getLogger(__name__)
PATIENCE_S: Final = 1.0  # from COMMIT to the first question on a link that is silent: far more than any downtime limit
ASK_AGAIN_S: Final = 0.1  # between two questions while the destination is still busy, or not reachable
TRIES: Final = 5  # of an operator's question: a receiver that takes an address over is not there for a moment


@attrs.frozen
class Finding:
    """What the source found out. ``fate`` as the destination says it, and why; None: it could not be asked."""

    fate: Fate | None
    reason: str = ""

    @property
    def settled(self) -> bool:
        return self.fate is not None and self.fate.settled


@attrs.define(eq=False)
class _Questions:
    """Asks until there is an answer that settles it, and keeps what it found last."""

    dialer: Dialer
    session_id: bytes
    found: Finding = Finding(None, "nobody was asked")
    asked: int = 0

    async def once(self, limit_s: float) -> Finding:
        """One question, in at most ``limit_s``."""
        self.asked += 1
        found = Finding(None, f"the destination does not answer within {limit_s:g} s")
        with trio.move_on_after(limit_s):
            try:
                answer = await _ask(self.dialer, self.session_id)
            except (MigrationError, DeadlineError) as error:
                found = Finding(None, f"the destination can't be asked ({error})")
            else:
                found = Finding(answer.fate, answer.reason)
        self.found = found
        return found

    async def until_settled(self, each_s: float) -> Finding:
        """Bounded by the caller."""
        while not (found := await self.once(each_s)).settled:
            logger.info("no verdict yet: %s", found.reason)
            await trio.sleep(ASK_AGAIN_S)
        return found


async def ask(dialer: Dialer, session_id: bytes, deadlines: Deadlines) -> Finding:
    """An operator's question, later. Takes at most ``resolve``: an answer that settles it is given at once, one that
    doesn't (the machine is still being started) is asked for again, and so, a few times, is nobody at all."""
    questions = _Questions(dialer, session_id)
    with trio.move_on_after(deadlines.resolve):
        while True:
            found = await questions.once(deadlines.resolve / 2)
            if found.settled or found.fate is Fate.UNKNOWN or (found.fate is None and questions.asked >= TRIES):
                break
            await trio.sleep(ASK_AGAIN_S)
    return questions.found


async def ask_for_verdict(link: Link, dialer: Dialer, session_id: bytes, deadlines: Deadlines) -> Finding:
    """Send COMMIT and find out what came of it. Shielded; takes at most ``commit``, and ``LAST_LOOK_S`` more."""
    patience_s = min(deadlines.commit / 4, PATIENCE_S)
    wait = _Wait(link, _Questions(dialer, session_id), max(deadlines.commit / 4, LAST_LOOK_S))
    with trio.CancelScope(shield=True):
        found = await wait.race(deadlines.commit, patience_s, Commit(session_id))
        if found is None:
            logger.warning("no verdict within commit: a last look")
            found = await wait.race(LAST_LOOK_S, 0)
    if found is not None:
        return found
    last = wait.questions.found
    return Finding(last.fate, f"no verdict within {deadlines.commit:g} s after COMMIT: {last.reason}")


@attrs.define(eq=False)
class _Wait:
    """For a verdict, on the link and by questions at once."""

    link: Link
    questions: _Questions
    each_s: float
    link_over: trio.Event = attrs.field(factory=trio.Event)

    async def race(self, limit_s: float, patience_s: float, commit: Commit | None = None) -> Finding | None:
        """Send ``commit``, listen, and ask after ``patience_s`` or when the link breaks. None: neither brought any."""
        found: Finding | None = None

        async def listen() -> None:
            nonlocal found
            if self.link_over.is_set():
                return
            try:
                found = await self._listen(commit)
            except (MigrationError, DeadlineError) as error:
                logger.warning("no answer to COMMIT (%s): asking for the verdict on a new connection", error)
                self.link_over.set()
            else:
                nursery.cancel_scope.cancel()

        async def question() -> None:
            nonlocal found
            with trio.move_on_after(patience_s):
                await self.link_over.wait()
            answer = await self.questions.until_settled(self.each_s)
            found = found or answer
            nursery.cancel_scope.cancel()

        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                nursery.start_soon(question)
        return found

    async def _listen(self, commit: Commit | None) -> Finding:
        if commit is not None:
            try:
                await self.link.send(commit)
            except LinkLost as error:
                logger.info("%s: what the peer said before it left still counts", error)
        match await self.link.receive():
            case Running():
                return Finding(Fate.RUNNING)
            case Refused(reason) | Abort(reason):
                return Finding(Fate.REFUSED, reason)
            case other:  # pragma: no cover - the step table's
                raise ProtocolError(f"{type(other).__name__} after COMMIT")


async def say_done(link: Link, dialer: Dialer, session_id: bytes) -> None:
    """Tell the destination that its verdict was heard, so that it can stop waiting for questions. A courtesy: unheard,
    it goes on waiting. A verdict that was asked for has been thanked for already.

    A link that has carried RUNNING may lose DONE, silently. So it is looked whether the destination, which closes its
    listener before the link, still listens; then it is asked once more, and thanked there."""
    if link.state not in (SessionState.RUNNING, SessionState.REFUSED):
        return
    with trio.move_on_after(2 * FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
        with trio.move_on_after(FAREWELL_S), suppress(MigrationError, DeadlineError):
            await link.send(Done())
            await link.connection.receiver.receive()
        await _ask(dialer, session_id)


async def _ask(dialer: Dialer, session_id: bytes) -> Verdict:
    link = await open_control(dialer, session_id)
    try:
        await link.send(Query())
        answer = await link.expect(Verdict)
        if answer.fate.settled:
            # Shielded: it is given once, and who is cancelled while saying thanks has heard it.
            with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
                await link.send(Done())
        return answer
    finally:
        with trio.move_on_after(FAREWELL_S, shield=True):
            await link.close()
