"""Precopy: rounds over the dirty pages while the guest runs, until the rest would fit into the downtime.

Part of a sender, in its task. A round sends what the harvest before it found; logs are cleared by the harvest, that
is *before* the copy, so a page written while it is sent is dirty again and goes in the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import trio

from trivmm.errors import ProtocolError
from trivmm.migration.link.control import Link
from trivmm.migration.pages.land import DirtySet, PageCounts
from trivmm.migration.port import SourceMachine
from trivmm.migration.progress import PAGE_BYTES, Downtime, Round, Tracker
from trivmm.migration.wire.messages import RoundAck, RoundEnd

__all__ = ["Estimates", "Rounds"]

SLICE_PAGES: Final = 32768  # 128 MiB between two looks at the clock: a tenth of a second of a fast link
FIRST_STATE_MS: Final = 1.0  # saving, sending and loading state: hopeful, until an attempt has measured it
FIRST_STOP_MS: Final = 1.0


@attrs.define(eq=False)
class Estimates:
    """What the next switchover is expected to take. ``bandwidth`` in bytes a second, 0 while unknown; the rest in
    milliseconds, fed by what was measured."""

    bandwidth: float = 0.0
    round_trip_ms: float = 0.0
    stop_ms: float = FIRST_STOP_MS
    state_ms: float = FIRST_STATE_MS
    resume_ms: float = 0.0

    def downtime(self, pages: int) -> Downtime:
        """Expected parts of the downtime with ``pages`` still to send."""
        moving = pages * PAGE_BYTES / self.bandwidth * 1000 if self.bandwidth else (1e9 if pages else 0.0)
        return Downtime(
            stop_ms=self.stop_ms,
            pages_ms=moving + self.round_trip_ms,
            state_ms=self.state_ms + self.round_trip_ms,
            resume_ms=self.resume_ms + self.round_trip_ms,
        )


@attrs.define(eq=False)
class Rounds:
    """The dirty sets of every region, and the rounds that empty them."""

    source: SourceMachine
    link: Link
    tracker: Tracker
    estimates: Estimates
    dirty: list[DirtySet] = attrs.field(factory=list)
    sent_pages: int = 0  # on this connection, in all rounds and in pieces of undone ones
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
        tracker, before = self.tracker, self.remaining
        tracker.round += 1
        start, start_s = trio.current_time(), tracker.elapsed_s
        total, whole = PageCounts(), True
        for each in self.dirty:
            while each.count:
                counts = PageCounts()
                try:
                    await self.link.send_pages(each, SLICE_PAGES, counts)
                finally:
                    self._account(counts, total, before)
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

    def _account(self, counts: PageCounts, total: PageCounts, before: int) -> None:
        total.bytes += counts.bytes
        total.pages += counts.pages
        total.zero_pages += counts.zero_pages
        self.sent_pages += counts.pages + counts.zero_pages
        self.tracker.bytes_sent += counts.bytes
        self.tracker.pages += counts.pages
        self.tracker.zero_pages += counts.zero_pages
        self.tracker.remaining_pages = max(before - total.pages - total.zero_pages, 0)
        self.tracker.push()

    async def _barrier(self) -> None:
        """ROUND_END and its answer: all pages sent so far have landed, by the destination's own count."""
        number = self.tracker.round
        await self.link.send(RoundEnd(number, self.sent_pages))
        answer = await self.link.expect(RoundAck)
        if answer.round != number:
            raise ProtocolError(f"ROUND_ACK of round {answer.round}, {number} was due")
