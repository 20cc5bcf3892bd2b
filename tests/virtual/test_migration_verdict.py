"""COMMIT and its verdict in virtual time: refusals, links that die or fall silent after it, frozen sources, doubt."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.errors import CommitRefused, ConfigError, MigrationError, MigrationInDoubt, TrivmmError
from trivmm.migration.progress import MigrationReport, Phase
from trivmm.migration.source.verdict import ask
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import MessageType
from trivmm.migration.wire.session import LAST_LOOK_S
from trivmm.testing.migration import TappedStream
from trivmm.testing.world import LIMITS, World, breaker, cutter, silent_from


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


COMMIT_BYTES = len(m.encode_message(m.Commit(bytes(16))))


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


async def test_an_answer_that_was_thanked_for_is_kept_by_an_operator_who_is_cancelled_at_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The destination gives it once: it stops answering when it hears DONE."""
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
        world.net.down = False
        found = None

        async def cancel(stream: TappedStream, data: bytes) -> bytes | None:
            if data[6] != MessageType.DONE:
                return data
            await stream.inner.send_all(data)
            operator.cancel()
            await trio.testing.wait_all_tasks_blocked()
            return None

        world.net.source_tap = cancel
        with trio.CancelScope() as operator:
            found = await ask(world.net, session, LIMITS)
        assert found is not None
        assert found.fate is m.Fate.RUNNING
    world.check()
    world.close()


async def test_a_destination_left_at_ready_discards_itself(autojump_clock: trio.testing.MockClock) -> None:
    world = World.make()
    world.net.source_tap = breaker(MessageType.COMMIT, "silence")
    await world.run()
    assert isinstance(world.taken, TrivmmError)
    assert not world.destination.running
    assert isinstance(world.sent, CommitRefused | MigrationInDoubt)
    world.close()
