"""The box on the link between two processes: which frames go on, and what becomes of connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from trivmm.migration.link.transports import UnixAddress
from trivmm.migration.wire.frame import HEADER_BYTES, MessageType, encode_frame, parse_header
from trivmm.testing.torture.box import Box, Fate, Hook, open_box

LIMIT_S = 20
_T = MessageType


@attrs.define(eq=False)
class Ends:
    """Both ends of the first link through the box, and what the hook was asked."""

    box: Box
    front: str
    near: trio.SocketStream
    far: trio.SocketStream
    _accepted: trio.MemoryReceiveChannel[trio.SocketStream]
    _open: list[trio.SocketStream]

    async def dial(self) -> trio.SocketStream:
        self._open.append(await trio.open_unix_socket(self.front))
        return self._open[-1]

    async def accept(self) -> trio.SocketStream:
        self._open.append(await self._accepted.receive())
        return self._open[-1]


def frame(kind: MessageType, body: bytes = b"{}") -> bytes:
    return encode_frame(kind, body)


async def passes(message: MessageType, nth: int, before: bool) -> Fate:
    return Fate()


def at(message: MessageType, nth: int, fate: Fate) -> Hook:
    async def hook(found: MessageType, number: int, before: bool) -> Fate:
        return fate if before and (found, number) == (message, nth) else Fate()

    return hook


@asynccontextmanager
async def ends(folder: Path, hook: Hook = passes) -> AsyncIterator[Ends]:
    front, behind = f"{folder}/front", f"{folder}/behind"
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(behind)
    sock.listen(4)
    put, accepted = trio.open_memory_channel[trio.SocketStream](4)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery, open_box(UnixAddress(front), UnixAddress(behind), hook) as box:

            async def accept() -> None:
                async with trio.SocketListener(sock) as listener:
                    while True:
                        await put.send(await listener.accept())

            nursery.start_soon(accept)
            async with await trio.open_unix_socket(front) as near:
                await near.send_all(frame(_T.SETUP))
                async with await accepted.receive() as far:
                    both = Ends(box, front, near, far, accepted, [])
                    yield both
                    for stream in both._open:
                        await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()
    assert not Path(front).exists()


async def read(stream: trio.SocketStream, count: int) -> list[MessageType]:
    """The types of the next frames; what their numbers are is the protocol's affair, and not the box's."""
    data, found = b"", list[MessageType]()
    while len(found) < count:
        data += await stream.receive_some()
        while (
            len(data) >= HEADER_BYTES
            and len(data) >= HEADER_BYTES + (header := parse_header(data[:HEADER_BYTES])).length
        ):
            found.append(header.type)
            data = data[HEADER_BYTES + header.length :]
    return found


async def test_frames_go_on_both_ways_and_the_hook_sees_each_twice(tmp_path: Path) -> None:
    asked: list[tuple[MessageType, int, bool]] = []

    async def hook(message: MessageType, nth: int, before: bool) -> Fate:
        asked.append((message, nth, before))
        return Fate()

    async with ends(tmp_path, hook) as both:
        await both.near.send_all(frame(_T.ROUND_END) + frame(_T.ROUND_END))
        assert await read(both.far, 3) == [_T.SETUP, _T.ROUND_END, _T.ROUND_END]
        await both.far.send_all(frame(_T.ROUND_ACK))
        assert await read(both.near, 1) == [_T.ROUND_ACK]
        await both.near.send_eof()
        assert await both.far.receive_some() == b""
        await both.far.send_all(frame(_T.READY))  # half closed is not closed
        assert await read(both.near, 1) == [_T.READY]
    assert [each for each in asked if each[0] is _T.ROUND_END] == [
        (_T.ROUND_END, 1, True),
        (_T.ROUND_END, 1, False),
        (_T.ROUND_END, 2, True),
        (_T.ROUND_END, 2, False),
    ]
    assert set(both.box.passed) == {_T.SETUP, _T.ROUND_END, _T.ROUND_ACK, _T.READY}


@pytest.mark.parametrize(
    ("fate", "arrive"),
    [
        (Fate(lost=True), [_T.ZERO, _T.STATE]),
        (Fate(again=0), [_T.ROUND_END, _T.ROUND_END, _T.ZERO, _T.STATE]),
        (Fate(again=1), [_T.ROUND_END, _T.ZERO, _T.ROUND_END, _T.STATE]),
        (Fate(again=9), [_T.ROUND_END, _T.ZERO, _T.ROUND_END, _T.STATE]),
        (Fate(delay_s=0.05), [_T.ROUND_END, _T.ZERO, _T.STATE]),
    ],
)
async def test_what_becomes_of_one_frame(tmp_path: Path, fate: Fate, arrive: list[MessageType]) -> None:
    async with ends(tmp_path, at(_T.ROUND_END, 1, fate)) as both:
        await both.near.send_all(frame(_T.ROUND_END) + encode_frame(_T.ZERO, bytes(8)) + frame(_T.STATE))
        assert await read(both.far, 1 + len(arrive)) == [_T.SETUP, *arrive]


async def is_closed(stream: trio.SocketStream) -> bool:
    try:
        return await stream.receive_some() == b""
    except trio.BrokenResourceError:
        return True


@pytest.mark.parametrize("end", [Box.close_link, Box.reset_link])
async def test_a_link_that_is_ended_ends_for_both(tmp_path: Path, end: Callable[[Box], Awaitable[None]]) -> None:
    async with ends(tmp_path) as both:
        assert await read(both.far, 1) == [_T.SETUP]
        await end(both.box)
        assert await is_closed(both.near)
        assert await is_closed(both.far)
        later = await both.dial()  # a question: passed on as it is
        await later.send_all(b"anything")
        assert await (await both.accept()).receive_some() == b"anything"


async def hears_nothing(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(0.1) as scope:
        await stream.receive_some()
    return scope.cancelled_caught


async def test_a_silent_link_tells_nobody_and_new_ones_are_served(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        assert await read(both.far, 1) == [_T.SETUP]
        both.box.silence()
        await both.near.send_all(frame(_T.ROUND_END))
        await both.near.aclose()
        assert await hears_nothing(both.far)
        await both.dial()
        await both.accept()


async def test_a_cut_keeps_new_links_away_until_it_heals(tmp_path: Path) -> None:
    async with ends(tmp_path) as both:
        assert await read(both.far, 1) == [_T.SETUP]
        both.box.cut()
        assert await is_closed(await both.dial())
        both.box.heal()
        later = await both.dial()
        await later.send_all(b"anything")
        assert await (await both.accept()).receive_some() == b"anything"
        await both.near.send_all(frame(_T.ROUND_END))
        assert await hears_nothing(both.far)


async def test_a_box_in_front_of_nobody_closes(tmp_path: Path) -> None:
    front = UnixAddress(f"{tmp_path}/front")
    async with open_box(front, UnixAddress(f"{tmp_path}/nobody"), passes):
        with trio.fail_after(LIMIT_S):
            async with await trio.open_unix_socket(front.path) as near:
                assert await is_closed(near)
