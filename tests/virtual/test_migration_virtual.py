"""Sender and receiver in virtual time: the good way, every bad end of every phase, exactly one side runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import (
    CommitRefused,
    ConfigError,
    DeadlineError,
    MigrationError,
    MigrationInDoubt,
    ProtocolError,
    TrivmmError,
)
from trivmm.migration.destination.receiver import Receiver
from trivmm.migration.link.roles import open_control
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.source.sender import send
from trivmm.migration.source.verdict import ask
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import MessageType
from trivmm.migration.wire.session import LAST_LOOK_S
from trivmm.state.machine import MachineState
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource, MemoryNet, Tap, TappedStream

# Shorter than the defaults, and all different: the name in an error then says which one it was.
LIMITS = Deadlines(stall=8.0, intake=150.0, handshake=3.0, commit=5.0, accept=20.0, connect=2.0)


@attrs.define(eq=False)
class World:
    """A source, a destination and the wire between them. ``sent`` and ``taken`` are the outcomes: a report, an
    exception, or None after a cancellation."""

    lock: DiskLock
    net: MemoryNet
    source: FakeSource
    destination: FakeDestination
    options: SendOptions = attrs.field(factory=lambda: SendOptions(timeout_s=30))
    sent: MigrationReport | BaseException | None = None
    taken: MigrationReport | BaseException | None = None
    seen: list[MigrationProgress] = attrs.field(factory=list)
    began: float = attrs.field(factory=trio.current_time)
    receiver: Receiver | None = None
    refuse: Callable[[], str | None] = lambda: None

    @classmethod
    def make(cls, limits: Deadlines = LIMITS, **more: Any) -> World:
        lock = DiskLock()
        world = cls(lock, MemoryNet(limits), FakeSource(lock, limits, **more), FakeDestination(lock, limits))
        for page in (0, 3, 4, 250):
            world.source.memory.write(page * 4096, bytes([page + 1]) * 4096)
        world.source.memory.write((1 << 32) + 4096, b"high")
        return world

    async def send(self) -> None:
        try:
            self.sent = await send(self.source, self.net, self.options, self.seen.append)
        except Exception as error:
            self.sent = error

    async def receive(self, nursery: trio.Nursery) -> None:
        self.receiver = receiver = Receiver(self.net, LIMITS, nursery)
        receiver.refuse = self.refuse
        try:
            _, self.taken = await receiver.receive(self.destination.factory)
        except Exception as error:
            self.taken = error
        finally:
            receiver.close()

    async def run(self) -> None:
        """Both sides to their ends, lingering included."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.receive, nursery)
            await self.send()
            if isinstance(self.sent, MigrationInDoubt):
                await trio.sleep(3 * LIMITS.commit)
                assert self.net.closed or self.destination.running, "it answers although nothing runs there"
                nursery.cancel_scope.cancel()  # the end of the machine that came
            if self.destination.running:  # and answers for its life where the box took DONE
                nursery.cancel_scope.deadline = trio.current_time() + 3 * LIMITS.commit
        self.check()

    def check(self) -> None:
        """What must hold after any end."""
        source, destination = self.source, self.destination
        if not isinstance(self.sent, MigrationReport):  # else it is closed next: nobody waits for the kernel first
            assert source.throttle == 0
            assert not source.logging
            if "undo" in source.events:
                assert source.events.index("log off") > source.events.index("undo"), "the guest first"
        assert self.net.closed, "the listener was left open"
        assert not (source.running and destination.running), "two copies run"
        if not isinstance(self.sent, MigrationInDoubt):
            assert source.running or destination.running, "no copy runs"
            assert self.lock.owner is (source if source.running else destination)
        if destination.running:
            assert source.contents() == destination.contents()
            assert destination.state is not None
        if isinstance(self.sent, MigrationReport):
            assert destination.running
            assert self.sent.outcome is Phase.DONE
        phases = [each.phase for each in self.seen]
        assert phases[-1] in (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.IN_DOUBT) or not phases

    def close(self) -> None:
        self.source.close()
        self.destination.close()


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


