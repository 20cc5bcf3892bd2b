"""Every bad end of every phase, in virtual time: peers that close, fall silent, send nonsense or let it trickle."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.errors import DeadlineError, MigrationError, TrivmmError
from trivmm.migration.link.roles import open_control
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.migration import TappedStream
from trivmm.testing.world import LIMITS, World, breaker

SOURCE_FRAMES = [
    MessageType.HELLO,
    MessageType.SETUP,
    MessageType.PAGES,
    MessageType.ROUND_END,
    MessageType.STATE,
    MessageType.COMMIT,
]


DESTINATION_FRAMES = [MessageType.SETUP_OK, MessageType.ROUND_ACK, MessageType.READY, MessageType.RUNNING]


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
