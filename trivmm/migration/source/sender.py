"""The source's side: :func:`send` moves a running machine to whoever listens at a URL.

It runs in its caller's task, which holds the VM's lease. Whatever happens before COMMIT (peer killed, silent or
talking nonsense, a deadline, a cancellation) ends with the source running, then the throttle at 0 and the dirty log
off, the locks held and a named error; after COMMIT it is shielded until there is a verdict, which takes at most the
``commit`` deadline. How: ``plan`` (what next), ``precopy`` (rounds), ``switchover`` (downtime), ``verdict`` (commit).
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable
from typing import Final, NoReturn

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import CommitRefused, DeadlineError, MigrationError, MigrationInDoubt
from trivmm.migration.link.control import FAREWELL_S, Link
from trivmm.migration.link.roles import PageLink, open_control
from trivmm.migration.link.transports import Dialer, SocketDialer, parse_url
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.migration.port import SourceMachine
from trivmm.migration.progress import Downtime, MigrationProgress, MigrationReport, Phase, Tracker
from trivmm.migration.source.disks import DiskFlushes
from trivmm.migration.source.plan import NO_LIMIT, Estimates, Plan, Step
from trivmm.migration.source.precopy import Rounds
from trivmm.migration.source.switchover import Switchover
from trivmm.migration.source.verdict import Finding, ask_for_verdict, say_done
from trivmm.migration.wire.messages import SESSION_BYTES, Fate, Setup, SetupFail, SetupOk, prepare_messages

__all__ = ["send", "socket_dialer"]

logger = logging.getLogger(__name__)
IDLE_S: Final = 0.05  # between rounds with next to nothing to send


def socket_dialer(url: str, deadlines: Deadlines) -> Dialer:
    """How a destination is reached. :raises ConfigError: (``destination_url``) a URL that can't be one."""
    return SocketDialer(parse_url(url, "destination_url"), deadlines)


async def send(
    source: SourceMachine,
    dialer: Dialer,
    options: SendOptions | None = None,
    progress: Callable[[MigrationProgress], None] | None = None,
) -> MigrationReport:
    """Move ``source`` to the receiver that ``dialer`` reaches. On return the destination runs it; the source stays
    stopped, its dirty log on: it is closed next.

    :raises ConfigError: a machine that the destination can't build.
    :raises MigrationError: or :raises DeadlineError: failed before COMMIT; the source runs.
    :raises CommitRefused: the destination refused at the last moment; the source runs.
    :raises MigrationInDoubt: nobody knows; the source stays stopped, without its locks.
    """
    prepare_messages()
    options = options or SendOptions()
    session_id = secrets.token_bytes(SESSION_BYTES)
    limit_ms = options.downtime_ms or source.deadlines.downtime * 1000
    size = sum(region.size for region in source.memory.regions)
    tracker = Tracker(session=session_id.hex(), transport=dialer.transport, memory_bytes=size, limit_ms=limit_ms)
    if progress is not None:
        tracker.callback = progress
    tracker.push()
    return await _Sender(source, dialer, options, tracker, session_id).run()


