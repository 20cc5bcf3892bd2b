"""Precopy: rounds over the dirty pages while the guest runs, until the plan (``plan``) says that the rest fits.

Part of a sender, in its task. A round sends what the harvest before it found; logs are cleared by the harvest, that
is *before* the copy, so a page written while it is sent is dirty again and goes in the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Final

import attrs
import trio

from trivmm.errors import ProtocolError
from trivmm.migration.link.control import Link
from trivmm.migration.link.roles import PageLink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.port import SourceMachine
from trivmm.migration.progress import Round, Tracker
from trivmm.migration.source.plan import Estimates
from trivmm.migration.wire.frame import PAGE_BYTES
from trivmm.migration.wire.messages import RoundAck

__all__ = ["Rounds"]

SLICE_PAGES: Final = 32768  # 128 MiB between two looks at the clock: a tenth of a second of a fast link


@attrs.define(eq=False)
class Rounds:
    """The dirty sets of every region, and the rounds that empty them over ``page_links``."""

    source: SourceMachine
    control: Link
    page_links: tuple[PageLink, ...]
    tracker: Tracker
    estimates: Estimates
    dirty: list[DirtySet] = attrs.field(factory=list)
    _harvested: float | None = None

    def __attrs_post_init__(self) -> None:
        self.dirty = [DirtySet.of(region) for region in self.source.memory.regions]

    @property
    def remaining(self) -> int:
        return sum(each.count for each in self.dirty)

    def add_touched(self) -> None:
        for each in self.dirty:
            each.add_touched()
        self.tracker.remaining_pages = self.remaining

    async def harvest(self, *, stopped: bool = False) -> int:
        """Add what was written since the last harvest; gives the pages to send now. ``stopped``: no vCPU runs."""
        now, before = trio.current_time(), self.remaining
        await self.source.dirty_log.harvest([each.bits for each in self.dirty], stopped=stopped)
        total = self.remaining
        if self._harvested is not None and now > self._harvested:
            self.tracker.dirty_rate = (total - before) / (now - self._harvested)
        self._harvested = now
        self.tracker.remaining_pages = total
        return total

    async def send_round(self, *, last: bool, give_up: Callable[[], bool] | None = None) -> bool:
        """Send every dirty page and wait for the destination's word that they landed. False, with the rest still
        in the sets, when ``give_up`` said so between two slices."""
        tracker = self.tracker
        tracker.round += 1
        start, start_s = trio.current_time(), tracker.elapsed_s
        total, whole = PageCounts(), True
        turns = cycle(self.page_links)  # each takes a slice in turn
        for each in self.dirty:
            while each.count:
                try:
                    total.add(await next(turns).send_pages(each, SLICE_PAGES))
                finally:
                    self._report()
                if give_up is not None and give_up():
                    whole = False
                    break
        await self._barrier()
        seconds = max(trio.current_time() - start, 1e-6)
        if total.bytes > 64 * PAGE_BYTES or not self.estimates.bandwidth:  # a short round measures the round trip only
            self.estimates.bandwidth = tracker.rate = max(total.bytes, 1) / seconds
        tracker.add_round(Round(tracker.round, start_s, seconds, total.bytes, total.pages, total.zero_pages, last))
        tracker.push()
        if not last:
            asked = trio.current_time()
            await self._barrier()  # once more, with nothing on the way: that is the round trip
            self.estimates.round_trip_ms = (trio.current_time() - asked) * 1000
        return whole

    def _report(self) -> None:
        sent, tracker = PageCounts(), self.tracker
        for each in self.page_links:
            sent.add(each.sent)
        tracker.bytes_sent, tracker.pages, tracker.zero_pages = sent.bytes, sent.pages, sent.zero_pages
        tracker.remaining_pages = self.remaining
        tracker.push()

    async def _barrier(self) -> None:
        """ROUND_END on every page link, and its answer: all pages sent so far have landed, by the destination's own
        count."""
        number = self.tracker.round
        for each in self.page_links:
            await each.end_round(number)
        answer = await self.control.expect(RoundAck)
        if answer.round != number:
            raise ProtocolError(f"ROUND_ACK of round {answer.round}, {number} was due")
