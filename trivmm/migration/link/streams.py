"""The two halves over any trio stream, pages through Python: for virtual time, and for tests."""

from __future__ import annotations

from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.migration.link.halves import Connection, ReceivingHalf, SendingHalf, lost
from trivmm.migration.pages.frames import PAGE_FRAMES
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts, page_frames
from trivmm.migration.wire.frame import Frame

__all__ = ["stream_connection"]

RECEIVE_CHUNK: Final = 65536


def stream_connection(stream: trio.abc.Stream, name: str, deadlines: Deadlines) -> Connection:
    async def aclose() -> None:
        await trio.aclose_forcefully(stream)

    return Connection(name, StreamSender(name, deadlines, stream), StreamReceiver(name, deadlines, stream), aclose)


@attrs.define(eq=False)
class StreamSender(SendingHalf):
    _stream: trio.abc.SendStream

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise lost(self.name, error.__cause__ or "closed by the peer") from error

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        for frame, pages, zero in page_frames(dirty, limit):
            before = self.sequence
            try:
                await self.send(frame)
            finally:
                if self.sequence > before:  # whole on its way, also when the call was cancelled meanwhile
                    for page in pages:
                        dirty.discard(page)
                    counts.add(PageCounts(len(frame), len(pages) - zero, zero))
        return dirty.count == 0


@attrs.define(eq=False)
class StreamReceiver(ReceivingHalf):
    _stream: trio.abc.ReceiveStream

    async def receive(self, sink: PageSink | None = None) -> Frame:
        while True:
            frame = await self.whole_frame()
            if sink is None or frame.type not in PAGE_FRAMES:
                return frame
            sink.take(frame)
            sink.report()

    async def read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE_CHUNK))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise lost(self.name, error.__cause__ or "closed by the peer") from error