@attrs.define(eq=False)
class _Sender:
    source: SourceMachine
    dialer: Dialer
    options: SendOptions
    tracker: Tracker
    session_id: bytes
    _link: Link | None = None
    _switchover: Switchover | None = None

    @property
    def _limit_s(self) -> float:
        asked = self.options.downtime_ms
        return self.source.deadlines.downtime if asked is None else asked / 1000

    @property
    def _timeout_s(self) -> float:
        asked = self.options.timeout_s
        return self.source.deadlines.migration if asked is None else asked

    async def run(self) -> MigrationReport:
        limits = self.source.deadlines
        try:
            switchover = await self._up_to_commit()
        except BaseException as error:
            with trio.move_on_after(limits.rollback + limits.kernel + 4 * FAREWELL_S, shield=True) as scope:
                await self._roll_back(error)
            if scope.cancelled_caught:  # pragma: no cover - each of its waits has a smaller bound
                logger.error("rolling back a migration did not end in time")
            raise
        try:
            # No await between here and the shield: a cancellation comes before COMMIT, or after the verdict.
            return await self._commit(switchover)
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded: kernel
                await self._let_go()
            raise

    async def _let_go(self) -> None:
        """Throttle 0, dirty log off: nothing of a migration slows the guest any more. It runs by now, where it may: the
        log waits for the kernel. Of no use to a source that moved away and is closed next. Never raises."""
        try:
            self.source.set_throttle(0)
        except Exception:
            logger.exception("taking the throttle off after a migration")
        try:
            await self.source.dirty_log.stop()
        except Exception:
            logger.exception("stopping the dirty log after a migration")

    # --- up to COMMIT --------------------------------------------------------------------------------------------

    async def _up_to_commit(self) -> Switchover:
        deadline = trio.current_time() + self._timeout_s
        cancel = self.options.timeout_strategy is TimeoutStrategy.CANCEL
        with trio.CancelScope(deadline=deadline if cancel else math.inf) as scope:
            link, resume_ms = await self._set_up()
            estimates = Estimates(resume_ms=resume_ms)
            plan = Plan(self._limit_s, deadline, not cancel, estimates)
            page_links = (PageLink(link),)  # this version's: over CONTROL
            rounds = Rounds(self.source, link, page_links, self.tracker, estimates)
            self._switchover = switchover = Switchover(self.source, link, self.tracker, rounds)
            if self.source.live_copy:
                await self._precopy(plan, switchover, rounds)
            else:
                await self._stop_and_copy(switchover, rounds)
            # Who cancelled before COMMIT was told that it can be: no last await has swallowed that.
            await trio.lowlevel.checkpoint_if_cancelled()
            return switchover
        if scope.cancelled_caught:
            raise DeadlineError("migration", self._timeout_s, f"{self._where()}; the source goes on")
        raise AssertionError("unreachable")  # pragma: no cover

    def _where(self) -> str:
        tracker = self.tracker
        expected = f", {tracker.estimated.total_ms:.0f} ms of downtime expected" if tracker.estimated else ""
        return (
            f"the migration is in phase {tracker.phase.value}, round {tracker.round}, "
            f"{tracker.remaining_pages} pages left{expected}"
        )

    async def _set_up(self) -> tuple[Link, float]:
        """And the destination's guess of its time to resume, in milliseconds."""
        self._link = link = await open_control(self.dialer, self.session_id)
        memory = tuple((region.gpa, region.size) for region in self.source.memory.regions)
        with self.source.deadlines.enter("handshake", f"{link.name}: the receiver does not answer SETUP"):
            await link.send(Setup(self.source.describe(), memory))
            answer = await link.receive()
        if isinstance(answer, SetupFail):
            raise MigrationError(f"{link.name}: the destination can't build this machine: {answer.reason}")
        assert isinstance(answer, SetupOk)  # the step table has nothing else
        self.tracker.enter(Phase.PRECOPY)
        return link, answer.resume_ms

    async def _stop_and_copy(self, switchover: Switchover, rounds: Rounds) -> None:
        """Without a dirty log: stop first, then copy all of it. The downtime is as long as that takes."""
        self.tracker.limit_ms = math.inf
        disks = DiskFlushes(self.source)
        while not await disks.ready():
            await rounds.send_round(last=False)
        why = await switchover.attempt(NO_LIMIT)
        if why is not None:
            raise MigrationError(f"the machine can't be stopped: {why}")

    async def _precopy(self, plan: Plan, switchover: Switchover, rounds: Rounds) -> None:
        """Rounds and attempts until one attempt succeeds."""
        disks = DiskFlushes(self.source)
        await self.source.dirty_log.start()
        rounds.add_touched()
        while True:
            await rounds.send_round(last=False, give_up=lambda: plan.time_is_up(trio.current_time()))
            left, now = await rounds.harvest(), trio.current_time()
            limit_s = plan.limit_s(now)
            self.tracker.estimated, self.tracker.limit_ms = plan.estimates.downtime(left), limit_s * 1000
            step = plan.next_step(now, left)
            if step is Step.SWITCH and not await disks.ready():
                step = Step.IDLE
            if step is Step.SWITCH:
                why = await switchover.attempt(limit_s)
                if why is None:
                    return
                logger.info("switchover %d was undone: %s", self.tracker.attempts, why)
                plan.note_undone(trio.current_time(), why, limit_s)
            elif step is Step.IDLE:
                await trio.sleep(IDLE_S)
            else:
                continue
            await rounds.harvest()

    async def _roll_back(self, error: BaseException) -> None:
        """The source runs again; then, and only then, the dirty log goes off, the peer is told and the link closed."""
        cancelled = not isinstance(error, Exception)
        reason = "cancelled" if cancelled else str(error)
        self.tracker.reason = reason
        end = Phase.CANCELLED if cancelled else Phase.FAILED
        try:
            if isinstance(error, MigrationInDoubt):
                end = Phase.IN_DOUBT  # that was an undo's verdict, and the VM's owner is told so: no second try
            elif self._switchover is not None:
                await self._switchover.restore()
        except MigrationInDoubt:
            end = Phase.IN_DOUBT
            raise
        finally:
            await self._let_go()  # noqa: ASYNC102 - its caller shields and bounds it
            if self._link is not None:
                with trio.move_on_after(2 * FAREWELL_S, shield=True):
                    await self._link.abort(reason)
            self.tracker.enter(end)

    # --- from COMMIT on ------------------------------------------------------------------------------------------

    async def _commit(self, switchover: Switchover) -> MigrationReport:
        """Shielded throughout: ends with a verdict, whatever is cancelled meanwhile."""
        with trio.CancelScope(shield=True):
            found = await self._verdict(switchover.link)
            if found.fate is not Fate.RUNNING:
                await self._stay(switchover, found)
        self.tracker.remaining_pages = 0
        self.tracker.enter(Phase.DONE)
        return self.tracker.report()

    async def _verdict(self, link: Link) -> Finding:
        self.tracker.enter(Phase.COMMIT)
        sent = trio.current_time()
        found = await ask_for_verdict(link, self.dialer, self.session_id, self.source.deadlines)
        parts = self.tracker.actual or Downtime()
        self.tracker.actual = attrs.evolve(parts, resume_ms=(trio.current_time() - sent) * 1000)
        self.tracker.reason = found.reason or None
        if found.settled:
            await say_done(link, self.dialer, self.session_id)
        await link.close()
        return found

    async def _stay(self, switchover: Switchover, found: Finding) -> NoReturn:
        """Not running there: back to the source where that was promised, otherwise nothing moves."""
        if not found.settled:
            self.tracker.enter(Phase.IN_DOUBT)
            raise MigrationInDoubt(
                f"{found.reason}: the VM stays paused here until the destination says what it did (docs/in-doubt.md)",
                self.session_id,
            )
        try:
            await switchover.restore()
        except MigrationInDoubt:
            self.tracker.enter(Phase.IN_DOUBT)
            raise
        except BaseException:
            self.tracker.enter(Phase.FAILED)
            raise
        self.tracker.enter(Phase.FAILED)
        raise CommitRefused(f"the destination refused to run the VM: {found.reason}; the source runs again")
