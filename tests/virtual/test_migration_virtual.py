"""Sender and receiver in virtual time: the good way, the switchover, and what either side refuses."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.errors import ConfigError, DeadlineError, MigrationError, MigrationInDoubt, ProtocolError
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import MessageType
from trivmm.state.machine import MachineState
from trivmm.testing.migration import FakeDestination, TappedStream
from trivmm.testing.world import LIMITS, World, late_once


async def test_a_machine_moves(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert isinstance(world.taken, MigrationReport)
    assert world.sent.session == world.taken.session
    assert world.sent.pages == world.taken.pages
    assert world.sent.attempts == 1
    assert world.destination.loads == 1
    assert not world.source.running
    phases = [each.phase for each in world.seen]
    order = [Phase.SETUP, Phase.PRECOPY, Phase.SWITCHOVER, Phase.COMMIT, Phase.DONE]
    assert [each for i, each in enumerate(phases) if i == 0 or phases[i - 1] is not each] == order
    assert world.sent.timeline[-1].last
    # DONE was heard: nobody waited for questions
    assert trio.current_time() - world.began < 1
    world.close()


async def test_zero_and_untouched_pages_cost_nothing(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.source.memory.write(100 * 4096, bytes(4096))
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.pages == 6  # the five written, and page 0 again, which save() dirties
    assert world.sent.zero_pages == 1
    world.close()


async def test_without_a_dirty_log_the_machine_stops_first(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make(live_copy=False)
    world.net.bytes_per_s = 10_000  # far beyond any downtime limit, which does not apply
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.rounds == 1
    assert world.sent.downtime_limit_ms is None
    assert world.sent.downtime.pages_ms > 1000
    world.close()


async def dirty_for_ever(world: World, pages: int, period_s: float) -> None:
    """A guest that rewrites the same pages."""
    generation = 0
    while True:
        generation += 1
        if world.source.running:
            for page in range(pages):
                world.source.memory.write((50 + page) * 4096, generation.to_bytes(8, "little") * 512)
        await trio.sleep(period_s)


async def run_with_guest(world: World, pages: int, period_s: float) -> None:
    async with trio.open_nursery() as guest:
        guest.start_soon(dirty_for_ever, world, pages, period_s)
        await world.run()
        guest.cancel_scope.cancel()


async def test_a_dirtying_guest_converges_within_its_limit(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.bytes_per_s = 4 << 20
    await run_with_guest(world, pages=60, period_s=0.05)
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.downtime.total_ms <= 300
    world.close()


async def test_one_that_never_converges_is_cancelled_in_time(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.options = SendOptions(timeout_s=20, downtime_ms=50)
    world.net.bytes_per_s = 3 << 20
    await run_with_guest(world, pages=100, period_s=0.01)
    assert isinstance(world.sent, DeadlineError)
    assert world.sent.name == "migration"
    assert "pages left" in str(world.sent)
    assert world.source.running
    assert world.source.stops == 0
    assert isinstance(world.taken, MigrationError)
    assert "deadline migration" in str(world.taken)
    world.close()


async def test_one_that_never_converges_moves_with_ignore(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()
    world.options = SendOptions(timeout_s=20, downtime_ms=50, timeout_strategy="Ignore")
    world.net.bytes_per_s = 1 << 20
    await run_with_guest(world, pages=100, period_s=0.01)
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.downtime.total_ms > 50
    assert 20 <= world.sent.seconds < 22
    world.close()


async def test_a_late_switchover_is_undone_and_the_next_succeeds(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    late_once(world)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts == 2
    assert world.source.events == ["log on", "flush", "stop", "undo", "flush", "stop"]
    world.close()


async def test_the_guest_runs_again_before_its_dirty_log_goes_off(autojump_clock: trio.testing.MockClock) -> None:
    """The log waits for the kernel, seconds on a busy host: nothing that a stopped guest should wait for."""
    world = World.make()

    async def cut(stream: TappedStream, data: bytes) -> bytes:
        return b"" if data[6] == MessageType.STATE else data

    world.net.source_tap = cut
    await world.run()
    assert isinstance(world.sent, MigrationError)
    assert world.source.events == ["log on", "flush", "stop", "undo", "log off"]
    world.close()


async def test_the_guest_runs_while_most_of_its_disks_is_flushed(autojump_clock: trio.testing.MockClock) -> None:
    """Minutes of unwritten data: rounds go on meanwhile, so that the destination sees that its source is there, and the
    guest stops only after a flush that was short."""
    world = World.make()
    world.source.flushes_s = [3 * LIMITS.stall, 0.5]
    world.options = SendOptions(timeout_s=1000)
    flushed: list[float] = []
    world.source.on_stopped = lambda: flushed.append(trio.current_time() - world.began)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.source.events == ["log on", "flush", "flush", "flush", "stop"]
    assert flushed[0] > 3 * LIMITS.stall
    assert world.sent.downtime.total_ms < 100
    assert len(world.sent.timeline) > 10
    world.close()


async def test_the_parts_of_a_downtime_until_commit_and_after_it(autojump_clock: trio.testing.MockClock) -> None:
    """Releasing the locks is before COMMIT, and counts; what the destination takes to start is after it."""
    world = World.make()
    world.source.stop_s, world.source.release_s, world.destination.start_s = 0.02, 0.03, 0.07
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    downtime = world.sent.downtime
    assert downtime.until_commit_ms == pytest.approx(50)
    assert downtime.resume_ms == pytest.approx(70)
    assert downtime.total_ms == pytest.approx(120)
    world.close()


async def test_a_slow_load_foretells_nothing_of_the_start(autojump_clock: trio.testing.MockClock) -> None:
    """What loading did need not be done again."""
    world = World.make()
    load = world.destination.load

    async def slowly(state: MachineState) -> None:
        await trio.sleep(0.18)
        await load(state)

    world.destination.load = slowly  # type: ignore[method-assign]
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts == 1
    world.close()


async def test_a_slow_answer_to_the_state_foretells_a_slow_answer_to_commit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A destination that answers after 180 ms, whatever it says of itself, gets no COMMIT of a limit of 300."""
    world = World.make()

    async def slow(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.READY:
            await trio.sleep(0.18)
        return data

    world.net.destination_tap = slow
    await world.run()
    assert isinstance(world.sent, DeadlineError)
    assert (world.sent.name, world.source.stops) == ("downtime", 5)
    assert world.source.running
    world.close()


async def test_a_destination_that_resumes_too_slowly_gets_no_commit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()

    async def slow_ready(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.READY:
            number = wire.parse_header(data[: wire.HEADER_BYTES]).sequence
            return wire.numbered(m.encode_message(m.Ready(400.0, 0.0)), number)
        return data

    world.net.destination_tap = slow_ready
    await world.run()
    assert isinstance(world.sent, DeadlineError | MigrationError)
    assert world.source.running
    assert world.destination.loads >= 1
    assert not world.destination.running
    world.close()


async def test_a_vcpu_that_does_not_stop_fails_after_five_attempts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()
    world.source.stop_s = 10
    await world.run()
    assert isinstance(world.sent, DeadlineError)
    assert world.sent.name == "downtime"
    assert "scripted not to stop" in str(world.sent)
    assert world.source.stops == 5
    assert world.source.running
    world.close()


async def test_locks_released_for_a_late_commit_are_taken_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()
    world.source.release_s = 0.4
    await world.run()
    assert isinstance(world.sent, DeadlineError)
    assert world.source.running
    assert world.lock.owner is world.source
    world.close()


async def test_in_doubt_stays_in_doubt_when_the_locks_come_back_a_moment_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What the owner is told (paused, in doubt) is what is: no second try starts the machine behind its back."""
    world = World.make()
    world.source.release_s = 0.4  # too late for COMMIT: undone, locks first
    take = world.source.take_locks
    tries = 0

    async def taken_by_somebody_for_a_moment() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ConfigError("disks[0].path", "disk.img", "locked by another process", "stop it")
        await take()

    world.source.take_locks = taken_by_somebody_for_a_moment  # type: ignore[method-assign]
    await world.run()
    assert isinstance(world.sent, MigrationInDoubt)
    assert not world.source.running
    assert world.seen[-1].phase is Phase.IN_DOUBT
    world.close()


async def test_what_the_destination_cannot_build_is_named_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.build_error = ConfigError("disks[0].path", "d.img", "no such file", "copy it")
    await world.run()
    assert isinstance(world.sent, MigrationError)
    assert "disks[0].path" in str(world.sent)
    assert isinstance(world.taken, ConfigError)
    world.close()


async def test_a_state_that_makes_no_sense_is_named_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.load_error = ProtocolError("devices.rng: queue 7 of 1")
    await world.run()
    assert isinstance(world.sent, MigrationError)
    assert "queue 7" in str(world.sent)
    assert world.source.running
    world.close()


async def test_differing_memory_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.close()
    world.destination = FakeDestination(world.lock, LIMITS, ram=((0, 2 << 20),))
    await world.run()
    assert isinstance(world.sent, MigrationError)
    assert "memory layouts differ" in str(world.sent)
    world.close()


async def test_a_failing_progress_callback_disturbs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()

    class Broken(list[MigrationProgress]):
        def append(self, each: MigrationProgress) -> None:
            raise RuntimeError("boom")

    world.seen = Broken()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        await world.send()
    assert isinstance(world.sent, MigrationReport)
    world.close()


def test_options_name_their_field() -> None:
    with pytest.raises(ConfigError, match="timeout_strategy"):
        SendOptions(timeout_strategy="hope")
    with pytest.raises(ConfigError, match="downtime_ms"):
        SendOptions(downtime_ms=0)
