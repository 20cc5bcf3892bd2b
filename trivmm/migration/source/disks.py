"""The guest's disks before a switchover: most of what is not on their storage yet gets there while the guest runs.

Part of a sender, in its task. A switchover flushes the disks before it gives up their locks, and the guest stands
still meanwhile. What a host has cached of its guest's writes may take minutes; what comes in the time that a short
flush takes is written in such a time again. So flushes come before the switchover, until one was short: beside the
rounds, which bound the wait for one and show the destination that the source is there.
"""

from __future__ import annotations

from typing import Final

import attrs
import trio

from trivmm.migration.port import SourceMachine

__all__ = ["DiskFlushes"]

PATIENCE_S: Final = 1.0  # in one round: a flush that takes longer goes on while the next ones are sent
SHORT_S: Final = 0.05
ENOUGH: Final = 3  # a guest that writes faster than its storage never has a short one


@attrs.define(eq=False)
class DiskFlushes:
    source: SourceMachine
    _done: int = 0  # since the last switchover

    async def ready(self) -> bool:
        """Whether a switchover may begin. False: after another round, ask again.

        :raises DeadlineError: (storage). :raises MigrationError: what was written may be lost."""
        if self._done < ENOUGH:
            began = trio.current_time()
            if not await self.source.flush_disks(PATIENCE_S):
                return False
            self._done += 1
            if self._done < ENOUGH and trio.current_time() - began > SHORT_S:
                return False  # meanwhile memory was written that nobody has counted
        self._done = 0
        return True
