"""One connection of a migration in its two halves: what goes out, and what comes in. Frames and guest pages, in order.

A half belongs to one task at a time; the two are independent, but for the connection that they share. Both bound every
wait for the peer by the ``stall`` deadline: that long until a frame begins, and that long again until it is whole. A
peer that lets a byte trickle now and then gains nothing, and a link that takes longer for half a megabyte is no good
for migrations.

A *control* frame may be waited for again after a cancelled wait (nothing is lost); a frame that was cut short on its
way out, or pages cut short on their way in, break their half for good. The sender numbers its frames from 0, one when
it is whole on its way, and the receiver checks the numbers of what comes.

``sockets`` and ``streams`` have one kind each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationError
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.wire.frame import Frame, FrameReader, numbered

__all__ = ["Connection", "FrameReceiver", "FrameSender", "LinkLost", "ReceivingHalf", "SendingHalf", "lost"]

GRACE_MS: Final = 200  # how long a cancelled sender may take to end its frame, so that the stream stays usable
SILENT: Final = "the peer is silent"
TRICKLES: Final = "the peer's frame does not end"
TAKES_NOTHING: Final = "the peer takes no data"


class LinkLost(MigrationError):
    """The connection ended or broke: the peer closed it, died, or the network did. Which of them, nobody can tell."""


def lost(name: str, why: object) -> LinkLost:
    return LinkLost(f"{name}: the connection is lost ({why})")


class FrameSender(Protocol):
    """What goes out."""

    async def send(self, data: bytes) -> None:
        """Send a whole frame, which gets its number here. :raises LinkLost: / :raises DeadlineError: (stall)."""

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        """Send about ``limit`` dirty pages, discard them from ``dirty`` and count them. True when none is left.

        A cancelled call stops between two frames and leaves the rest in ``dirty``."""


class FrameReceiver(Protocol):
    """What comes in."""

    async def receive(self, sink: PageSink | None = None) -> Frame:
        """The next frame. With ``sink``, page frames go there instead.

        :raises ProtocolError: / :raises LinkLost: / :raises DeadlineError: (stall)."""


@attrs.frozen(eq=False)
class Connection:
    """``name`` says which, for messages. ``aclose``: idempotent, quick, also when cancelled."""

    name: str
    sender: FrameSender
    receiver: FrameReceiver
    aclose: Callable[[], Awaitable[None]]


@attrs.define(eq=False)
class SendingHalf:
    """What both kinds of sender share. ``broken``: a frame was cut short."""

    name: str
    deadlines: Deadlines
    sequence: int = attrs.field(default=0, init=False)  # of the next frame to be sent
    broken: bool = attrs.field(default=False, init=False)

    async def send(self, data: bytes) -> None:
        self.check_whole()
        frame = numbered(data, self.sequence)
        await _with_grace(lambda: self._send_frame(frame))

    def check_whole(self) -> None:
        if self.broken:
            raise lost(self.name, "a frame was cut short")

    async def _send_frame(self, data: bytes) -> None:
        self.broken = True
        with self.deadlines.enter("stall", f"{self.name}: {TAKES_NOTHING}"):
            await self.write(data)
        self.broken = False
        self.sequence += 1

    async def write(self, data: bytes) -> None:
        """All of it. :raises LinkLost: in a kind's own words."""
        raise NotImplementedError


@attrs.define(eq=False)
class ReceivingHalf:
    """What both kinds of receiver share."""

    name: str
    deadlines: Deadlines
    reader: FrameReader = attrs.field(factory=FrameReader, init=False)

    async def whole_frame(self) -> Frame:
        """The next frame: ``stall`` until it begins, and ``stall`` until it is whole. What came stays in the reader."""
        if not self.reader.pending:
            with self.deadlines.enter("stall", f"{self.name}: {SILENT}"):
                self.reader.feed(await self._more())
        with self.deadlines.enter("stall", f"{self.name}: {TRICKLES}"):
            while (frame := self.reader.next_frame()) is None:
                self.reader.feed(await self._more())
        return frame

    async def _more(self) -> bytes:
        data = await self.read()
        if not data:
            where = " in the middle of a frame" if self.reader.pending else ""
            raise lost(self.name, f"closed by the peer{where}")
        return data

    async def read(self) -> bytes:
        """Some bytes; none at the end. :raises LinkLost: in a kind's own words."""
        raise NotImplementedError


async def _with_grace(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work``; when cancelled in the middle, let it go on for GRACE_MS before it is."""
    await trio.lowlevel.checkpoint_if_cancelled()
    failure: Exception | None = None
    scope = trio.CancelScope(shield=True)

    async def hurry_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            scope.deadline = trio.current_time() + GRACE_MS / 1000

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry_when_cancelled)
        with scope:
            try:
                await work()
            except Exception as error:
                failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
