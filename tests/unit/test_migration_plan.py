"""What a migration does next, on numbers alone."""

from __future__ import annotations

import math

import pytest

from trivmm.errors import DeadlineError
from trivmm.migration.source.plan import MAX_ATTEMPTS, NO_LIMIT, Estimates, Plan, Step

MIB_S = 1 << 20
PAGES_MS = 4096 / MIB_S * 1000  # one page at 1 MiB a second


def plan(insists: bool = False, deadline: float = 100.0, **estimates: float) -> Plan:
    known = Estimates(**{"bandwidth": MIB_S, "stop_ms": 10, "state_ms": 10, "resume_ms": 10, **estimates})
    return Plan(0.3, deadline, insists, known)


def test_the_expected_downtime_has_four_parts_and_three_round_trips() -> None:
    expected = Estimates(bandwidth=MIB_S, round_trip_ms=5, stop_ms=1, state_ms=2, resume_ms=3).downtime(10)
    assert expected.pages_ms == pytest.approx(10 * PAGES_MS + 5)
    assert (expected.stop_ms, expected.state_ms, expected.resume_ms) == (1, 7, 8)
    assert expected.total_ms == pytest.approx(10 * PAGES_MS + 1 + 2 + 3 + 15)


def test_pages_over_an_unknown_bandwidth_never_fit() -> None:
    assert Estimates().downtime(0).pages_ms == 0
    assert plan(bandwidth=0).next_step(0, 1) is not Step.SWITCH


def test_it_switches_over_once_the_rest_fits() -> None:
    fits = int((300 - 30) / PAGES_MS)
    assert plan().next_step(0, fits) is Step.SWITCH
    assert plan().next_step(0, fits + 1) is Step.ROUND


def test_next_to_nothing_that_does_not_fit_is_waited_for() -> None:
    slow = plan(stop_ms=1000)
    assert slow.next_step(0, 63) is Step.IDLE
    assert slow.next_step(0, 64) is Step.ROUND


def test_an_undone_attempt_is_not_repeated_at_once_and_the_pause_doubles() -> None:
    made, now = plan(), 5.0
    for pause in (0.1, 0.2, 0.4, 0.8):
        made.note_undone(now, "late", made.limit_s(now))
        assert made.next_step(now + pause * 0.99, 0) is Step.IDLE
        assert made.next_step(now + pause * 0.99, 64) is Step.ROUND
        now += pause * 1.01
        assert made.next_step(now, 0) is Step.SWITCH


def test_after_an_undone_attempt_only_the_pages_decide() -> None:
    """What it measured may have been an outlier."""
    made = plan(stop_ms=5000, bandwidth=16 * MIB_S)
    half = int(150 * 16 / PAGES_MS)
    assert made.next_step(0, half) is Step.ROUND
    made.note_undone(0, "late", 0.3)
    assert made.next_step(1, half) is Step.SWITCH
    assert made.next_step(1, half + 1) is Step.ROUND


def test_the_last_attempt_that_is_undone_ends_it() -> None:
    made = plan()
    for _ in range(MAX_ATTEMPTS - 1):
        made.note_undone(0, "late", 0.3)
    with pytest.raises(DeadlineError, match=r"downtime \(0.3 s\).* 5 switchovers were undone; the last: too late"):
        made.note_undone(0, "too late", 0.3)


def test_one_that_insists_switches_over_without_a_limit_after_so_many_or_when_its_time_is_up() -> None:
    made = plan(insists=True)
    assert made.limit_s(99.9) == 0.3
    assert not made.time_is_up(99.9)
    assert made.time_is_up(100.0)
    assert made.limit_s(100.0) == NO_LIMIT
    assert made.next_step(100.0, 1 << 40) is Step.SWITCH
    for _ in range(MAX_ATTEMPTS):
        made.note_undone(0, "late", 0.3)
    assert made.limit_s(0) == NO_LIMIT
    assert made.next_step(0, 1 << 40) is Step.SWITCH
    with pytest.raises(DeadlineError):
        made.note_undone(0, "it can't be stopped", NO_LIMIT)


def test_one_that_does_not_insist_has_a_limit_whatever_the_time() -> None:
    made = plan(deadline=-math.inf)
    assert made.limit_s(1e9) == 0.3
    assert not made.time_is_up(1e9)
