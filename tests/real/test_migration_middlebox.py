"""A box between real sockets that loses, repeats, swaps or damages frames of pages: the C intake takes none of it."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import attrs
import pytest
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationError, ProtocolError, TrivmmError
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.link.transports import parse_url
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationReport
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource
from trivmm.testing.torture.box import Fate, open_box

RAM = ((0, 4 << 20), (1 << 32, 2 << 20))
LIMITS = Deadlines(commit=5.0, stall=20.0, downtime=10.0)
PATIENT = SendOptions(downtime_ms=10_000, timeout_s=120)
TRIALS = 12  # for each way to go wrong and each kind of socket


FATES = {"lose": Fate(lost=True), "repeat": Fate(again=0), "swap": Fate(lost=True, again=1)}  # after the next one


@attrs.define
class Harm:
    """Does ``how`` to the ``index``-th frame of pages, and counts them."""

    how: str
    index: int
    page_frames: int = 0

    async def __call__(self, message: MessageType, nth: int, before: bool) -> Fate:
        await trio.lowlevel.checkpoint()
        if not before or message not in (MessageType.PAGES, MessageType.ZERO):
            return Fate()
        self.page_frames += 1
        if self.page_frames - 1 != self.index:
            return Fate()
        return Fate(damaged=random.Random(self.index).random()) if self.how == "damage" else FATES[self.how]


def addresses(kind: str, folder: Path) -> tuple[str, str]:
    """The receiver's URL and the box's."""
    if kind == "unix":
        return f"unix:{folder}/m.sock", f"unix:{folder}/box.sock"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "tcp:127.0.0.1:0", f"tcp:127.0.0.1:{probe.getsockname()[1]}"


async def move(kind: str, folder: Path, harm: Harm) -> tuple[MigrationReport | TrivmmError, ...]:
    """What came of it on both sides; fails the test where a copy is wrong, or there are two, or none."""
    lock, chance = DiskLock(), random.Random(harm.index)
    source, destination = FakeSource(lock, LIMITS, RAM), FakeDestination(lock, LIMITS, RAM)
    for gpa, size in RAM:
        for page in range(size // 4096):
            source.memory.write(gpa + page * 4096, chance.randbytes(64) * 64 if page % 5 else bytes(4096))
    ends: list[MigrationReport | TrivmmError] = []
    url, front = addresses(kind, folder)
    try:
        async with (
            trio.open_nursery() as nursery,
            open_receiver(url, LIMITS, nursery) as receiver,
            open_box(parse_url(front, "front"), parse_url(receiver.url, "target"), harm),
            trio.open_nursery() as both,
        ):

            async def sending() -> None:
                try:
                    ends.append(await send(source, socket_dialer(front, LIMITS), PATIENT))
                except TrivmmError as error:
                    ends.append(error)

            async def receiving() -> None:
                try:
                    ends.append((await receiver.receive(destination.factory))[1])
                except TrivmmError as error:
                    ends.append(error)

            both.start_soon(sending)
            both.start_soon(receiving)
        assert source.running != destination.running
        if destination.running:
            assert source.contents() == destination.contents()
        return tuple(ends)
    finally:
        source.close()
        destination.close()


@pytest.mark.parametrize("how", ["lose", "repeat", "swap", "damage"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_frame_of_pages_out_of_its_place_or_damaged_ends_the_migration(
    kind: str, how: str, tmp_path: Path
) -> None:
    with trio.fail_after(240):
        clean = Harm("", -1)
        ends = await move(kind, tmp_path, clean)
        assert all(isinstance(each, MigrationReport) for each in ends), ends
        assert clean.page_frames >= TRIALS
        for index in random.Random(kind + how).sample(range(clean.page_frames), TRIALS):
            harm = Harm(how, index)
            ends = await move(kind, tmp_path, harm)
            assert harm.page_frames > index
            assert any(isinstance(each, ProtocolError) for each in ends), (index, ends)  # the destination's
            says = "the stream is damaged" if how == "damage" else "was due: the link"
            assert all(isinstance(each, MigrationError) and says in str(each) for each in ends), ends
