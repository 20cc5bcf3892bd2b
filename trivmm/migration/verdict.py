"""From COMMIT to a verdict: exactly one side runs the machine, or an operator is asked.

After COMMIT the source never runs by itself again. RUNNING means that the destination does; REFUSED (or an ABORT that
crossed COMMIT) is its promise that it never did and never will. A link that dies in between proves nothing: the
source dials again and asks by session id, until the ``commit`` deadline makes *in doubt* the verdict.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, MigrationError, ProtocolError
from trivmm.migration.channel import LinkLost
from trivmm.migration.link import FAREWELL_S, Link
from trivmm.migration.messages import Abort, Commit, Done, Query, Refused, Running, Verdict
from trivmm.migration.steps import Session
from trivmm.migration.transports import Dialer

__all__ = ["Outcome", "ask_for_verdict", "say_done"]

LOG: Final = logging.getLogger(__name__)
ASK_AGAIN_S: Final = 0.1  # between two questions while the destination is still busy, or not reachable


@attrs.frozen
class Outcome:
    """``running`` True: the destination runs. False: it never did (``reason``). None: nobody knows."""

    running: bool | None
    reason: str = ""


async def ask_for_verdict(link: Link, dialer: Dialer, session_id: bytes, deadlines: Deadlines) -> Outcome:
    """Send COMMIT and find out what came of it. Shielded; takes at most the ``commit`` deadline."""
    with trio.move_on_after(deadlines.commit, shield=True):
        try:
            return await _commit(link, session_id)
        except (MigrationError, DeadlineError) as error:
            LOG.warning("no answer to COMMIT (%s): asking for the verdict on a new connection", error)
        await link.close()
        while True:
            try:
                outcome = await _ask(dialer, session_id)
            except (MigrationError, DeadlineError) as error:
                LOG.info("no verdict yet: %s", error)
            else:
                if outcome is not None:
                    return outcome
            await trio.sleep(ASK_AGAIN_S)
    return Outcome(None, f"no verdict within {deadlines.commit:g} s after COMMIT")


async def _commit(link: Link, session_id: bytes) -> Outcome:
    try:
        await link.send(Commit(session_id))
    except LinkLost as error:
        LOG.info("%s: what the peer said before it left still counts", error)
    match await link.receive():
        case Running():
            outcome = Outcome(True)
        case Refused(reason) | Abort(reason):
            outcome = Outcome(False, reason)
        case other:  # pragma: no cover - the step table's
            raise ProtocolError(f"{type(other).__name__} after COMMIT")
    return outcome


async def say_done(link: Link) -> None:
    """Tell the destination that its verdict was heard, so that it can stop waiting for questions. A courtesy."""
    with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
        await link.send(Done())  # unheard, it waits until its own deadline


async def _ask(dialer: Dialer, session_id: bytes) -> Outcome | None:
    channel = await dialer.dial()
    link = Link(channel, Session(source=True))
    try:
        await link.send(Query(session_id))
        answer = await link.expect(Verdict)
    finally:
        with trio.move_on_after(FAREWELL_S, shield=True):
            await link.close()
    if answer.verdict == "running":
        return Outcome(True)
    if answer.verdict == "refused":
        return Outcome(False, answer.reason)
    return None
