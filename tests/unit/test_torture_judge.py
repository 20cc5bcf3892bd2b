"""The judge of ``trivmm.testing.torture``: docs/migration.md as a table of cases, each promise seen kept and broken."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from trivmm.deadlines import Deadlines
from trivmm.testing.torture.judge import SLACK_S, Copy, Observation, Sent, Verdict, judge
from trivmm.testing.torture.plan import KINDS, Plan, Point
from trivmm.testing.torture.report import Result, Results

LIMITS = Deadlines(commit=2, stall=4, handshake=3)
HERE = Copy(state="Running", speaks=True)
EMPTY = Copy()
GONE = Copy(alive=False)
DOUBT = Copy(state="Paused", in_doubt=True)
MOVED: dict[str, Any] = {"source": EMPTY, "destination": HERE}
STAYED: dict[str, Any] = {"source": HERE, "destination": EMPTY, "sent": Sent.FAILED, "committed": False}
IN_DOUBT: dict[str, Any] = {"source": DOUBT, "destination": HERE, "sent": Sent.IN_DOUBT}


def plan(kind: str, seconds: float = 0.0) -> Plan:
    return Plan(0, KINDS[kind], "unix", True, Point(), seconds)


def broken(kind: str, seconds: float = 0.0, **seen: Any) -> tuple[str, ...]:
    return judge(plan(kind, seconds), Observation(**seen), LIMITS).broken


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (MOVED, Verdict.ONE_COPY),
        (STAYED, Verdict.ONE_COPY),
        ({"source": GONE, "destination": HERE, "sent": Sent.UNKNOWN}, Verdict.ONE_COPY),
        (IN_DOUBT, Verdict.IN_DOUBT),
        (IN_DOUBT | {"destination": GONE}, Verdict.IN_DOUBT),
        ({"source": EMPTY, "destination": EMPTY}, Verdict.LOST),
        ({"source": EMPTY, "destination": Copy(state="Paused")}, Verdict.LOST),
        ({"source": EMPTY, "destination": Copy(state="Running", speaks=False)}, Verdict.LOST),
        ({"source": HERE, "destination": HERE}, Verdict.TWO_COPIES),
        (MOVED | {"overlap": True}, Verdict.TWO_COPIES),
        (IN_DOUBT | {"two_after_resume": True}, Verdict.TWO_COPIES),
    ],
)
def test_the_verdict(seen: dict[str, Any], verdict: Verdict) -> None:
    assert judge(plan("cut", 9), Observation(**seen), LIMITS).verdict is verdict


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_that_works_breaks_nothing_and_two_copies_are_never_allowed(kind: str) -> None:
    assert not broken(kind, **MOVED)
    assert any("two copies ran" in each for each in broken(kind, source=HERE, destination=HERE))
    assert any("two copies ran" in each for each in broken(kind, **MOVED, overlap=True))


def test_a_resume_that_makes_two_copies_is_named() -> None:
    assert broken("resume", 9, **IN_DOUBT) == ()
    assert broken("resume", 9, **IN_DOUBT, two_after_resume=True) == ("two copies ran, after a resume in doubt",)


LOST: dict[str, Any] = {"source": EMPTY, "destination": EMPTY}


@pytest.mark.parametrize(
    ("kind", "seen", "allowed"),
    [
        # The source, killed or told to end, takes its VM along until the destination has COMMIT.
        ("kill-source", {"source": GONE, "destination": EMPTY, "committed": False}, True),
        ("kill-source", {"source": GONE, "destination": EMPTY, "committed": True}, False),
        ("term-source", {"source": GONE, "destination": EMPTY, "committed": False}, True),
        ("term-source", {"source": GONE, "destination": EMPTY, "committed": True}, False),
        # The destination only when it had COMMIT before.
        ("kill-destination", {"source": EMPTY, "destination": GONE, "committed_before": True}, True),
        ("kill-destination", {"source": EMPTY, "destination": GONE, "committed_before": False}, False),
        ("term-destination", {"source": EMPTY, "destination": GONE, "committed_before": True}, True),
        ("term-destination", {"source": EMPTY, "destination": GONE, "committed_before": False}, False),
        # One that stands still somewhere was not lost with its process.
        ("kill-source", {"source": GONE, "destination": Copy(state="Paused"), "committed": False}, False),
        ("kill-destination", {"source": Copy(state="Paused"), "destination": GONE, "committed_before": True}, False),
        # Nobody was ended, or it did not come to that.
        ("stop-source", LOST, False),
        ("cancel-destination", LOST, False),
        ("cut", LOST, False),
        ("kill-source", {"source": GONE, "destination": EMPTY, "committed": False, "harmed": False}, False),
    ],
)
def test_lost_only_with_its_owner(kind: str, seen: dict[str, Any], allowed: bool) -> None:
    found = [each for each in broken(kind, 9, **seen, sent=Sent.UNKNOWN) if each.startswith("lost")]
    assert (not found) is allowed


@pytest.mark.parametrize(
    ("kind", "seconds", "seen", "allowed"),
    [
        ("kill-destination", 0, {}, True),
        ("kill-destination", 0, {"committed": False}, True),  # it was killed as COMMIT was on its way
        ("term-destination", 0, {"committed_before": True}, True),
        ("term-destination", 0, {"committed_before": False}, False),
        ("stop-destination", 2.5, {}, True),
        ("stop-destination", 1.0, {}, False),
        ("stop-source", 2.5, {}, False),
        ("cut", 2.5, {}, True),
        ("cut", 1.0, {}, False),
        ("resume", 2.5, {}, True),
        ("silent", 0, {}, False),
        ("close", 0, {}, False),
        ("reset", 0, {}, False),
        ("delay", 2.5, {}, False),
        ("drop", 0, {}, False),
        ("cancel-source", 0, {}, False),
        ("move", 0, {"harmed": False}, False),
        ("cut", 2.5, {"harmed": False}, False),
    ],
)
def test_in_doubt_only_when_the_destination_is_out_of_reach(
    kind: str, seconds: float, seen: dict[str, Any], allowed: bool
) -> None:
    found = [each for each in broken(kind, seconds, **IN_DOUBT, **seen) if "in doubt" in each]
    assert (not found) is allowed


def test_a_doubt_can_be_ended_when_the_destination_is_dead() -> None:
    dead = IN_DOUBT | {"destination": GONE}
    assert not broken("kill-destination", **dead | {"source": HERE})
    assert "not even to be resumed" in broken("kill-destination", **dead)[0]


def test_an_answer_is_the_verdict() -> None:
    for sent in (Sent.FAILED, Sent.CANCELLED):
        assert broken("term-source", **MOVED, sent=sent) == (
            f"the source says {sent.value}, and the guest runs at the destination",
        )
    assert broken("close", **STAYED | {"sent": Sent.FINISHED}) == (
        "the source says finished, and the guest runs there",
    )
    assert broken("cancel-source", **MOVED, cancel_accepted=True) == ("vm.cancel-migration said yes after COMMIT",)


def test_deadlines() -> None:
    after, before = LIMITS.commit + SLACK_S, LIMITS.stall + LIMITS.rollback + SLACK_S
    assert not broken("silent", **MOVED, verdict_s=after)
    assert "limit" in broken("silent", **MOVED, verdict_s=after + 0.1)[0]
    assert not broken("silent", **STAYED, verdict_s=before)
    assert "limit" in broken("silent", **STAYED, verdict_s=before + 0.1)[0]
    assert "no verdict" in broken("silent", **MOVED, verdict_s=None)[0]
    ended = MOVED | {"source": GONE}
    assert not broken("term-source", **ended, verdict_s=after + LIMITS.shutdown_grace)  # a process may take it to end
    assert broken("term-source", **ended, verdict_s=after + LIMITS.shutdown_grace + 0.1)
    assert not judge(plan("silent"), Observation(**MOVED, verdict_s=99.0), LIMITS).deadline_kept


def test_what_the_guest_says_and_what_is_left() -> None:
    (said,) = broken("drop", **MOVED, guest_errors=128, guest_problems=("LOST page which=1",))
    assert said == "the guest found 128 errors in its memory or disk (LOST page which=1)"
    (unknown,) = broken("drop", **MOVED, guest_problems=("it did not look",))
    assert unknown == "nobody knows of the guest's memory: it did not look"
    assert broken("cut", **STAYED, left_over=("a listener at unix:/m",)) == ("left over: a listener at unix:/m",)
    assert broken("cut", **STAYED, next_move="no") == ("the next move failed: no",)


def test_the_table_counts_what_the_judge_found() -> None:
    results = Results()
    for kind, seen in (
        ("move", Observation(harmed=False, **MOVED)),
        ("cut", Observation(**STAYED)),
        ("cut", Observation(source=HERE, destination=HERE, guest_errors=2, left_over=("x",), verdict_s=None)),
        ("kill-source", Observation(source=GONE, sent=Sent.UNKNOWN, committed=False)),
    ):
        results.results.append(Result(plan(kind), seen, judge(plan(kind), seen, LIMITS), 1.0))
    counts = results.counts()
    assert list(counts) == ["move", "kill-source", "cut", "all"]
    assert counts["cut"] == {
        "trials": 2,
        "harmed": 2,
        "one copy": 1,
        "in doubt": 0,
        "lost": 0,
        "two copies": 1,
        "deadline kept": 1,
        "left over": 1,
        "guest errors": 1,
        "broken": 1,
    }
    assert counts["all"]["trials"] == 4
    assert counts["all"]["lost"] == 1
    assert not results.ok
    assert "two copies" in results.table().splitlines()[0]
    assert "BROKEN: two copies ran" in results.results[2].line()
    assert results.json()["trials"][2]["broken"] == list(results.results[2].judgement.broken)
    assert Results(results.results[:1]).ok


def test_every_field_of_an_observation_can_change_the_judgement() -> None:
    """A field that nothing looks at would be a promise that nothing keeps."""
    base = Observation(**MOVED)
    others: dict[str, tuple[str, Observation, Any]] = {
        "source": ("move", base, HERE),
        "destination": ("move", base, EMPTY),
        "sent": ("move", base, Sent.FAILED),
        "harmed": ("kill-source", Observation(source=GONE, sent=Sent.UNKNOWN, committed=False), False),
        "committed": ("kill-source", Observation(source=GONE, sent=Sent.UNKNOWN, committed=False), True),
        "committed_before": ("term-destination", Observation(destination=GONE), True),
        "overlap": ("move", base, True),
        "verdict_s": ("move", base, 99.0),
        "cancel_accepted": ("cancel-source", base, True),
        "two_after_resume": ("resume", base, True),
        "guest_errors": ("move", base, 1),
        "guest_problems": ("move", attrs.evolve(base, guest_errors=1), ("LOST",)),
        "left_over": ("move", base, ("x",)),
        "next_move": ("move", base, "x"),
    }
    assert {field.name for field in attrs.fields(Observation)} - {"resumed"} == set(others)
    for name, (kind, seen, other) in others.items():
        changed = attrs.evolve(seen, **{name: other})
        assert judge(plan(kind, 9), seen, LIMITS) != judge(plan(kind, 9), changed, LIMITS), name
