"""What a live migration does next: another round, a switchover, or nothing for a moment. Pure; the time is an argument.

After each round the plan compares what is left with what the next switchover is expected to take (:class:`Estimates`,
fed by what rounds and attempts have measured) and with the downtime limit. An attempt that was undone is not repeated
at once; after ``MAX_ATTEMPTS``, or when the migration's time is up, the strategy decides: the source goes on, or it is
switched over without a limit.
"""

from __future__ import annotations

import enum
import math
from typing import Final

import attrs

from trivmm.errors import DeadlineError
from trivmm.migration.progress import Downtime
from trivmm.migration.wire.frame import PAGE_BYTES

__all__ = ["MAX_ATTEMPTS", "NO_LIMIT", "Estimates", "Plan", "Step"]

NO_LIMIT: Final = math.inf
MAX_ATTEMPTS: Final = 5
FIRST_BACK_OFF_S: Final = 0.1  # doubles with every undone switchover
IDLE_PAGES: Final = 64  # next to nothing: a round of it costs the guest its write faults, and gains nothing
FIRST_STATE_MS: Final = 1.0  # saving, sending and loading state: hopeful, until an attempt has measured it
FIRST_STOP_MS: Final = 1.0


@attrs.define(eq=False)
class Estimates:
    """What the next switchover is expected to take. ``bandwidth`` in bytes a second, 0 while unknown; the rest in
    milliseconds, fed by what was measured."""

    bandwidth: float = 0.0
    round_trip_ms: float = 0.0
    stop_ms: float = FIRST_STOP_MS
    state_ms: float = FIRST_STATE_MS
    resume_ms: float = 0.0

    def downtime(self, pages: int) -> Downtime:
        """Expected parts of the downtime with ``pages`` still to send."""
        moving = pages * PAGE_BYTES / self.bandwidth * 1000 if self.bandwidth else (1e9 if pages else 0.0)
        return Downtime(
            stop_ms=self.stop_ms,
            pages_ms=moving + self.round_trip_ms,
            state_ms=self.state_ms + self.round_trip_ms,
            resume_ms=self.resume_ms + self.round_trip_ms,
        )


class Step(enum.Enum):
    ROUND = "round"
    IDLE = "idle"  # what is left is not worth a round
    SWITCH = "switch over"


@attrs.define(eq=False)
class Plan:
    """``downtime_s`` is the limit of a switchover, ``deadline`` when the migration's time is up. ``insists``: it is
    switched over then without a limit, however long that takes; otherwise it is somebody else who ends it."""

    downtime_s: float
    deadline: float
    insists: bool
    estimates: Estimates
    undone: int = attrs.field(default=0, init=False)
    _not_before: float = attrs.field(default=0.0, init=False)

    def time_is_up(self, now: float) -> bool:
        """A round that is under way is cut short, for the switchover that must come."""
        return self.insists and now >= self.deadline

    def limit_s(self, now: float) -> float:
        """Of a switchover that begins now."""
        limitless = self.time_is_up(now) or (self.insists and self.undone >= MAX_ATTEMPTS)
        return NO_LIMIT if limitless else self.downtime_s

    def next_step(self, now: float, left: int) -> Step:
        """With ``left`` pages to send."""
        limit_s = self.limit_s(now)
        if limit_s == NO_LIMIT:
            return Step.SWITCH
        expected = self.estimates.downtime(left)
        # What was measured in an attempt may have been an outlier: after one, only the pages decide on the next.
        fits = expected.total_ms <= limit_s * 1000 or (self.undone and expected.pages_ms <= limit_s * 500)
        if fits and now >= self._not_before:
            return Step.SWITCH
        return Step.IDLE if left < IDLE_PAGES else Step.ROUND

    def note_undone(self, now: float, why: str, limit_s: float) -> None:
        """An attempt within ``limit_s`` was undone. :raises DeadlineError: (downtime) there will be no other."""
        self.undone += 1
        if self.undone >= MAX_ATTEMPTS and (limit_s == NO_LIMIT or not self.insists):
            raise DeadlineError("downtime", self.downtime_s, f"{self.undone} switchovers were undone; the last: {why}")
        self._not_before = now + FIRST_BACK_OFF_S * 2 ** (self.undone - 1)
