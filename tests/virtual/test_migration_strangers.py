"""Who else comes to a receiver's door, in virtual time: nobody of them disturbs the one who has a machine to bring."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.errors import DeadlineError, MigrationError
from trivmm.migration.link.roles import open_control
from trivmm.migration.progress import MigrationReport
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.world import World


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
