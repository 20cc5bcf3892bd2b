"""The destination's side: :func:`open_receiver` listens, :meth:`Receiver.receive` takes one machine in.

Only the first connection that says SETUP is served; strangers are told so and disturb nothing. Nothing runs before
COMMIT. From COMMIT to the verdict the receiver is shielded, bounded by the ``commit`` deadline. A destination that was
ready to run and fails before it saw COMMIT has the verdict *refused*: a promise that it never ran and never will.

Then it keeps its listener to answer a source whose link died or went silent (QUERY), until the source says that it
heard the verdict (DONE), or that it never sent COMMIT (ABORT). How a link ends says nothing: a middle box closes it in
good order with COMMIT in flight. A source that says neither may be in doubt, and its operator ask any time later:

- where the machine runs, the listener stays in ``nursery``, the machine's own: as long as that machine is there;
- where it does not, in ``answering``, for twice as long as a source asks (``commit``, and a last look).

A new receiver of this process at the same address takes it over, and answers for every session that this process has
settled and nobody has said DONE to.

The machine that the factory built belongs to whoever passed the factory: when ``receive`` raises, they destroy it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import CommitRefused, DeadlineError, MigrationError, MigrationInDoubt, ProtocolError, TrivmmError
from trivmm.migration.link.control import FAREWELL_S, Link
from trivmm.migration.link.halves import Channel, LinkLost
from trivmm.migration.link.roles import greeted
from trivmm.migration.link.transports import Listener, listen, parse_url
from trivmm.migration.pages.land import Landing
from trivmm.migration.port import DestinationFactory, DestinationMachine
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase, Round, Tracker
from trivmm.migration.wire.frame import MessageType
from trivmm.migration.wire.messages import (
    Abort,
    Commit,
    Done,
    Message,
    Query,
    Ready,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    Setup,
    SetupFail,
    SetupOk,
    State,
    Undo,
    Undone,
    Verdict,
)
from trivmm.migration.wire.session import LAST_LOOK_S, Session, SessionState

__all__ = ["Receiver", "open_receiver"]

logger = logging.getLogger(__name__)
MAX_STRANGERS: Final = 16  # greeted at once; the next one is closed at sight
MAX_SETTLED: Final = 64  # sessions that nobody said DONE to: each is a source that died, or may be in doubt
RESUME_MS: Final = 1.0  # from COMMIT to RUNNING, the way aside: locks, sinks and a kick; all else was done by READY

# Receivers of this process that only answer questions any more, by address: the next one takes the address over.
_LINGERING: Final[dict[str, Receiver]] = {}
_SETTLED: Final[dict[bytes, Verdict]] = {}  # this process's verdicts, by session, until DONE; the latest


@asynccontextmanager
async def open_receiver(
    url: str, deadlines: Deadlines, nursery: trio.Nursery, answering: trio.Nursery | None = None
) -> AsyncIterator[Receiver]:
    """Listen at ``url``. ``nursery`` should live as long as the machine that comes, ``answering`` (the same, unless
    given) as long as questions are answered. Cancelling them is safe for everybody but a source in doubt.

    :raises ConfigError: (``receiver_url``) when the address is no good, or in use.
    """
    address = parse_url(url, "receiver_url")
    earlier = _LINGERING.pop(str(address), None)
    if earlier is not None:
        earlier.hand_over()
    listener = await listen(address, deadlines)
    receiver = Receiver(listener, deadlines, nursery, answering or nursery)
    try:
        yield receiver
    finally:
        receiver.close()


@attrs.define(eq=False)
class Receiver:
    """One listener, one migration."""

    listener: Listener
    deadlines: Deadlines
    nursery: trio.Nursery
    answering: trio.Nursery = attrs.field(default=attrs.Factory(lambda self: self.nursery, takes_self=True))
    _first: tuple[Link, bytes, Setup] | None = None
    _came: trio.Event = attrs.field(factory=trio.Event)
    _turned_away: list[str] = attrs.field(factory=list)
    _greeting: int = 0
    _verdict: Verdict | None = None  # None: not settled yet
    _serving: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _door: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _lingers: bool = False
    _lingering: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _used: bool = False
    refuse: Callable[[], str | None] = attrs.field(default=lambda: None, init=False)
    """Asked in the moment in which COMMIT is read: why it is refused; None: it is not."""

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self.listener.url

    def hand_over(self) -> None:
        """Stop answering at once, for a new receiver at the same address, which goes on with it."""
        self._lingering.cancel()
        self.listener.close()

    def close(self) -> None:
        """Stop listening, unless questions are still answered: they close the listener at their end."""
        if not self._lingers:
            self.listener.close()

    async def receive(
        self,
        factory: DestinationFactory,
        progress: Callable[[MigrationProgress], None] | None = None,
    ) -> tuple[DestinationMachine, MigrationReport]:
        """Wait for a source, build its machine, take its pages and state, and run it. Call once.

        :raises DeadlineError: nobody came (accept), or the source went silent (handshake, stall, commit).
        :raises ConfigError: this host can't build the machine; the source was told.
        :raises ProtocolError: or :raises MigrationError: the source talked nonsense, died or gave up.
        :raises CommitRefused: the locks could not be had, or ``refuse`` said so: the source was told and runs.
        :raises MigrationInDoubt: the start outlived the ``commit`` deadline.
        """
        if self._used:
            raise MigrationError(f"{self.url}: this receiver was used already; open another")
        self._used = True
        tracker = Tracker()
        if progress is not None:
            tracker.callback = progress
        result: DestinationMachine | Exception | None = None
        self.answering.start_soon(self._keep_door)
        # The guard is shielded at COMMIT, together with everything inside: from there a verdict is certain.
        with trio.CancelScope() as guard:
            try:
                result = await self._serve(factory, tracker, guard)
            except Exception as error:
                result = error
            finally:
                if not self._lingers:
                    self._door.cancel()
        if result is None:
            # Cancelled, and the guard's shield made its end absorb that: out here the cancellation shows again.
            await trio.lowlevel.checkpoint()
            raise MigrationError("discarded")
        if isinstance(result, Exception):
            raise result
        return result, tracker.report()

    # --- the one session -----------------------------------------------------------------------------------------

    async def _serve(
        self, factory: DestinationFactory, tracker: Tracker, guard: trio.CancelScope
    ) -> DestinationMachine:
        with self.deadlines.enter("accept", self._nobody):
            await self._came.wait()
        assert self._first is not None
        link, session_id, setup = self._first
        tracker.session, tracker.transport = session_id.hex(), self.url.partition(":")[0]
        tracker.memory_bytes = sum(size for _, size in setup.memory)
        session = _Incoming(self, link, session_id, setup, tracker, guard)
        try:
            with self._serving:
                return await session.run(factory)
            assert self._verdict is not None
            raise MigrationError(f"discarded: {self._verdict.reason}")
        except BaseException as error:
            reason = str(error) if isinstance(error, Exception) else "the destination was cancelled"
            tracker.reason = reason
            # Ready, a COMMIT may be on its way, however the link ended: that source will ask, and gets a promise.
            could_commit = link.state in (SessionState.READY, SessionState.COMMITTED, SessionState.REFUSED)
            verdict = self._verdict
            if verdict is None:
                verdict = Verdict("unknown" if isinstance(error, MigrationInDoubt) else "refused", reason)
                self._settle(verdict, remember=could_commit)
            if tracker.phase is not Phase.IN_DOUBT:
                cancelled = not isinstance(error, Exception) and tracker.phase is not Phase.COMMIT
                tracker.enter(Phase.CANCELLED if cancelled else Phase.FAILED)
            aborted = link.state is SessionState.READY
            if aborted:
                with trio.move_on_after(2 * FAREWELL_S, shield=True):
                    await link.say_abort(reason)
            elif link.state is SessionState.COMMITTED:
                if verdict.verdict == "refused":
                    with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
                        await link.send(Refused(reason))
            else:
                with trio.move_on_after(2 * FAREWELL_S, shield=True):
                    await link.abort(reason)
            if could_commit:
                self._linger(link, self.answering, 2 * (self.deadlines.commit + LAST_LOOK_S))
            raise

    def _nobody(self) -> str:
        if not self._turned_away:
            return f"{self.url}: no source came"
        return f"{self.url}: {len(self._turned_away)} came, none with a migration; the last: {self._turned_away[-1]}"

    def _settle(self, verdict: Verdict, *, remember: bool = True) -> None:
        """Decide, once; only then may anybody be told. ``remember``: the source may have sent COMMIT."""
        assert self._first is not None
        assert self._verdict is None
        self._verdict = verdict
        if remember:
            _SETTLED[self._first[1]] = verdict
            while len(_SETTLED) > MAX_SETTLED:
                del _SETTLED[next(iter(_SETTLED))]

    def _heard(self, session: bytes) -> None:
        """The source knows: nobody will ask about that session again."""
        _SETTLED.pop(session, None)
        if self._first is not None and self._first[1] == session:
            self._lingering.cancel()

    def _linger(self, link: Link, nursery: trio.Nursery, seconds: float) -> None:
        """Answer questions for so long, there."""
        try:
            nursery.start_soon(self._answer_questions, link, seconds)
        except RuntimeError:  # that nursery is closed already: nobody will answer
            return
        self._lingers = True
        _LINGERING[self.url] = self

    async def _answer_questions(self, link: Link, seconds: float) -> None:
        """The door stays open."""
        try:
            self._lingering.deadline = trio.current_time() + seconds
            with self._lingering:
                await self._until_done(link)
                await trio.sleep_forever()
        finally:
            if _LINGERING.get(self.url) is self:
                del _LINGERING[self.url]
            self._door.cancel()
            self.listener.close()
            with trio.move_on_after(FAREWELL_S, shield=True):
                await link.close()

    async def _until_done(self, link: Link) -> None:
        """DONE ends the waiting, and so does an ABORT that crossed ours: that source never sent COMMIT. No end of the
        link does, nor any silence: they are what the waiting is for."""
        assert self._first is not None
        try:
            while True:
                with suppress(DeadlineError):
                    if (await link.channel.receive(None)).type in (MessageType.DONE, MessageType.ABORT):
                        break
        except MigrationError:
            await link.close()
        else:
            self._heard(self._first[1])

    # --- strangers -----------------------------------------------------------------------------------------------

    async def _keep_door(self) -> None:
        """Open from the begin of :meth:`receive` to its end, or to that of the questions: one that comes in between
        finds no gap."""
        with self._door:
            async with trio.open_nursery() as strangers:
                await self._accept_strangers(strangers)

    async def _accept_strangers(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                channel = await self.listener.accept()
            except trio.ClosedResourceError:
                return  # closed by its owner, or handed over
            if self._greeting >= MAX_STRANGERS:
                await channel.aclose()
                continue
            self._greeting += 1
            nursery.start_soon(self._greet, channel)

    async def _greet(self, channel: Channel) -> None:
        link = Link(channel, Session(source=False))
        keep = False
        try:
            with self.deadlines.enter("handshake", f"{channel.name}: connected and said nothing useful"):
                hello = await greeted(link)
                message = await link.receive()
            if isinstance(message, Query):
                with self.deadlines.enter("handshake", f"{channel.name}: takes no answer"):
                    await self._reply(link, hello.session)
            elif isinstance(message, Setup) and self._first is None and not self._lingers:
                self._first = link, hello.session, message
                keep = True
                self._came.set()
            else:
                raise ProtocolError("a migration is under way here already")
        except (MigrationError, DeadlineError) as error:
            logger.info("%s: turned away: %s", channel.name, error)
            self._turned_away.append(str(error))
            del self._turned_away[:-MAX_STRANGERS]
            await link.abort(str(error))
        finally:
            self._greeting -= 1
            if not keep:
                with trio.move_on_after(FAREWELL_S, shield=True):
                    await channel.aclose()

    async def _reply(self, link: Link, session: bytes) -> None:
        verdict = self._answer(session)
        await link.send(verdict)
        if verdict.verdict not in ("running", "refused"):
            return
        with suppress(LinkLost):
            await link.expect(Done)
            self._heard(session)

    def _answer(self, session: bytes) -> Verdict:
        """What was decided. Asked before COMMIT was read, this is the decision: it never counts any more (``verdict``
        says why that is safe while the source listens on)."""
        if self._first is None or self._first[1] != session:
            return _SETTLED.get(session) or Verdict("unknown", "no such session here")
        if self._verdict is None and self._first[0].state is SessionState.READY:
            self._settle(Verdict("refused", "the source asked before COMMIT came"))
            self._serving.cancel()
        return self._verdict or Verdict("pending", "the destination has not settled it yet")


@attrs.define(eq=False)
class _Incoming:
    """The session that won: from SETUP to a running machine."""

    owner: Receiver
    link: Link
    session_id: bytes
    setup: Setup
    tracker: Tracker
    guard: trio.CancelScope
    _round_start: tuple[float, int, int, int] = (0.0, 0, 0, 0)

    @property
    def deadlines(self) -> Deadlines:
        return self.owner.deadlines

    async def run(self, factory: DestinationFactory) -> DestinationMachine:
        machine = await self._build(factory)
        landing = Landing(machine.memory)
        with self.deadlines.enter("intake", "the source sends and sends, and does not come to an end"):
            await self.link.send(SetupOk(RESUME_MS))
            self.tracker.enter(Phase.PRECOPY)
            while not isinstance(message := await self._next(landing), Commit):
                await self._handle(machine, message, landing)
        return await self._commit(machine, message)

    async def _build(self, factory: DestinationFactory) -> DestinationMachine:
        try:
            machine = await factory(self.setup.machine)
            ours = tuple((region.gpa, region.size) for region in machine.memory.regions)
            if ours != self.setup.memory:
                raise MigrationError(f"the memory layouts differ: {ours} here, {self.setup.memory} there")
        except TrivmmError as error:
            with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
                await self.link.send(SetupFail(str(error)))
            raise
        return machine

    async def _next(self, landing: Landing) -> Message:
        def report() -> None:
            counts, tracker = landing.counts, self.tracker
            tracker.bytes_sent, tracker.pages, tracker.zero_pages = counts.bytes, counts.pages, counts.zero_pages
            tracker.push()

        if self.link.state is SessionState.READY:
            with self.deadlines.enter("commit", "ready to run, but no COMMIT came: the destination discards itself"):
                return await self.link.receive()
        message = await self.link.receive(landing, report)
        report()
        return message

    async def _handle(self, machine: DestinationMachine, message: Message, landing: Landing) -> None:
        match message:
            case RoundEnd(number, pages):
                landed = landing.counts.pages + landing.counts.zero_pages
                if landed != pages:
                    raise ProtocolError(f"round {number} ends with {landed} pages landed, {pages} were sent")
                self._close_round(number)
                await self.link.send(RoundAck(number))
            case State(state):
                self.tracker.enter(Phase.SWITCHOVER)
                start = trio.current_time()
                await machine.load(state)
                await self.link.send(Ready(RESUME_MS, (trio.current_time() - start) * 1000))
            case Undo():
                await self.link.send(Undone())
                if self.tracker.phase is Phase.SWITCHOVER:
                    self.tracker.enter(Phase.PRECOPY)
            case Abort() | _:  # pragma: no cover - the step table's
                raise ProtocolError(f"{type(message).__name__} has no meaning here")

    def _close_round(self, number: int) -> None:
        tracker = self.tracker
        start_s, moved, pages, zero = self._round_start
        now = tracker.elapsed_s
        if number != tracker.round:  # a second barrier of the same round only measures
            tracker.round = number
            tracker.add_round(
                Round(
                    number,
                    start_s,
                    now - start_s,
                    tracker.bytes_sent - moved,
                    tracker.pages - pages,
                    tracker.zero_pages - zero,
                )
            )
        self._round_start = now, tracker.bytes_sent, tracker.pages, tracker.zero_pages

    async def _commit(self, machine: DestinationMachine, message: Commit) -> DestinationMachine:
        self.guard.shield = True  # no await since COMMIT was read: nothing can be cancelled in between
        if message.session != self.session_id:
            raise ProtocolError("COMMIT of another session")
        if self.owner._verdict is not None:  # a question was answered in this very moment: that answer stands
            raise MigrationError(f"discarded: {self.owner._verdict.reason}")
        if why := self.owner.refuse():
            raise CommitRefused(f"not run here: {why}")
        self.tracker.enter(Phase.COMMIT)
        start = trio.current_time()
        starting = False
        try:
            with self.deadlines.enter("commit", "taking the locks and starting the machine"):
                await machine.take_locks()
                starting = True
                await machine.start()
        except Exception as error:
            if starting and isinstance(error, DeadlineError) and error.name == "commit":
                self.tracker.enter(Phase.IN_DOUBT)
                raise MigrationInDoubt(f"the machine's start did not end ({error}): it may have run") from error
            raise CommitRefused(f"not run here: {error}; the source is told so") from error
        self.owner._settle(Verdict("running", ""))
        resume_ms = (trio.current_time() - start) * 1000
        with suppress(MigrationError, DeadlineError):  # unheard, the source asks
            await self.link.send(Running(resume_ms))
        self.tracker.enter(Phase.DONE)
        self.owner._linger(self.link, self.owner.nursery, math.inf)
        return machine
