"""From a plan and what was seen to a verdict and the broken promises: docs/migration.md as code. Pure.

What is promised, and where it ends:

- two copies never run, whatever is done to whom;
- the guest is lost only with the process that owned it: the source until the destination has COMMIT, then the
  destination (SIGTERM asks a process to end, and its VM with it; a destination that got it before COMMIT refuses);
- in doubt only while the destination can't be reached: killed, or stopped, or cut off for longer than ``commit``; or
  ended by SIGTERM after COMMIT;
- a doubt can be ended: the destination's answer ends it, or an operator who knows that the destination is dead;
- what an answer says is so: failed or cancelled means that the guest did not run there, finished that it does;
- before COMMIT a failure is known within the deadline of the wait that it met, after COMMIT within ``commit``;
- the guest finds its memory and its disk as it wrote them, nothing stays behind, and the next move works.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from trivmm.deadlines import Deadlines
from trivmm.testing.torture.plan import Act, Plan, Side

__all__ = ["Copy", "Judgement", "Observation", "Sent", "Verdict", "judge", "time_limit_s"]

SLACK_S: Final = 3.0  # a busy host: some 1 % of all events there take up to a second, and a verdict needs a few


class Verdict(enum.Enum):
    ONE_COPY = "one copy"
    IN_DOUBT = "in doubt"
    LOST = "lost"
    TWO_COPIES = "two copies"


class Sent(enum.Enum):
    """How the migration ended, as the source told its clients. ``UNKNOWN``: it died before it could."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    IN_DOUBT = "in doubt"
    UNKNOWN = "unknown"
    NEVER = "no verdict"


@attrs.frozen
class Copy:
    """One side after the trial. ``alive``: the process; ``state`` as vm.info has it, None: no VM; ``speaks``: the guest
    there has written to its serial port lately."""

    alive: bool = True
    state: str | None = None
    in_doubt: bool = False
    speaks: bool = False

    @property
    def runs(self) -> bool:
        return self.alive and self.state == "Running" and self.speaks


@attrs.frozen
class Observation:
    """``harmed``: it came to the harm. ``committed``: COMMIT went on to the destination; ``committed_before``: before
    the harm. ``overlap``: at some moment the guest spoke at the source although it had spoken at the destination.
    ``verdict_s``: from the harm, from COMMIT or from the end of a stop, whichever was last, to the verdict.
    ``cancel_accepted``: vm.cancel-migration at the source said yes although COMMIT had passed by then.
    ``resumed``: what came of an operator's resume in doubt, None: there was none; ``two_after_resume``: both ran.
    ``guest_errors``: by the guest's own checks. ``left_over``: what is still there and should not be. ``next_move``:
    why the next plain move did not work, empty: it did, or there was no guest left for one."""

    source: Copy = Copy()
    destination: Copy = Copy()
    sent: Sent = Sent.FINISHED
    harmed: bool = True
    committed: bool = True
    committed_before: bool = False
    overlap: bool = False
    verdict_s: float | None = 0.0
    cancel_accepted: bool = False
    resumed: str | None = None
    two_after_resume: bool = False
    guest_errors: int = 0
    guest_problems: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    next_move: str = ""


@attrs.frozen
class Judgement:
    """``broken``: a sentence for each broken promise."""

    verdict: Verdict
    broken: tuple[str, ...]
    deadline_kept: bool

    @property
    def ok(self) -> bool:
        return not self.broken


