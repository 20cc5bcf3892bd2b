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
from trivmm.migration import messages as m
from trivmm.migration import wire
from trivmm.migration.link import Link
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.receiver import Receiver
from trivmm.migration.sender import SendOptions, send
from trivmm.migration.steps import Session
from trivmm.migration.wire import MessageType
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource, MemoryNet, TappedStream

# Shorter than the defaults, and all different: the name in an error then says which one it was.
LIMITS = Deadlines(stall=8.0, handshake=3.0, commit=5.0, accept=20.0, connect=2.0)


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
        receiver = Receiver(self.net, LIMITS, nursery)
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
        self.check()

    def check(self) -> None:
        """What must hold after any end."""
        source, destination = self.source, self.destination
        assert source.throttle == 0
        assert not source.logging
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
    world.options = SendOptions(timeout_s=20, downtime_ms=50, timeout_strategy="ignore")
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
    assert world.source.events == ["stop", "undo", "migration.undone", "stop"]
    world.close()


async def test_a_destination_that_resumes_too_slowly_gets_no_commit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World.make()

    async def slow_ready(stream: TappedStream, data: bytes) -> bytes:
        if data[6] == MessageType.READY:
            return m.encode_message(m.Ready(400.0))
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

    async def released_and_cancelled() -> None:
        await release()
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

SOURCE_FRAMES = [MessageType.SETUP, MessageType.PAGES, MessageType.ROUND_END, MessageType.STATE, MessageType.COMMIT]
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
    if kind is not MessageType.COMMIT and how != "repeat":
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
    if kind is not MessageType.RUNNING and how != "repeat":
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
    # COMMIT never came whole: the destination promises so, and the source runs.
    assert world.source.running or place == 0
    assert isinstance(world.sent, CommitRefused | MigrationInDoubt)
    world.close()


@pytest.mark.parametrize("place", range(60))
async def test_the_link_dies_within_running(autojump_clock: trio.testing.MockClock, place: int) -> None:
    world = World.make()
    world.net.destination_tap = cutter(MessageType.RUNNING, place)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert isinstance(world.taken, MigrationReport)
    assert world.net.dials == (2 if place < len(m.encode_message(m.Running(1.0))) - 1 else world.net.dials)
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
        asker = Link(await world.net.dial(), Session(source=True))
        await asker.send(m.Query(bytes(16)))
        assert (await asker.expect(m.Verdict)).verdict == "unknown"
        await world.send()
        await silent.aclose()
    world.check()
    assert isinstance(world.sent, MigrationReport)
    world.close()


async def test_a_second_source_is_turned_away(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.bytes_per_s = 100_000
    second: list[Exception] = []

    async def intrude() -> None:
        await trio.sleep(0.05)
        link = Link(await world.net.dial(), Session(source=True))
        try:
            await link.send(m.Setup(bytes(16), {}, ()))
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
