"""The session that was let in: from SETUP to a running machine, and what is owed to its source when that fails.

Nothing runs before COMMIT. From COMMIT to the verdict the intake is shielded, bounded by the ``commit`` deadline. A
destination that was ready to run and fails before it saw COMMIT has the verdict *refused*: a promise that it never ran
and never will. :data:`ENDS` says what a failure means in each phase.

The verdict is decided here, once, and written down before anybody is told. The source's question while COMMIT may be on
its way is such a decision (``source.verdict`` says why that is safe while it listens on).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import CommitRefused, DeadlineError, MigrationError, MigrationInDoubt, ProtocolError, TrivmmError
from trivmm.migration.destination.door import PENDING, Arrival, Door
from trivmm.migration.link.control import FAREWELL_S, Link
from trivmm.migration.link.roles import LandingLink
from trivmm.migration.pages.land import MemfdLanding, PageSink
from trivmm.migration.pages.send import PageCounts
from trivmm.migration.port import DestinationFactory, DestinationMachine
from trivmm.migration.progress import Phase, Round, Tracker
from trivmm.migration.wire.messages import (
    Commit,
    Fate,
    Message,
    Ready,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    SetupFail,
    SetupOk,
    State,
    Undo,
    Undone,
    Verdict,
)
from trivmm.migration.wire.session import LAST_LOOK_S, SessionState

__all__ = ["Intake"]

RESUME_MS: Final = 1.0  # from COMMIT to RUNNING, the way aside: locks, sinks and a kick; all else was done by READY


class IntakePhase(enum.Enum):
    """What a failure now would mean for the source."""

    TAKING = "taking"  # the machine is built, its pages and state come: no COMMIT can be on its way
    READY = "ready"  # READY was said: COMMIT may be on its way, however the link ends
    COMMITTED = "committed"  # COMMIT was read, and nothing has run yet
    IN_DOUBT = "in doubt"  # its start did not end: it may have run


PHASES: Final = {SessionState.READY: IntakePhase.READY, SessionState.COMMITTED: IntakePhase.COMMITTED}


class Say(enum.Enum):
    ABORT = "abort"  # or DONE, to a source that has left and said so
    REFUSED = "refused"
    NOTHING = "nothing"


@attrs.frozen
class End:
    """What a failure comes to: the verdict, what the source is told on its link, and whether it may ask later. Only
    where a COMMIT may have been sent will anybody ask; else the link is closed, and that is all."""

    fate: Fate
    say: Say
    stays: bool


ENDS: Final = {
    IntakePhase.TAKING: End(Fate.REFUSED, Say.ABORT, stays=False),
    IntakePhase.READY: End(Fate.REFUSED, Say.ABORT, stays=True),
    IntakePhase.COMMITTED: End(Fate.REFUSED, Say.REFUSED, stays=True),
    IntakePhase.IN_DOUBT: End(Fate.UNKNOWN, Say.NOTHING, stays=True),
}


@attrs.define(eq=False)
class Intake:
    """``nursery`` is the machine's own: there it is answered for one that runs. ``refuse`` is asked in the moment in
    which COMMIT is read: why it is refused; None: it is not."""

    arrival: Arrival
    door: Door
    nursery: trio.Nursery
    refuse: Callable[[], str | None]
    tracker: Tracker
    deadlines: Deadlines
    _verdict: Verdict | None = attrs.field(default=None, init=False)  # None: not settled yet
    _serving: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _may_have_run: bool = attrs.field(default=False, init=False)
    _page_links: tuple[LandingLink, ...] = attrs.field(default=(), init=False)
    _round_start: tuple[float, int, int, int] = attrs.field(default=(0.0, 0, 0, 0), init=False)

    @property
    def link(self) -> Link:
        return self.arrival.link

    @property
    def phase(self) -> IntakePhase:
        if self._may_have_run:
            return IntakePhase.IN_DOUBT
        return PHASES.get(self.link.state, IntakePhase.TAKING)

    # --- the verdict ---------------------------------------------------------------------------------------------

    def _settle(self, verdict: Verdict, *, stays: bool = True) -> None:
        """Decide, once; only then may anybody be told. ``stays``: somebody may ask."""
        assert self._verdict is None
        self._verdict = verdict
        if stays:
            self.door.verdicts.settle(self.arrival.session_id, verdict)

    def question(self) -> Verdict:
        """What was decided. Asked before COMMIT was read, this is the decision: it never counts any more."""
        if self._verdict is None and self.phase is IntakePhase.READY:
            self._settle(Verdict(Fate.REFUSED, "the source asked before COMMIT came"))
            self._serving.cancel()
        return self._verdict or PENDING

    # --- from SETUP to the verdict -------------------------------------------------------------------------------

    async def run(self, factory: DestinationFactory, guard: trio.CancelScope) -> DestinationMachine:
        """``guard`` is shielded at COMMIT: from there a verdict is certain. Raises as ``Receiver.receive``."""
        setup, tracker = self.arrival.setup, self.tracker
        tracker.session, tracker.transport = self.arrival.session_id.hex(), self.door.url.partition(":")[0]
        tracker.memory_bytes = sum(size for _, size in setup.memory)
        self.door.question = self.question
        try:
            with self._serving:
                return await self._take_in(factory, guard)
            assert self._verdict is not None
            raise MigrationError(f"discarded: {self._verdict.reason}")
        except BaseException as error:
            await self._fail(error)  # noqa: ASYNC102 - shielded and bounded inside
            raise

    async def _fail(self, error: BaseException) -> None:
        phase = self.phase
        end, cancelled = ENDS[phase], not isinstance(error, Exception)
        self.tracker.reason = reason = "the destination was cancelled" if cancelled else str(error)
        if self._verdict is None:
            self._settle(Verdict(end.fate, reason), stays=end.stays)
        if phase is IntakePhase.IN_DOUBT:
            self.tracker.enter(Phase.IN_DOUBT)
        else:
            self.tracker.enter(Phase.CANCELLED if cancelled and phase is not IntakePhase.COMMITTED else Phase.FAILED)
        if end.say is Say.ABORT:
            await self.link.say_abort(reason)
        elif end.say is Say.REFUSED:
            with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
                await self.link.send(Refused(reason))
        if end.stays:
            self.door.stay(self.door.verdicts.nursery, 2 * (self.deadlines.commit + LAST_LOOK_S))
        else:
            await self.link.close()

    async def _take_in(self, factory: DestinationFactory, guard: trio.CancelScope) -> DestinationMachine:
        machine = await self._build(factory)
        landing = MemfdLanding(machine.memory)
        self._page_links = (LandingLink(PageSink(landing, report=self._report)),)  # this version's: over CONTROL
        with self.deadlines.enter("intake", "the source sends and sends, and does not come to an end"):
            await self.link.send(SetupOk(RESUME_MS))
            self.tracker.enter(Phase.PRECOPY)
            while not isinstance(message := await self._next(), Commit):
                await self._handle(machine, message)
        guard.shield = True  # no await since COMMIT was read: nothing can be cancelled in between
        return await self._commit(machine, message)

    async def _build(self, factory: DestinationFactory) -> DestinationMachine:
        setup = self.arrival.setup
        try:
            machine = await factory(setup.machine)
            ours = tuple((region.gpa, region.size) for region in machine.memory.regions)
            if ours != setup.memory:
                raise MigrationError(f"the memory layouts differ: {ours} here, {setup.memory} there")
        except TrivmmError as error:
            with trio.move_on_after(FAREWELL_S, shield=True), suppress(MigrationError, DeadlineError):
                await self.link.send(SetupFail(str(error)))
            raise
        return machine

    def _report(self) -> None:
        total, tracker = PageCounts(), self.tracker
        for each in self._page_links:
            total.add(each.sink.counts)
        tracker.bytes_sent, tracker.pages, tracker.zero_pages = total.bytes, total.pages, total.zero_pages
        tracker.push()

    async def _next(self) -> Message:
        if self.phase is IntakePhase.READY:
            with self.deadlines.enter("commit", "ready to run, but no COMMIT came: the destination discards itself"):
                return await self.link.receive()
        (carrier,) = self._page_links
        message = await self.link.receive(carrier.sink)
        self._report()
        if isinstance(message, RoundEnd):
            carrier.end_round(message)
        return message

    async def _handle(self, machine: DestinationMachine, message: Message) -> None:
        match message:
            case RoundEnd(number):
                if len({each.ended for each in self._page_links}) == 1:  # on every page link
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
            case _:  # pragma: no cover - the session's table has nothing else
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
        if message.session != self.arrival.session_id:
            raise ProtocolError("COMMIT of another session")
        if self._verdict is not None:  # a question was answered in this very moment: that answer stands
            raise MigrationError(f"discarded: {self._verdict.reason}")
        if why := self.refuse():
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
                self._may_have_run = True
                raise MigrationInDoubt(f"the machine's start did not end ({error}): it may have run") from error
            raise CommitRefused(f"not run here: {error}; the source is told so") from error
        self._settle(Verdict(Fate.RUNNING, ""))
        resume_ms = (trio.current_time() - start) * 1000
        with suppress(MigrationError, DeadlineError):  # unheard, the source asks
            await self.link.send(Running(resume_ms))
        self.tracker.enter(Phase.DONE)
        self.door.stay(self.nursery, math.inf)
        return machine
