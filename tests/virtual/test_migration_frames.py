"""A middle box that loses, repeats or swaps whole frames, in virtual time.

Each frame is good in itself, CRCs and all: only its place in the stream says that something is amiss.
"""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.errors import DeadlineError, ProtocolError, TrivmmError
from trivmm.migration.progress import MigrationReport
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.migration import Tap, TappedStream
from trivmm.testing.world import World, late_once

AFTER_COMMIT = (MessageType.COMMIT, MessageType.RUNNING, MessageType.DONE)


def busy_world() -> World:
    """Several frames of pages and of zero pages a round, an undone switchover, two regions."""
    world = World.make()
    for page in range(200):
        world.source.memory.write(page * 4096, bytes([page % 255 + 1]) * 4096)
        world.source.memory.write((1 << 32) + page * 4096, bytes(4096) if page % 3 else b"high")
    late_once(world)
    return world


class MiddleBox:
    """Does ``how`` to frame ``index`` of the first connection, and ``renumbers`` the frames or not. ``kinds``: what
    came here, in order."""

    def __init__(self, then: Tap, how: str, index: int, renumbers: bool) -> None:
        self.kinds: list[MessageType] = []
        self._then, self._how, self._index, self._renumbers = then, how, index, renumbers
        self._held: list[bytes] = []
        self._passed = 0
        self._first: TappedStream | None = None

    async def tap(self, stream: TappedStream, data: bytes) -> bytes | None:
        passed = await self._then(stream, data)
        self._first = self._first or stream
        if passed is None or stream is not self._first:
            return passed
        self.kinds.append(MessageType(passed[6]))
        out, self._held = [passed, *self._held], []
        if len(self.kinds) - 1 == self._index:
            out = [passed] * 2 if self._how == "repeat" else []
            self._held = [passed] if self._how == "swap" else []
        for frame in out:
            await stream.inner.send_all(wire.numbered(frame, self._passed) if self._renumbers else frame)
            self._passed += 1
        return None


def boxed(world: World, side: str, how: str = "", index: int = -1, *, renumbers: bool = False) -> MiddleBox:
    box = MiddleBox(getattr(world.net, f"{side}_tap"), how, index, renumbers)
    setattr(world.net, f"{side}_tap", box.tap)
    return box


async def frames_of(side: str) -> list[MessageType]:
    world = busy_world()
    box = boxed(world, side)
    await world.run()
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts == 2
    world.close()
    return box.kinds


@pytest.mark.parametrize("how", ["lose", "repeat", "swap"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_middle_box_at_every_frame(autojump_clock: trio.testing.MockClock, side: str, how: str) -> None:
    kinds = await frames_of(side)
    if side == "source":
        assert kinds.count(MessageType.PAGES) >= 5
        assert {MessageType.ZERO, MessageType.UNDO} < set(kinds)
    for index, kind in enumerate(kinds):
        world = busy_world()
        box = boxed(world, side, how, index)
        await world.run()  # checks that there is one copy, and that the destination's pages are the source's
        told = f"{how} {kind.name} at {index}: {world.sent!r}, {world.taken!r}"
        assert box.kinds[index] is kind, told
        if kind in AFTER_COMMIT or (side, how, kind) == ("destination", "repeat", MessageType.READY):
            # A verdict, whatever the box did: asked for on a new connection where it was lost.
            assert world.source.running != world.destination.running, told
        else:
            assert world.source.running, told
            assert not world.destination.running, told
            assert isinstance(world.sent, TrivmmError), told
            ends = (world.sent, world.taken)
            named = any("was due" in str(each) for each in ends)
            if kind in (MessageType.PAGES, MessageType.ZERO) or how == "repeat":
                assert named, told
            else:  # without a frame after the lost one, somebody waits for it in vain
                assert named or any(isinstance(each, DeadlineError) for each in ends), told
        world.close()


@pytest.mark.parametrize("how", ["lose", "repeat"])
async def test_pages_that_are_short_in_a_stream_that_was_renumbered(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    """The count in ROUND_END stands alone, too: for a box that speaks the protocol, and for a side that is wrong."""
    kinds = await frames_of("source")
    for index, kind in enumerate(kinds):
        if kind not in (MessageType.PAGES, MessageType.ZERO):
            continue
        world = busy_world()
        boxed(world, "source", how, index, renumbers=True)
        await world.run()
        assert isinstance(world.taken, ProtocolError)
        assert "pages landed" in str(world.taken)
        assert "were sent" in str(world.sent)
        assert world.source.running
        world.close()


async def test_a_cancelled_send_of_pages_counts_what_is_whole_on_its_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """An attempt that is cut off while a frame of pages goes out: the frame ends, and its pages count as sent."""
    world = busy_world()
    cut = 0

    async def slow(stream: TappedStream, data: bytes) -> bytes:
        nonlocal cut
        if data[6] == MessageType.PAGES and not world.source.running and not cut:
            cut += 1
            await trio.sleep(0.4)  # longer than the downtime, shorter than the downtime and the grace
        return data

    world.net.source_tap = slow
    await world.run()
    assert cut
    assert isinstance(world.sent, MigrationReport)
    assert world.sent.attempts > 1
    assert isinstance(world.taken, MigrationReport)
    assert (world.sent.pages, world.sent.zero_pages) == (world.taken.pages, world.taken.zero_pages)
    world.close()