def judge(plan: Plan, seen: Observation, limits: Deadlines) -> Judgement:
    verdict = _verdict(seen)
    broken: list[str] = []
    if verdict is Verdict.TWO_COPIES:
        after = ", after a resume in doubt" if seen.two_after_resume else ""
        broken.append(f"two copies ran{after}")
    if verdict is Verdict.LOST and not _may_be_lost(plan, seen):
        broken.append(f"lost ({_where(seen)}), although {_who(plan)} did not own it")
    if seen.sent is Sent.IN_DOUBT and not _may_be_in_doubt(plan, seen, limits):
        broken.append("in doubt, although the destination could be asked")
    if seen.sent is Sent.IN_DOUBT and not seen.destination.alive and not seen.source.runs:
        broken.append("in doubt, and not even to be resumed by force when the destination is dead")
    broken += _false_answers(seen)
    limit = time_limit_s(plan, seen, limits)
    kept = seen.verdict_s is not None and seen.verdict_s <= limit
    if not kept:
        took = "no verdict" if seen.verdict_s is None else f"the verdict took {seen.verdict_s:.1f} s"
        broken.append(f"{took}, {limit:.1f} s is the limit")
    if seen.guest_errors:
        what = "; ".join(seen.guest_problems[:3])
        broken.append(f"the guest found {seen.guest_errors} errors in its memory or disk ({what})")
    elif seen.guest_problems:
        broken.append(f"nobody knows of the guest's memory: {'; '.join(seen.guest_problems)}")
    broken += [f"left over: {each}" for each in seen.left_over]
    if seen.next_move:
        broken.append(f"the next move failed: {seen.next_move}")
    return Judgement(verdict, tuple(broken), kept)


def _verdict(seen: Observation) -> Verdict:
    if seen.overlap or seen.two_after_resume or (seen.source.runs and seen.destination.runs):
        return Verdict.TWO_COPIES
    if seen.sent is Sent.IN_DOUBT:
        return Verdict.IN_DOUBT
    if seen.source.runs or seen.destination.runs:
        return Verdict.ONE_COPY
    return Verdict.LOST


def _where(seen: Observation) -> str:
    def told(copy: Copy) -> str:
        if not copy.alive:
            return "gone"
        if copy.state == "Running":
            return "Running, and says nothing"
        return copy.state or "no VM"

    return f"source: {told(seen.source)}, destination: {told(seen.destination)}"


def _who(plan: Plan) -> str:
    if plan.kind.act in (Act.KILL, Act.TERM) and plan.kind.side is not None:
        return f"the {plan.kind.side.value} that was ended"
    return "whoever was hurt"


def _may_be_lost(plan: Plan, seen: Observation) -> bool:
    """Only with the side that owned it; and then it must have gone with it, not stand still somewhere."""
    if plan.kind.act not in (Act.KILL, Act.TERM) or not seen.harmed:
        return False
    if any(copy.alive and copy.state is not None for copy in (seen.source, seen.destination)):
        return False
    return not seen.committed if plan.kind.side is Side.SOURCE else seen.committed_before


def _may_be_in_doubt(plan: Plan, seen: Observation, limits: Deadlines) -> bool:
    match plan.kind.act, plan.kind.side:
        case _ if not seen.harmed:
            return False
        case Act.KILL, Side.DESTINATION:
            return True
        case Act.TERM, Side.DESTINATION:
            return seen.committed_before
        case (Act.STOP, Side.DESTINATION) | (Act.CUT, _):
            return plan.seconds >= limits.commit
    return False


def _false_answers(seen: Observation) -> list[str]:
    false: list[str] = []
    if seen.sent in (Sent.FAILED, Sent.CANCELLED) and seen.destination.runs:
        false.append(f"the source says {seen.sent.value}, and the guest runs at the destination")
    if seen.sent is Sent.FINISHED and seen.source.runs:
        false.append("the source says finished, and the guest runs there")
    if seen.cancel_accepted:
        false.append("vm.cancel-migration said yes after COMMIT")
    return false


def time_limit_s(plan: Plan, seen: Observation, limits: Deadlines) -> float:
    """For ``verdict_s``. Before COMMIT the slowest of the waits that a harm can meet, and the way back. A process that
    was told to end has its grace for that, and time to hear a verdict that is due."""
    limit = limits.commit if seen.committed else max(limits.stall, limits.handshake, limits.commit) + limits.rollback
    if plan.kind.act is Act.TERM:
        limit += limits.shutdown_grace
    if plan.kind.act is Act.DELAY:
        limit += plan.seconds
    return limit + SLACK_S
