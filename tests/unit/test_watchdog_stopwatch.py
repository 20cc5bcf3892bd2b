"""How long a guest has not said that it lives: the time that it stands still does not count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivmm.virtio.watchdog.stopwatch import Stopwatch


def test_a_pause_does_not_count() -> None:
    watch = Stopwatch()
    watch.start(100)
    assert not watch.armed
    watch.ping(105)
    assert (watch.armed, watch.idle(112)) == (True, 7)
    watch.stop(112)
    watch.stop(200)
    assert (watch.running, watch.idle(1000)) == (False, 7)
    watch.start(1000)
    watch.start(1001)
    assert watch.idle(1003) == 10


def test_a_ping_that_was_served_while_the_guest_stands_still() -> None:
    watch = Stopwatch()
    watch.start(0)
    watch.ping(1)
    watch.stop(10)
    watch.ping(11)  # queued before the pause
    assert watch.idle(50) == 0
    watch.start(60)
    assert watch.idle(63) == 3
    watch.ping(2)  # heard of late
    assert watch.idle(63) == 3


def test_it_goes_on_elsewhere_and_ends_with_its_driver() -> None:
    watch = Stopwatch()
    watch.load(armed=True, idle=12.5)
    assert (watch.armed, watch.running, watch.idle(9e9)) == (True, False, 12.5)
    watch.start(10)
    assert watch.idle(12) == 14.5
    watch.disarm(13)
    assert (watch.armed, watch.idle(13)) == (False, 0)
    watch.ping(14)
    assert watch.idle(20) == 6


@given(st.lists(st.tuples(st.sampled_from(["start", "stop", "ping"]), st.floats(0, 10)), max_size=30))
def test_it_never_counts_more_than_the_guest_has_run(steps: list[tuple[str, float]]) -> None:
    watch, now, ran, running = Stopwatch(), 0.0, 0.0, False
    for step, passed in steps:
        now += passed
        ran += passed if running else 0
        if step == "ping":
            watch.ping(now)
            ran = 0.0
        else:
            running = step == "start"
            getattr(watch, step)(now)
        assert abs(watch.idle(now) - ran) < 1e-6
