"""How far a migration is: phases with their one table, a frozen snapshot for whoever looks, a report at the end.

A :class:`Tracker` is owned by one sender or receiver. It may be read at any time; it pushes a snapshot to a callback
at every change of phase and at most every ``PUSH_INTERVAL_S`` in between. A callback that fails is logged once and
never disturbs the migration.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from collections.abc import Callable
from typing import Final

import attrs
import trio

from trivmm.errors import IllegalTransition

__all__ = ["Downtime", "MigrationProgress", "MigrationReport", "Phase", "Round", "Tracker"]

logger = logging.getLogger(__name__)
PUSH_INTERVAL_S: Final = 0.05
MAX_ROUNDS_KEPT: Final = 256  # of a migration that never converges, the latest


class Phase(enum.Enum):
    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    COMMIT = "commit"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    IN_DOUBT = "in doubt"


STEPS: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.SETUP: frozenset({Phase.PRECOPY, Phase.CANCELLED, Phase.FAILED}),
    Phase.PRECOPY: frozenset({Phase.SWITCHOVER, Phase.CANCELLED, Phase.FAILED}),
    Phase.SWITCHOVER: frozenset({Phase.PRECOPY, Phase.COMMIT, Phase.CANCELLED, Phase.FAILED, Phase.IN_DOUBT}),
    # IN_DOUBT before COMMIT: its locks, released for COMMIT, went to a third party.
    Phase.COMMIT: frozenset({Phase.DONE, Phase.IN_DOUBT, Phase.FAILED}),  # FAILED: by the destination's promise only
    Phase.DONE: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.IN_DOUBT: frozenset(),
}


@attrs.frozen
class Downtime:
    """The parts of a switchover in milliseconds: stopping the machine, its last pages, its state until COMMIT may go,
    and from COMMIT to RUNNING. Until COMMIT the limit is kept, or the switchover undone; what comes after it can only
    be estimated before."""

    stop_ms: float = 0.0
    pages_ms: float = 0.0
    state_ms: float = 0.0
    resume_ms: float = 0.0

    @property
    def until_commit_ms(self) -> float:
        return self.stop_ms + self.pages_ms + self.state_ms

    @property
    def total_ms(self) -> float:
        return self.until_commit_ms + self.resume_ms


@attrs.frozen
class Round:
    """One pass over the dirty pages; ``start_s`` since the migration began. ``last`` rounds ran while the guest was
    stopped."""

    number: int
    start_s: float
    seconds: float
    bytes: int
    pages: int
    zero_pages: int
    last: bool = False


@attrs.frozen
class MigrationProgress:
    """A snapshot. Times since the start of the migration, which was at ``began_s`` of the Unix clock; ``rate`` in bytes
    a second over the latest round; ``dirty_rate`` in pages a second between the last two harvests; ``activations`` of
    devices since the start, as the VM that moves counts them."""

    session: str
    transport: str
    began_s: float
    phase: Phase
    elapsed_s: float
    memory_bytes: int
    round: int
    bytes_sent: int
    pages: int
    zero_pages: int
    remaining_pages: int
    rate: float
    dirty_rate: float
    throttle_percent: int
    attempts: int
    downtime_limit_ms: float | None
    estimated_downtime: Downtime | None
    actual_downtime: Downtime | None
    rounds: tuple[Round, ...]
    reason: str | None
    activations: int = 0

    @property
    def ended(self) -> bool:
        return not STEPS[self.phase]

    @property
    def committed(self) -> bool:
        """Past COMMIT, and no promise that the destination never ran: cancelling would be for nothing."""
        return self.phase in (Phase.COMMIT, Phase.DONE, Phase.IN_DOUBT)


@attrs.frozen
class MigrationReport:
    """How a migration ended. ``session`` in hex; on the destination ``bytes_moved`` counts what arrived."""

    session: str
    outcome: Phase
    seconds: float
    rounds: int
    bytes_moved: int
    pages: int
    zero_pages: int
    attempts: int
    downtime_limit_ms: float | None
    downtime: Downtime
    timeline: tuple[Round, ...]


def _ignore(progress: MigrationProgress) -> None:
    pass


@attrs.define(eq=False)
class Tracker:
    """The numbers of a running migration. ``phase`` changes only through :meth:`enter`."""

    callback: Callable[[MigrationProgress], None] = _ignore
    phase: Phase = Phase.SETUP
    session: str = ""
    transport: str = ""
    memory_bytes: int = 0
    round: int = 0
    bytes_sent: int = 0
    pages: int = 0
    zero_pages: int = 0
    remaining_pages: int = 0
    rate: float = 0.0
    dirty_rate: float = 0.0
    throttle_percent: int = 0
    attempts: int = 0
    limit_ms: float = math.inf
    estimated: Downtime | None = None
    actual: Downtime | None = None
    reason: str | None = None
    _rounds: list[Round] = attrs.field(factory=list)
    _start: float = attrs.field(factory=lambda: trio.current_time())
    _began_s: float = attrs.field(factory=time.time)
    _pushed: float = -math.inf
    _callback_failed: bool = False

    def enter(self, phase: Phase) -> None:
        """:raises IllegalTransition: when the table has no such step."""
        if phase not in STEPS[self.phase]:
            raise IllegalTransition("migration", self.phase.value, phase.value)
        self.phase = phase
        self.push(force=True)

    @property
    def elapsed_s(self) -> float:
        return trio.current_time() - self._start

    def add_round(self, done: Round) -> None:
        self._rounds.append(done)
        del self._rounds[:-MAX_ROUNDS_KEPT]

    def push(self, *, force: bool = False) -> None:
        now = trio.current_time()
        if not force and now - self._pushed < PUSH_INTERVAL_S:
            return
        self._pushed = now
        try:
            self.callback(self.snapshot())
        except Exception:
            if not self._callback_failed:
                logger.exception("a progress callback failed; the migration goes on")
            self._callback_failed = True

    def snapshot(self) -> MigrationProgress:
        return MigrationProgress(
            session=self.session,
            transport=self.transport,
            began_s=self._began_s,
            phase=self.phase,
            elapsed_s=self.elapsed_s,
            memory_bytes=self.memory_bytes,
            round=self.round,
            bytes_sent=self.bytes_sent,
            pages=self.pages,
            zero_pages=self.zero_pages,
            remaining_pages=self.remaining_pages,
            rate=self.rate,
            dirty_rate=self.dirty_rate,
            throttle_percent=self.throttle_percent,
            attempts=self.attempts,
            downtime_limit_ms=None if math.isinf(self.limit_ms) else self.limit_ms,
            estimated_downtime=self.estimated,
            actual_downtime=self.actual,
            rounds=tuple(self._rounds),
            reason=self.reason,
        )

    def report(self) -> MigrationReport:
        return MigrationReport(
            session=self.session,
            outcome=self.phase,
            seconds=self.elapsed_s,
            rounds=self.round,
            bytes_moved=self.bytes_sent,
            pages=self.pages,
            zero_pages=self.zero_pages,
            attempts=self.attempts,
            downtime_limit_ms=None if math.isinf(self.limit_ms) else self.limit_ms,
            downtime=self.actual or Downtime(),
            timeline=tuple(self._rounds),
        )
