"""Rounds over page links, however many: pages in turn, ROUND_END on each, one ROUND_ACK on CONTROL."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio.testing

from trivmm.errors import ProtocolError
from trivmm.migration.link.roles import LandingLink
from trivmm.migration.pages.land import MemfdLanding, PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts, page_frames
from trivmm.migration.progress import Tracker
from trivmm.migration.source.plan import Estimates
from trivmm.migration.source.precopy import Rounds
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.frame import FrameReader
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource


@attrs.define(eq=False)
class Carrier:
    """A page link whose frames land at once; ``lose``: the first is lost on its way."""

    landing: LandingLink
    lose: bool = False
    sent: PageCounts = attrs.field(factory=PageCounts)

    async def send_pages(self, dirty: DirtySet, limit: int) -> PageCounts:
        counts, reader = PageCounts(), FrameReader()
        for frame, pages, zero in page_frames(dirty, 3):  # small pieces, so that both have some
            counts.add(PageCounts(len(frame), len(pages) - zero, zero))
            for page in pages:
                dirty.discard(page)
            reader.feed(frame)
            whole = reader.next_frame()
            assert whole is not None
            if not self.lose:
                self.landing.sink.take(whole)
            self.lose = False
            break
        self.sent.add(counts)
        return counts

    async def end_round(self, number: int) -> None:
        self.landing.end_round(m.RoundEnd(number, self.sent.all_pages))


@attrs.define(eq=False)
class Control:
    """Acknowledges a round that has ended on every page link."""

    carriers: list[Carrier]
    rounds: int = 0

    async def expect(self, kind: type[Any]) -> m.RoundAck:
        assert kind is m.RoundAck
        self.rounds += 1
        assert {each.landing.ended for each in self.carriers} == {self.rounds}
        return m.RoundAck(1)


@pytest.mark.parametrize("links", [1, 2, 3])
@pytest.mark.parametrize("lost", [False, True], ids=["whole", "one frame lost"])
async def test_a_round_ends_on_every_link_and_is_acknowledged_once(
    autojump_clock: trio.testing.MockClock, links: int, lost: bool
) -> None:
    lock = DiskLock()
    source, destination = FakeSource(lock), FakeDestination(lock)
    for page in range(20):
        source.memory.write(page * 4096, bytes([page + 1]) * 4096)
    landing = MemfdLanding(destination.memory)
    carriers = [Carrier(LandingLink(PageSink(landing))) for _ in range(links)]
    carriers[-1].lose = lost
    control, tracker = Control(carriers), Tracker()
    rounds: Any = Rounds(source, control, tuple(carriers), tracker, Estimates())  # type: ignore[arg-type]
    rounds.add_touched()
    if lost:
        with pytest.raises(ProtocolError, match="pages landed"):
            await rounds.send_round(last=True)
    else:
        assert await rounds.send_round(last=True)
        assert control.rounds == 1
        assert source.contents() == destination.contents()
        assert tracker.pages == sum(each.sent.pages for each in carriers) == 20
        assert all(each.sent.pages for each in carriers)
    source.close()
    destination.close()
