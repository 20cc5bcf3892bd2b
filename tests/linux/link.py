"""The other end of a network interface, for whoever connects: the guest's side now, another one after a move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def answering(path: str, answer: Callable[[bytes], bytes | None]) -> AsyncIterator[None]:
    """``answer``: what comes back for a frame, None for nothing."""

    async def serve(peer: trio.SocketStream) -> None:
        held = b""
        async for data in peer:
            held += data
            while len(held) >= 4 and len(held) >= (end := 4 + int.from_bytes(held[:4], "big")):
                back = answer(held[4:end])
                held = held[end:]
                if back is not None:
                    await peer.send_all(len(back).to_bytes(4, "big") + back)

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(path)
        sock.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
            yield
            nursery.cancel_scope.cancel()
