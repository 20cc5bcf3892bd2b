"""The switchover up to COMMIT: stop, save, last pages, state, READY; or back again.

Downtime is a deadline: the clock runs from the pause request, every wait gets the smaller of its own limit and what
is left, and ``attempt`` says yes only when elapsed time, a round trip and the destination's own estimate of its
resume fit into the limit. Otherwise it undoes everything, in reverse, and says why not. It runs in the sender's task.
"""

from __future__ import annotations

import attrs
import trio

from trivmm.errors import DeadlineError, MigrationInDoubt, ProtocolError, TrivmmError
from trivmm.migration.link.control import Link
from trivmm.migration.port import SourceMachine
from trivmm.migration.progress import Downtime, Phase, Tracker
from trivmm.migration.source.precopy import Rounds
from trivmm.migration.wire.messages import Ready, RoundAck, State, Undo, Undone
from trivmm.migration.wire.session import SessionState

__all__ = ["Switchover"]


@attrs.define(eq=False)
class Switchover:
    """One attempt after the other. How far the machine is stopped is the machine's to know."""

    source: SourceMachine
    link: Link
    tracker: Tracker
    rounds: Rounds
    started: float = 0.0

    async def attempt(self, limit_s: float) -> str | None:
        """Everything up to COMMIT within ``limit_s`` (``inf``: no limit). None: COMMIT may go, now. Otherwise the
        reason, and the source runs again. Errors of the link or the peer are raised, with nothing undone yet."""
        self.tracker.enter(Phase.SWITCHOVER)
        self.tracker.attempts += 1
        self.started = trio.current_time()
        why = await self._stop_and_load(limit_s)
        if why is None:
            return None
        self.tracker.reason = why
        await self.restore()
        await self._tell_undone(why)
        self.tracker.enter(Phase.PRECOPY)
        return why

    async def _stop_and_load(self, limit_s: float) -> str | None:
        estimates = self.rounds.estimates
        parts = Downtime()
        try:
            await self.source.stop(limit_s)
        except DeadlineError as error:
            estimates.stop_ms = self._elapsed_ms()
            return str(error)
        parts = attrs.evolve(parts, stop_ms=self._elapsed_ms())
        estimates.stop_ms = parts.stop_ms
        with trio.CancelScope(deadline=self.started + limit_s) as budget:
            state = self.source.save()
            saved_ms = self._elapsed_ms() - parts.stop_ms
            if self.source.live_copy:
                await self.rounds.harvest(stopped=True)
            else:
                self.rounds.add_touched()
            await self.rounds.send_round(last=True)
            parts = attrs.evolve(parts, pages_ms=self._elapsed_ms() - parts.total_ms - saved_ms)
            asked_ms = self._elapsed_ms()
            await self.link.send(State(state))
            ready = await self._ready()
            # COMMIT and RUNNING go the way of STATE and READY, past the same busy CPUs: what that took just now, the
            # loading aside, is the best guess of what it will take again.
            way_ms = self._elapsed_ms() - asked_ms - ready.loaded_ms
            estimates.resume_ms = ready.resume_ms + max(0.0, way_ms - estimates.round_trip_ms)
            parts = attrs.evolve(parts, state_ms=self._elapsed_ms() - parts.total_ms)
            estimates.state_ms = parts.state_ms
            self.tracker.actual = parts
            if why := self._too_late(limit_s):
                return why
            try:
                await self.source.release_locks(max(0.0, self.started + limit_s - trio.current_time()))
            except DeadlineError as error:
                return str(error)
            parts = attrs.evolve(parts, state_ms=parts.state_ms + self._elapsed_ms() - parts.total_ms)
            self.tracker.actual = parts
            return self._too_late(limit_s)
        if budget.cancelled_caught:
            self.tracker.actual = parts
            return f"the downtime limit of {limit_s * 1000:g} ms passed ({self._describe(parts)})"
        return None  # pragma: no cover - the block returns

    async def _ready(self) -> Ready:
        with self.source.deadlines.enter("handshake", "the destination has not loaded the state"):
            return await self.link.expect(Ready)

    def _elapsed_ms(self) -> float:
        return (trio.current_time() - self.started) * 1000

    def _too_late(self, limit_s: float) -> str | None:
        estimates = self.rounds.estimates
        expected = self._elapsed_ms() + estimates.round_trip_ms + estimates.resume_ms
        if expected <= limit_s * 1000:
            return None
        return (
            f"the downtime would be {expected:.1f} ms, {limit_s * 1000:g} ms is the limit "
            f"({self._describe(self.tracker.actual or Downtime())}, "
            f"then {estimates.round_trip_ms:.1f} for a round trip and {estimates.resume_ms:.1f} to resume)"
        )

    def _describe(self, parts: Downtime) -> str:
        return f"ms so far: stop {parts.stop_ms:.1f}, pages {parts.pages_ms:.1f}, state {parts.state_ms:.1f}"

    async def restore(self) -> None:
        """The source runs again, locks first. Shielded, bounded by ``rollback``; safe when it runs.

        :raises MigrationInDoubt: another process has the locks now: the VM stays paused.
        :raises DeadlineError: (rollback).
        """
        with self.source.deadlines.enter("rollback", "the source does not come back from a switchover", shield=True):
            try:
                await self.source.undo()
            except TrivmmError as error:
                raise MigrationInDoubt(
                    f"the image locks can't be taken back ({error}): the VM stays paused, resume it when they can"
                ) from error

    async def _tell_undone(self, why: str) -> None:
        """UNDO, and wait until the destination has forgotten the attempt: what it sent before is skipped."""
        await self.link.send(Undo(why))
        with self.source.deadlines.enter("handshake", "the destination has not answered UNDO"):
            while self.link.state is SessionState.UNDOING:
                answer = await self.link.receive()
                if not isinstance(answer, RoundAck | Ready | Undone):  # pragma: no cover - the step table's
                    raise ProtocolError(f"the peer sent {type(answer).__name__}, Undone was due")
