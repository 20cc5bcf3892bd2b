"""A receiver's door on real sockets: who is let in, who has to go, and whose sessions it answers for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import attrs
import pytest
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.link.control import Link
from trivmm.migration.link.roles import open_control
from trivmm.migration.options import SendOptions
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import FrameReader
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

LIMIT_S = 60
LIMITS = Deadlines(downtime=10.0, commit=LIMIT_S)
PATIENT = SendOptions(downtime_ms=10_000, timeout_s=60)
CROWD = 16


@attrs.define(eq=False)
class Pair:
    """A source and the destination of its machine, with an address of their own."""

    url: str
    session: bytes
    source: FakeSource
    destination: FakeDestination

    async def send(self) -> None:
        await send(self.source, socket_dialer(self.url, LIMITS), PATIENT)

    async def link(self) -> Link:
        return await open_control(socket_dialer(self.url, LIMITS), self.session)

    async def commit_and_leave(self) -> None:
        """As a source whose link dies when COMMIT has gone out."""
        link, source = await self.link(), self.source
        memory = tuple((region.gpa, region.size) for region in source.memory.regions)
        await link.send(m.Setup(source.describe(), memory))
        await link.expect(m.SetupOk)
        await source.stop(1)
        await link.send(m.State(source.save()))
        await link.expect(m.Ready)
        await source.release_locks()
        await link.send(m.Commit(self.session))
        await link.close()

    async def ask(self, session: bytes) -> m.Verdict:
        link = await open_control(socket_dialer(self.url, LIMITS), session)
        await link.send(m.Query())
        try:
            return await link.expect(m.Verdict)
        finally:
            await link.close()  # noqa: ASYNC102 - shielded and bounded inside


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[list[Pair]]:
    with ExitStack() as stack:
        made = []
        for number in range(2):
            lock = DiskLock()
            source, destination = FakeSource(lock, LIMITS), FakeDestination(lock, LIMITS)
            stack.callback(source.close)
            stack.callback(destination.close)
            made.append(Pair(f"unix:{tmp_path}/{number}.sock", bytes([number]) * 16, source, destination))
        yield made


@pytest.mark.parametrize("said", ["nothing", "HELLO"])
async def test_silent_connections_do_not_lock_the_source_out(pairs: list[Pair], said: str) -> None:
    pair = pairs[0]
    with trio.fail_after(LIMIT_S):
        async with (
            AsyncExitStack() as stack,
            trio.open_nursery() as nursery,
            open_receiver(pair.url, LIMITS, nursery) as receiver,
        ):
            nursery.start_soon(receiver.receive, pair.destination.factory)
            crowd: list[trio.SocketStream] = []
            for _ in range(CROWD):
                stranger = await trio.open_unix_socket(pair.url.removeprefix("unix:"))
                crowd.append(await stack.enter_async_context(stranger))
                if said == "HELLO":
                    await stranger.send_all(m.encode_message(m.Hello(bytes(16), m.Role.CONTROL)))
                await trio.testing.wait_all_tasks_blocked(0.01)
            await pair.send()
            reader = FrameReader()
            reader.feed(bytes(await crowd[0].receive_some(4096)))  # the oldest had to go, and is told why
            frame = reader.next_frame()
            assert frame is not None
            assert "16 others" in str(m.parse_message(frame))
    assert pair.destination.running


async def test_two_vms_in_one_process_see_nothing_of_each_others_migrations(pairs: list[Pair]) -> None:
    """Each moves to a receiver with an owner of its own: neither knows the other's verdict, nor takes its address."""
    first, second = pairs
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            async with open_receiver(first.url, LIMITS, nursery) as receiver:
                nursery.start_soon(first.commit_and_leave)
                await receiver.receive(first.destination.factory)
            async with trio.open_nursery() as other:
                async with open_receiver(second.url, LIMITS, other) as receiver:
                    other.start_soon(receiver.receive, second.destination.factory)
                    assert (await second.ask(first.session)).fate is m.Fate.UNKNOWN
                    with pytest.raises(ConfigError, match="in use"):
                        async with open_receiver(first.url, LIMITS, other):
                            pass
                    other.cancel_scope.cancel()
            assert (await first.ask(first.session)).fate is m.Fate.RUNNING  # and here it is still answered
            nursery.cancel_scope.cancel()
