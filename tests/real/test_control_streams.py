"""Streaming answers: chunks as they come, clients that leave, stop reading or talk, and the last event at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import pytest
import trio

from trivmm.control.http import Request, Response
from trivmm.control.server import MAX_STREAMS, open_server
from trivmm.deadlines import Deadlines
from trivmm.testing.control import ch_remote

LIMIT_S = 30
GET = b"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = (
    b"HTTP/1.1 200 \r\nServer: TriVMM API\r\nConnection: close\r\n"
    b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"
)
LAST = b"data: last\n\n"


class Feed:
    """A stream whose chunks a test puts in."""

    def __init__(self, *, finishes: bool = True) -> None:
        self._in, self._out = trio.open_memory_channel[bytes](1000)
        self._finishes = finishes
        self.left = trio.Event()

    def put(self, chunk: bytes) -> None:
        self._in.send_nowait(chunk)

    def end(self) -> None:
        self._in.close()

    def finish(self) -> None:
        if self._finishes:
            with suppress(trio.ClosedResourceError):
                self.put(LAST)
            self.end()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._out.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Feed]:
        try:
            yield self
        finally:
            self.left.set()


@attrs.define(eq=False)
class Stage:
    """Feeds are given out in order; the last one again and again."""

    path: str
    feeds: list[Feed] = attrs.field(factory=lambda: [Feed()])
    clients: list[trio.SocketStream] = attrs.field(factory=list)
    _given: int = 0

    async def handler(self, request: Request) -> Response:
        if request.name != "events":
            return Response(204)
        feed = self.feeds[min(self._given, len(self.feeds) - 1)]
        self._given += 1
        return Response(200, stream=feed.open)

    async def subscribe(self, data: bytes = GET) -> trio.SocketStream:
        client = await trio.open_unix_socket(self.path)
        self.clients.append(client)
        await client.send_all(data)
        assert await exactly(client, len(HEAD)) == HEAD
        return client

    async def others_are_served(self) -> None:
        with trio.fail_after(LIMIT_S):
            assert await trio.to_thread.run_sync(ch_remote, self.path, "GET", "x") is None


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(str(tmp_path / "s"))
    yield made
    for client in made.clients:
        await client.aclose()


async def exactly(client: trio.SocketStream, count: int) -> bytes:
    found = b""
    with trio.fail_after(LIMIT_S):
        while len(found) < count:
            piece = await client.receive_some(count - len(found))
            assert piece, found
            found += piece
    return found


async def to_end(client: trio.SocketStream) -> bytes:
    found = b""
    with trio.fail_after(LIMIT_S), suppress(trio.BrokenResourceError):
        while piece := await client.receive_some(1 << 20):
            found += piece
    return found


async def happens(event: trio.Event) -> None:
    with trio.fail_after(LIMIT_S):
        await event.wait()


async def test_chunks_are_sent_as_they_come_until_the_stream_ends(stage: Stage) -> None:
    (feed,) = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines()):
        client = await stage.subscribe()
        for chunk in (b"data: 1\n\n", b"data: two\n\n"):
            feed.put(chunk)
            assert await exactly(client, len(chunk)) == chunk
        await stage.others_are_served()
        feed.put(b"data: 3\n\n")
        feed.end()
        assert await to_end(client) == b"data: 3\n\n"
        await happens(feed.left)


async def test_chunks_larger_than_the_buffers_arrive_whole(stage: Stage) -> None:
    (feed,) = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines()):
        client = await stage.subscribe()
        chunks = [bytes([65 + number]) * (300_000) for number in range(4)]
        for chunk in chunks:
            feed.put(chunk)
        feed.end()
        assert await to_end(client) == b"".join(chunks)


async def closes(client: trio.SocketStream) -> None:
    await client.aclose()


async def half_closes(client: trio.SocketStream) -> None:
    await client.send_eof()


async def talks(client: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        await client.send_all(b"x" * 100_000)


@pytest.mark.parametrize("leaves", [closes, half_closes, talks])
async def test_a_client_that_leaves_is_noticed_though_nothing_is_sent(
    stage: Stage, leaves: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    (feed,) = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines()):
        client = await stage.subscribe()
        await trio.testing.wait_all_tasks_blocked()
        assert not feed.left.is_set()
        await leaves(client)
        await happens(feed.left)
        await stage.others_are_served()


async def test_a_request_behind_a_stream_is_not_answered(stage: Stage) -> None:
    (feed,) = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines()):
        client = await stage.subscribe(GET + GET)
        feed.end()
        assert await to_end(client) == b""


async def test_a_client_that_stops_reading_is_dropped(stage: Stage) -> None:
    stage.feeds = [Feed(), Feed()]
    stopped, other = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines(api_write=0.2)):
        await stage.subscribe()
        reader = await stage.subscribe()
        for _ in range(100):
            stopped.put(bytes(100_000))
        await happens(stopped.left)
        other.put(b"data: 1\n\n")
        assert await exactly(reader, 9) == b"data: 1\n\n"
        other.end()


async def test_one_that_stopped_for_good_is_found_by_comments(stage: Stage) -> None:
    async with open_server(stage.path, stage.handler, Deadlines(api_idle=0.2)):
        client = await stage.subscribe()
        assert await exactly(client, 8) == b": \n\n: \n\n"
        stage.feeds[0].end()
        await to_end(client)


async def test_at_the_servers_end_streams_send_their_last_event(stage: Stage) -> None:
    stage.feeds = [Feed() for _ in range(3)]
    async with open_server(stage.path, stage.handler, Deadlines()):
        clients = [await stage.subscribe() for _ in stage.feeds]
        stage.feeds[0].put(b"data: 1\n\n")  # not sent yet when the end comes
    for client, found in zip(clients, [b"data: 1\n\n" + LAST, LAST, LAST], strict=True):
        assert await to_end(client) == found
    assert all(feed.left.is_set() for feed in stage.feeds)


async def test_the_same_when_the_scope_around_the_server_is_cancelled(stage: Stage) -> None:
    with trio.CancelScope() as around:
        async with open_server(stage.path, stage.handler, Deadlines()):
            client = await stage.subscribe()
            around.cancel()
            await trio.sleep_forever()
    assert await to_end(client) == LAST


async def test_a_stream_that_ended_before_the_server_has_sent_everything(stage: Stage) -> None:
    """The event bus is closed first, and the server at once after it."""
    (feed,) = stage.feeds
    async with open_server(stage.path, stage.handler, Deadlines()):
        client = await stage.subscribe()
        feed.put(b"data: 1\n\n")
        feed.put(LAST)
        feed.end()
    assert await to_end(client) == b"data: 1\n\n" + LAST


@pytest.mark.parametrize("finishes", [True, False])
async def test_neither_a_stream_nor_its_client_holds_up_the_end(stage: Stage, finishes: bool) -> None:
    """One stream does not finish; of the other the client does not take what is left."""
    stage.feeds = [Feed(finishes=finishes)]
    (feed,) = stage.feeds
    with trio.fail_after(LIMIT_S):
        async with open_server(stage.path, stage.handler, Deadlines(shutdown_grace=0.4, api_write=1e6)):
            await stage.subscribe()
            if finishes:
                for _ in range(10):
                    feed.put(bytes(1 << 20))
    assert feed.left.is_set()


async def test_an_answer_that_nobody_takes_does_not_hold_up_the_end(stage: Stage) -> None:
    async def handler(_: Request) -> Response:
        return Response.of("x" * (1 << 20))

    with trio.fail_after(LIMIT_S):
        async with open_server(stage.path, handler, Deadlines(shutdown_grace=0.4, api_write=1e6)):
            client = await trio.open_unix_socket(stage.path)
            stage.clients.append(client)
            await client.send_all(GET)
            await exactly(client, 10)


async def test_streams_are_bounded_in_number(stage: Stage) -> None:
    first, *_ = stage.feeds = [Feed() for _ in range(MAX_STREAMS + 1)]
    async with open_server(stage.path, stage.handler, Deadlines()):
        clients = [await stage.subscribe() for _ in range(MAX_STREAMS)]
        more = await trio.open_unix_socket(stage.path)
        stage.clients.append(more)
        await more.send_all(GET)
        assert (await exactly(more, 14)) == b"HTTP/1.1 429 \r"
        await clients[0].aclose()
        await happens(first.left)
        await trio.testing.wait_all_tasks_blocked()
        await stage.subscribe()


class BreaksAtOnce(Feed):
    async def __anext__(self) -> bytes:
        raise ZeroDivisionError("oops")


class BreaksAtTheEnd(Feed):
    def finish(self) -> None:
        raise ZeroDivisionError("oops")


async def test_a_bug_in_a_stream_ends_it_and_nothing_else(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.feeds = [BreaksAtOnce(), BreaksAtTheEnd(), Feed()]
    with caplog.at_level(logging.CRITICAL):
        async with open_server(stage.path, stage.handler, Deadlines(shutdown_grace=0.4)):
            assert await to_end(await stage.subscribe()) == b""
            await stage.others_are_served()
            broken = await stage.subscribe()
            client = await stage.subscribe()
    assert await to_end(broken) == b""
    assert await to_end(client) == LAST