def late_once(world: World) -> None:
    """The last pages' ROUND_ACK of the first attempt comes only after the limit, and after UNDO."""
    asked = 0

    async def delay(stream: TappedStream, data: bytes) -> bytes:
        nonlocal asked
        if data[6] == MessageType.ROUND_ACK and not world.source.running:
            asked += 1
            if asked == 1:
                await trio.sleep(0.35)
                assert world.source.running  # first it runs again, then the peer hears of it
        return data

    world.net.destination_tap = delay


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


async def test_refused_locks_bring_the_source_back(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    take = world.destination.take_locks

    async def refuse() -> None:
        world.lock.refuse = True
        try:
            await take()
        finally:
            world.lock.refuse = False

    world.destination.take_locks = refuse  # type: ignore[method-assign]
    await world.run()
    assert isinstance(world.sent, CommitRefused)
    assert isinstance(world.taken, CommitRefused)
    assert world.source.running
    world.close()


async def test_a_destination_that_shall_end_refuses_the_commit_that_it_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It was ready, and only then told: nothing has cancelled it yet when it reads COMMIT."""
    world = World.make()
    told: list[str] = []

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.COMMIT:
            told.append("SIGTERM")
        return data

    world.net.source_tap = tap
    world.refuse = lambda: told[0] if told else None
    await world.run()
    assert isinstance(world.sent, CommitRefused)
    assert isinstance(world.taken, CommitRefused)
    assert "not run here: SIGTERM" in str(world.sent)
    assert world.source.running
    world.close()


async def test_a_cancellation_in_the_last_moment_before_commit_is_heard(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever cancels while the phase is not COMMIT was told that it can be: no COMMIT goes out after that."""
    world = World.make()
    release = world.source.release_locks

    async def released_and_cancelled(at_most_s: float) -> None:
        await release(at_most_s)
        scope.cancel()

    world.source.release_locks = released_and_cancelled  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        with trio.CancelScope() as scope:
            await world.send()
    world.check()
    assert world.sent is None
    assert world.seen[-1].phase is Phase.CANCELLED
    assert Phase.COMMIT not in [each.phase for each in world.seen]
    assert world.source.running
    world.close()


async def test_a_start_that_fails_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.start_error = ConfigError("x", 1, "no", "none")
    take = world.destination.start

    async def start() -> None:
        try:
            await take()
        finally:
            world.lock.release(world.destination)

    world.destination.start = start  # type: ignore[method-assign]
    await world.run()
    assert isinstance(world.sent, CommitRefused)
    assert world.source.running
    world.close()


async def test_a_start_that_hangs_is_in_doubt_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.start_s = 100
    await world.run()
    assert isinstance(world.sent, MigrationInDoubt)
    assert isinstance(world.taken, MigrationInDoubt)
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


# --- every bad end of every phase ----------------------------------------------------------------------------

SOURCE_FRAMES = [
    MessageType.HELLO,
    MessageType.SETUP,
    MessageType.PAGES,
    MessageType.ROUND_END,
    MessageType.STATE,
    MessageType.COMMIT,
]
DESTINATION_FRAMES = [MessageType.SETUP_OK, MessageType.ROUND_ACK, MessageType.READY, MessageType.RUNNING]


def breaker(kind: MessageType, how: str) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    """A tap that does something bad at the first frame of a kind."""
    struck = False

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        nonlocal struck
        if struck and how == "silence":
            await trio.sleep_forever()
        if struck or data[6] != kind:
            return data
        struck = True
        if how == "close":
            return b""
        if how == "half":
            return data[: len(data) // 2]
        if how == "silence":
            await trio.sleep_forever()
        if how == "garbage":
            await stream.inner.send_all(b"\xde\xad" * 40)
            return data
        if how == "damaged":
            await stream.inner.send_all(data[:-1] + bytes([data[-1] ^ 1]))
            return b""
        assert how == "repeat"
        await stream.inner.send_all(data)
        return data

    return tap


@pytest.mark.parametrize("how", ["close", "half", "silence", "garbage", "damaged", "repeat"])
@pytest.mark.parametrize("kind", SOURCE_FRAMES, ids=lambda each: each.name)
async def test_a_source_that_goes_wrong(autojump_clock: trio.testing.MockClock, kind: MessageType, how: str) -> None:
    world = World.make()
    world.net.source_tap = breaker(kind, how)
    await world.run()
    if kind is not MessageType.COMMIT:
        assert isinstance(world.sent, TrivmmError)
        assert isinstance(world.taken, TrivmmError)
        assert world.source.running
    assert trio.current_time() - world.began < 45
    world.close()


@pytest.mark.parametrize("how", ["close", "half", "silence", "garbage", "damaged", "repeat"])
@pytest.mark.parametrize("kind", DESTINATION_FRAMES, ids=lambda each: each.name)
async def test_a_destination_that_goes_wrong(
    autojump_clock: trio.testing.MockClock, kind: MessageType, how: str
) -> None:
    world = World.make()
    world.net.destination_tap = breaker(kind, how)
    await world.run()
    if kind is not MessageType.RUNNING and (kind, how) != (MessageType.READY, "repeat"):
        assert isinstance(world.sent, TrivmmError)
        assert world.source.running
    if kind is MessageType.RUNNING:
        assert world.destination.running
    assert trio.current_time() - world.began < 45
    world.close()


COMMIT_BYTES = len(m.encode_message(m.Commit(bytes(16))))


def cutter(kind: MessageType, place: int) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    async def tap(stream: TappedStream, data: bytes) -> bytes:
        return data[:place] if data[6] == kind else data

    return tap


@pytest.mark.parametrize("place", range(COMMIT_BYTES))
async def test_the_link_dies_within_commit(autojump_clock: trio.testing.MockClock, place: int) -> None:
    world = World.make()
    world.net.source_tap = cutter(MessageType.COMMIT, place)
    await world.run()
    # COMMIT never came whole: the destination promises so, and the source runs. The end of the link, which is in good
    # order where not a byte came, is no reason to leave.
    assert world.source.running
    assert isinstance(world.sent, CommitRefused)
    world.close()


@pytest.mark.parametrize("place", range(60))
async def test_the_link_dies_within_running(autojump_clock: trio.testing.MockClock, place: int) -> None:
    world = World.make()
    world.net.destination_tap = cutter(MessageType.RUNNING, place)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert isinstance(world.taken, MigrationReport)
    assert world.net.dials >= (2 if place < len(m.encode_message(m.Running(1.0))) - 1 else 1)
    world.close()


async def test_a_destination_that_gave_up_and_left_before_commit_came_is_believed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its ABORT is there to be read although COMMIT can't be sent any more, and nobody is left to be asked."""
    world = World.make()
    process, gone = trio.CancelScope(), trio.Event()

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.COMMIT:
            process.cancel()
            await gone.wait()
            world.net.down = True
        return data

    world.net.source_tap = tap
    async with trio.open_nursery() as nursery:

        async def destination() -> None:
            with process:
                async with trio.open_nursery() as lingering:
                    await world.receive(lingering)
            gone.set()

        nursery.start_soon(destination)
        await world.send()
    world.check()
    assert isinstance(world.sent, CommitRefused)
    assert world.source.running
    world.close()


async def test_the_link_dies_after_commit_and_nobody_answers_any_more(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.RUNNING:
            world.net.down = True
            return b""
        return data

    world.net.destination_tap = tap
    await world.run()
    assert isinstance(world.sent, MigrationInDoubt)
    assert world.destination.running
    assert not world.source.running
    world.close()


async def test_a_refusal_that_got_lost_is_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.destination_tap = cutter(MessageType.REFUSED, 5)
    world.destination.start_error = ConfigError("x", 1, "no", "none")
    start = world.destination.start

    async def failing() -> None:
        try:
            await start()
        finally:
            world.lock.release(world.destination)

    world.destination.start = failing  # type: ignore[method-assign]
    await world.run()
    assert isinstance(world.sent, CommitRefused)
    assert world.source.running
    assert world.net.dials == 2
    world.close()


# --- a middle box that loses, repeats or swaps whole frames --------------------------------------------------
# Each frame is good in itself, CRCs and all: only its place in the stream says that something is amiss.

AFTER_COMMIT = (MessageType.COMMIT, MessageType.RUNNING, MessageType.DONE)


def busy_world() -> World:
    """Several frames of pages and of zero pages a round, an undone switchover, two regions."""
    world = World.make()
    for page in range(200):
        world.source.memory.write(page * 4096, bytes([page % 255 + 1]) * 4096)
        world.source.memory.write((1 << 32) + page * 4096, bytes(4096) if page % 3 else b"high")
    late_once(world)
    return world


class MiddleBox:
    """Does ``how`` to frame ``index`` of the first connection, and ``renumbers`` the frames or not. ``kinds``: what
    came here, in order."""

    def __init__(self, then: Tap, how: str, index: int, renumbers: bool) -> None:
        self.kinds: list[MessageType] = []
        self._then, self._how, self._index, self._renumbers = then, how, index, renumbers
        self._held: list[bytes] = []
        self._passed = 0
        self._first: TappedStream | None = None

    async def tap(self, stream: TappedStream, data: bytes) -> bytes | None:
        passed = await self._then(stream, data)
        self._first = self._first or stream
        if passed is None or stream is not self._first:
            return passed
        self.kinds.append(MessageType(passed[6]))
        out, self._held = [passed, *self._held], []
        if len(self.kinds) - 1 == self._index:
            out = [passed] * 2 if self._how == "repeat" else []
            self._held = [passed] if self._how == "swap" else []
        for frame in out:
            await stream.inner.send_all(wire.numbered(frame, self._passed) if self._renumbers else frame)
            self._passed += 1
        return None


def boxed(world: World, side: str, how: str = "", index: int = -1, *, renumbers: bool = False) -> MiddleBox:
    box = MiddleBox(getattr(world.net, f"{side}_tap"), how, index, renumbers)
    setattr(world.net, f"{side}_tap", box.tap)
    return box


async def frames_of(side: str) -> list[MessageType]:
    world = busy_world()
    box = boxed(world, side)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts == 2
    world.close()
    return box.kinds


@pytest.mark.parametrize("how", ["lose", "repeat", "swap"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_middle_box_at_every_frame(autojump_clock: trio.testing.MockClock, side: str, how: str) -> None:
    kinds = await frames_of(side)
    if side == "source":
        assert kinds.count(MessageType.PAGES) >= 5
        assert {MessageType.ZERO, MessageType.UNDO} < set(kinds)
    for index, kind in enumerate(kinds):
        world = busy_world()
        box = boxed(world, side, how, index)
        await world.run()  # checks that there is one copy, and that the destination's pages are the source's
        told = f"{how} {kind.name} at {index}: {world.sent!r}, {world.taken!r}"
        assert box.kinds[index] is kind, told
        if kind in AFTER_COMMIT or (side, how, kind) == ("destination", "repeat", MessageType.READY):
            # A verdict, whatever the box did: asked for on a new connection where it was lost.
            assert world.source.running != world.destination.running, told
        else:
            assert world.source.running, told
            assert not world.destination.running, told
            assert isinstance(world.sent, TrivmmError), told
            ends = (world.sent, world.taken)
            named = any("was due" in str(each) for each in ends)
            if kind in (MessageType.PAGES, MessageType.ZERO) or how == "repeat":
                assert named, told
            else:  # without a frame after the lost one, somebody waits for it in vain
                assert named or any(isinstance(each, DeadlineError) for each in ends), told
        world.close()


@pytest.mark.parametrize("how", ["lose", "repeat"])
async def test_pages_that_are_short_in_a_stream_that_was_renumbered(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    """The count in ROUND_END stands alone, too: for a box that speaks the protocol, and for a side that is wrong."""
    kinds = await frames_of("source")
    for index, kind in enumerate(kinds):
        if kind not in (MessageType.PAGES, MessageType.ZERO):
            continue
        world = busy_world()
        boxed(world, "source", how, index, renumbers=True)
        await world.run()
        assert isinstance(world.taken, ProtocolError)
        assert "pages landed" in str(world.taken)
        assert "were sent" in str(world.sent)
        assert world.source.running
        world.close()


async def test_a_cancelled_send_of_pages_counts_what_is_whole_on_its_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """An attempt that is cut off while a frame of pages goes out: the frame ends, and its pages count as sent."""
    world = busy_world()
    cut = 0

    async def slow(stream: TappedStream, data: bytes) -> bytes:
        nonlocal cut
        if data[6] == MessageType.PAGES and not world.source.running and not cut:
            cut += 1
            await trio.sleep(0.4)  # longer than the downtime, shorter than the downtime and the grace
        return data

    world.net.source_tap = slow
    await world.run()
    assert cut
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts > 1
    assert isinstance(world.taken, MigrationReport)
    assert (world.sent.pages, world.sent.zero_pages) == (world.taken.pages, world.taken.zero_pages)
    world.close()


# --- peers that let it trickle -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCE_FRAMES[:4], ids=lambda each: each.name)
async def test_a_source_that_trickles_is_given_up_after_stall(
    autojump_clock: trio.testing.MockClock, kind: MessageType
) -> None:
    world = World.make()

    async def trickle(stream: TappedStream, data: bytes) -> bytes | None:
        if data[6] == kind:
            for place in range(len(data)):
                await stream.inner.send_all(data[place : place + 1])
                await trio.sleep(LIMITS.stall * 0.9)
            return None
        return data

    world.net.source_tap = trickle
    await world.run()
    assert isinstance(world.taken, DeadlineError)
    assert world.source.running
    assert trio.current_time() - world.began < LIMITS.accept + 45
    world.close()


async def test_a_destination_that_trickles_is_given_up_after_stall(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()

    async def trickle(stream: TappedStream, data: bytes) -> bytes | None:
        if data[6] == MessageType.ROUND_ACK:
            for place in range(len(data)):
                await stream.inner.send_all(data[place : place + 1])
                await trio.sleep(LIMITS.stall * 0.9)
            return None
        return data

    world.net.destination_tap = trickle
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        await world.send()
        assert trio.current_time() - world.began < 2.5 * LIMITS.stall
    world.check()
    assert isinstance(world.sent, DeadlineError)
    assert world.sent.name == "stall"
    assert "does not end" in str(world.sent)
    world.close()


async def test_a_source_that_never_ends_is_given_up_after_intake(autojump_clock: trio.testing.MockClock) -> None:
    """Whole frames, each in good time, for ever."""
    world = World.make()
    link = await open_control(world.net, bytes(16))

    async def rounds_for_ever() -> None:
        memory = tuple((region.gpa, region.size) for region in world.source.memory.regions)
        await link.send(m.Setup(world.source.describe(), memory))
        await link.expect(m.SetupOk)
        while True:
            await link.send(m.RoundEnd(1, 0))
            await link.expect(m.RoundAck)
            await trio.sleep(LIMITS.stall * 0.9)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        with pytest.raises(MigrationError, match="deadline intake"):
            await rounds_for_ever()
        await link.close()
    assert isinstance(world.taken, DeadlineError)
    assert world.taken.name == "intake"
    assert trio.current_time() - world.began < LIMITS.intake + 2


# --- silence and frozen sources after COMMIT ---------------------------------------------------------------------


def silent_from(kind: MessageType) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    """The link that carries the first frame of a kind carries nothing any more, that frame included; later ones do."""
    silent: TappedStream | None = None

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        nonlocal silent
        if silent is None and data[6] == kind:
            silent = stream
        if silent is stream:
            await trio.sleep_forever()
        return data

    return tap


async def test_a_link_that_is_silent_after_commit_is_asked_about_long_before_the_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()
    world.net.destination_tap = silent_from(MessageType.RUNNING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        await world.send()
        assert isinstance(world.sent, MigrationReport)
        assert trio.current_time() - world.began < LIMITS.commit / 2
    world.check()
    world.close()


async def test_a_commit_that_is_stuck_is_asked_about_and_never_counts(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.source_tap = silent_from(MessageType.COMMIT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        await world.send()
        assert trio.current_time() - world.began < LIMITS.commit / 2
    world.check()
    assert isinstance(world.sent, CommitRefused)
    assert world.source.running
    world.close()


async def test_a_slow_start_is_waited_for_and_both_answers_agree(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.destination.start_s = 0.8 * LIMITS.commit  # asked about all the while: pending
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.net.dials > 2
    world.close()


@pytest.mark.parametrize("link", ["lives", "is closed"])
async def test_a_source_that_was_frozen_for_longer_than_commit_looks_before_it_doubts(
    autojump_clock: trio.testing.MockClock, link: str
) -> None:
    """Its deadline has expired before it has read anything: RUNNING lies in its socket, or can be asked for."""
    world = World.make()

    async def freeze(stream: TappedStream, data: bytes) -> bytes:
        if data[6] != MessageType.RUNNING:
            return data
        autojump_clock.jump(LIMITS.commit + 1)
        await trio.testing.wait_all_tasks_blocked()  # the source wakes up and finds its time over
        world.net.down = link == "lives"
        return data if link == "lives" else b""

    world.net.destination_tap = freeze
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.destination.running
    world.close()


async def test_a_source_that_died_at_ready_leaves_a_destination_that_answers_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()
    world.source.release_s = 1e6
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as process:
            nursery.start_soon(world.receive, nursery)

            async def die(stream: TappedStream, data: bytes) -> bytes:
                if data[6] == MessageType.READY:
                    process.start_soon(killed, stream)
                return data

            async def killed(stream: TappedStream) -> None:
                await trio.testing.wait_all_tasks_blocked()
                await streams[0].inner.aclose()  # what the kernel does: no farewell
                process.cancel_scope.cancel()

            streams: list[TappedStream] = []
            dial = world.net.dial_raw

            async def dialled() -> trio.abc.Stream:
                stream = await dial()
                assert isinstance(stream, TappedStream)
                streams.append(stream)
                return stream

            world.net.dial_raw = dialled  # type: ignore[method-assign]
            world.net.destination_tap = die
            await world.send()
        died = trio.current_time()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(world.taken, MigrationError)
        assert not world.net.closed
    assert LIMITS.commit < trio.current_time() - died <= 2 * (LIMITS.commit + LAST_LOOK_S)
    assert world.net.closed
    assert not world.destination.running
    world.close()


async def test_an_operator_is_answered_at_once_or_within_resolve(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()

    async def cut(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.RUNNING:
            world.net.down = True
            return b""
        return data

    world.net.destination_tap = cut
    async with trio.open_nursery() as machine:
        machine.start_soon(world.receive, machine)
        await world.send()
        assert isinstance(world.sent, MigrationInDoubt)
        session = world.sent.session
        assert session is not None
        assert (await ask(world.net, session, LIMITS)).fate is None
        world.net.down = False
        world.net.destination_tap = silent_from(MessageType.VERDICT)
        before = trio.current_time()
        found = await ask(world.net, session, LIMITS)  # the first question was lost, the second not
        assert found.fate is m.Fate.RUNNING
        assert trio.current_time() - before <= LIMITS.resolve
    world.check()
    world.close()


# --- cancellation --------------------------------------------------------------------------------------------


async def test_the_source_cancelled_at_every_await(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[str] = []

    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.receive, nursery)
            await walk.run(world.send)
        world.check()
        if walk.cancelled:
            assert world.source.running
        outcomes.append(type(world.sent).__name__)
        world.close()

    assert await cancel_walk(world_of) > 20
    assert {"NoneType", "MigrationReport"} == set(outcomes)


async def test_the_destination_cancelled_at_every_await(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[str] = []

    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.send)
            async with trio.open_nursery() as lingering:
                await walk.run(lambda: world.receive(lingering))
        world.net.close()
        if world.sent is not None:
            world.check()
        outcomes.append(type(world.sent).__name__)
        world.close()

    assert await cancel_walk(world_of) > 10
    assert {"MigrationReport"} < set(outcomes)


async def test_a_cancelled_undo_still_ends(autojump_clock: trio.testing.MockClock) -> None:
    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        late_once(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.receive, nursery)
            await walk.run(world.send)
        world.check()
        world.close()

    assert await cancel_walk(world_of) > 30


# --- strangers -----------------------------------------------------------------------------------------------


async def test_strangers_disturb_nothing(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        silent = await world.net.dial_raw()
        rude = await world.net.dial_raw()
        await rude.send_all(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n")
        answer = await rude.receive_some(4096)
        reader = wire.FrameReader()
        reader.feed(bytes(answer))
        frame = reader.next_frame()
        assert frame is None or frame.type is MessageType.ABORT
        asker = await open_control(world.net, bytes(16))
        await asker.send(m.Query())
        assert (await asker.expect(m.Verdict)).fate is m.Fate.UNKNOWN
        await world.send()
        await silent.aclose()
    world.check()
    assert isinstance(world.sent, MigrationReport)
    world.close()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (m.Hello(bytes(16), m.Role.PAGES, 3), "PAGES 3: several connections are not supported yet"),
        (m.Hello(bytes(16), m.Role.FAULT), "FAULT: several connections are not supported yet"),
        (m.Query(), "the peer sent QUERY out of order: the session is new, not open"),
        (m.Setup({}, ()), "the peer sent SETUP out of order: the session is new, not open"),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else "",
)
async def test_what_is_no_control_connection_is_refused_by_name(
    autojump_clock: trio.testing.MockClock, message: m.Message, says: str
) -> None:
    world = World.make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        stranger = await world.net.dial()
        await stranger.sender.send(m.encode_message(message))
        answer = m.parse_message(await stranger.receiver.receive())
        assert answer == m.Abort(says)
        await stranger.aclose()
        await world.send()
    world.check()
    assert isinstance(world.sent, MigrationReport)
    world.close()


async def test_a_second_source_is_turned_away(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.bytes_per_s = 100_000
    second: list[Exception] = []

    async def intrude() -> None:
        await trio.sleep(0.05)
        link = await open_control(world.net, bytes(16))
        try:
            await link.send(m.Setup({}, ()))
            await link.receive()
        except MigrationError as error:
            second.append(error)
        await link.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(intrude)
        await world.run()
    assert "under way" in str(second[0])
    assert isinstance(world.sent, MigrationReport)
    world.close()


async def test_nobody_comes_within_the_accept_deadline(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        stream = await world.net.dial_raw()
        await stream.send_all(b"x" * 100)
    assert isinstance(world.taken, DeadlineError)
    assert world.taken.name == "accept"
    assert "bad magic" in str(world.taken)
    world.close()


async def test_a_destination_left_at_ready_discards_itself(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.source_tap = breaker(MessageType.COMMIT, "silence")
    await world.run()
    assert isinstance(world.taken, TrivmmError)
    assert not world.destination.running
    assert isinstance(world.sent, CommitRefused | MigrationInDoubt)
    world.close()


def test_options_name_their_field() -> None:
    with pytest.raises(ConfigError, match="timeout_strategy"):
        SendOptions(timeout_strategy="hope")
    with pytest.raises(ConfigError, match="downtime_ms"):
        SendOptions(downtime_ms=0)
