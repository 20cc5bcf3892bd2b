"""What stands on the link between source and destination: it passes whole frames on, and knows which.

The first connection is the migration's; later ones are questions about its verdict, and are only passed on or kept
away. For each frame of the first one the box asks its owner what to do with it (``Hook``). What it was told to do to
the link stays so; ``cut`` also keeps new connections away until :meth:`Box.heal`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from trivmm.errors import ProtocolError
from trivmm.migration.link.transports import Address, UnixAddress
from trivmm.migration.wire.frame import HEADER_BYTES, MessageType, parse_header
from trivmm.unwrapped import unwrapped_nursery

__all__ = ["Box", "Fate", "Hook", "open_box"]

CHUNK: Final = 1 << 16
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() resets


@attrs.frozen
class Fate:
    """A frame goes on after ``delay_s``, or not at all (``lost``); ``again``: once more, after so many later ones that
    go the same way (0: at once), and at the latest before STATE, which ends the pages. ``damaged``: a bit flips, at
    that share of what comes after its header."""

    delay_s: float = 0.0
    lost: bool = False
    again: int | None = None
    damaged: float | None = None


Hook = Callable[[MessageType, int, bool], Awaitable[Fate]]  # (message, nth of its kind, before it goes on)


@attrs.define(eq=False)
class _Pair:
    """One connection, with the one that the box made for it."""

    near: trio.SocketStream
    far: trio.SocketStream
    dead: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    silent: bool = False

    async def close(self) -> None:
        self.dead.cancel()
        for stream in (self.near, self.far):
            await trio.aclose_forcefully(stream)

    async def reset(self) -> None:
        for stream in (self.near, self.far):
            with contextlib.suppress(OSError):  # closed already
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await self.close()


@attrs.define(eq=False)
class Box:
    """``passed``: when each message first went on, by trio's clock; ``seen``: when it came."""

    target: Address
    hook: Hook
    seen: dict[MessageType, float] = attrs.field(factory=dict)
    passed: dict[MessageType, float] = attrs.field(factory=dict)
    _counts: dict[MessageType, int] = attrs.field(factory=dict)
    _first: _Pair | None = None
    _pairs: list[_Pair] = attrs.field(factory=list)
    _away: bool = False

    # --- what can be done to the link --------------------------------------------------------------------------

    async def close_link(self) -> None:
        if self._first is not None:
            await self._first.close()

    async def reset_link(self) -> None:
        """A reset as far as the family has one: a unix socket only breaks."""
        if self._first is not None:
            await self._first.reset()

    def silence(self) -> None:
        """Nothing goes on any more, in either direction, and nobody is told."""
        if self._first is not None:
            self._first.silent = True

    def cut(self) -> None:
        """:meth:`silence`, of questions too; new connections are closed at sight."""
        self._away = True
        for pair in self._pairs:
            pair.silent = True

    def heal(self) -> None:
        """New connections are served again."""
        self._away = False

    # --- connections -------------------------------------------------------------------------------------------

    async def serve(self, near: trio.SocketStream) -> None:
        """A task for each connection; ends with it. The listener closes the stream at its end."""
        if self._away:
            return
        try:
            far = await _dial(self.target)
        except OSError:
            return  # nobody listens there: the peer sees a connection that closes at once
        pair = _Pair(near, far)
        first = self._first is None
        if first:
            self._first = pair
        self._pairs.append(pair)
        try:
            with pair.dead:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, pair, near, far, first)
                    nursery.start_soon(self._pump, pair, far, near, first)
        finally:
            self._pairs.remove(pair)
            await trio.aclose_forcefully(far)

    async def _pump(self, pair: _Pair, here: trio.SocketStream, there: trio.SocketStream, first: bool) -> None:
        """One direction, until it ends or breaks; its end goes on, too. What the one who left said before it did comes
        the other way, and is passed on."""
        try:
            if first:
                await self._pump_frames(pair, here, there)
            else:
                async for data in here:
                    await _unless_silent(pair)
                    await there.send_all(data)
            await _unless_silent(pair)
            await there.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not pair.silent:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await there.send_eof()

    async def _pump_frames(self, pair: _Pair, here: trio.SocketStream, there: trio.SocketStream) -> None:
        late: list[tuple[int, bytes]] = []  # (after how many frames, frame)
        while (frame := await _read_frame(here)) is not None:
            kind, data = frame
            self.seen.setdefault(kind, trio.current_time())
            nth = self._counts[kind] = self._counts.get(kind, 0) + 1
            await _unless_silent(pair)
            fate = await self.hook(kind, nth, True)
            await trio.sleep(fate.delay_s)
            await _unless_silent(pair)
            if kind is MessageType.STATE:
                for _, each in late:
                    await there.send_all(each)
                late.clear()
            if fate.damaged is not None and len(data) > HEADER_BYTES:
                place = HEADER_BYTES + int(fate.damaged * (len(data) - HEADER_BYTES))
                data = data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]
            if not fate.lost:
                await there.send_all(data)
                self.passed.setdefault(kind, trio.current_time())
            if fate.again is not None:
                late.append((fate.again + 1, data))
            late = [(left - 1, each) for left, each in late]
            for left, each in late:
                if left == 0:
                    await there.send_all(each)
            late = [(left, each) for left, each in late if left > 0]
            await self.hook(kind, nth, False)


async def _unless_silent(pair: _Pair) -> None:
    """For ever, once the link is silent. Ends with the box."""
    if pair.silent:
        await trio.sleep_forever()


async def _read_frame(stream: trio.SocketStream) -> tuple[MessageType, bytes] | None:
    """None at the end; bytes that are no frame, or not all of one, are an end, too: they are not passed on."""
    head = await _exactly(stream, HEADER_BYTES)
    if head is None:
        return None
    try:
        header = parse_header(head)
    except ProtocolError:
        return None
    rest = await _exactly(stream, header.length)
    return None if rest is None else (header.type, head + rest)


async def _exactly(stream: trio.SocketStream, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some(min(size - len(data), CHUNK))
        if not piece:
            return None
        data += piece
    return bytes(data)


async def _dial(address: Address) -> trio.SocketStream:
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    return await trio.open_tcp_stream(address.host, address.port)


async def _listen(address: Address) -> trio.SocketListener:
    if isinstance(address, UnixAddress):
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(address.path)
        sock.listen(16)
        return trio.SocketListener(sock)
    return (await trio.open_tcp_listeners(address.port, host=address.host))[0]


@asynccontextmanager
async def open_box(front: Address, target: Address, hook: Hook) -> AsyncIterator[Box]:
    """A box that listens at ``front``, for the length of the block; every connection through it ends with it."""
    listener = await _listen(front)
    try:
        async with unwrapped_nursery() as nursery:
            box = Box(target, hook)
            await nursery.start(trio.serve_listeners, box.serve, [listener])
            yield box
            nursery.cancel_scope.cancel()
    finally:
        listener.socket.close()  # no await: this may be the end by a cancellation
        if isinstance(front, UnixAddress):
            with contextlib.suppress(OSError):
                os.unlink(front.path)
