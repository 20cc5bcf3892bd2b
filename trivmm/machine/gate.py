"""The device gate: while it is closed no activation starts or takes effect, no queue takes a chain, nothing is ejected.

Part of a :class:`~trivmm.machine.machine.Machine`; a switchover's second step closes it.
"""

from __future__ import annotations

import math
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.machine.board import Board
from trivmm.nursery.ejection import Ejector

__all__ = ["Gate"]

DRAIN_SHARE: Final = 0.25  # of the downtime that is left: a sink that stalls must not use up all of it


@attrs.frozen(eq=False)
class Gate:
    board: Board
    ejector: Ejector
    deadlines: Deadlines

    def shut(self) -> None:
        """Before anything runs."""
        self.ejector.close_gate()
        for slot in self.board.devices:
            slot.actor.close_gate()

    async def down(self, at_most_s: float) -> None:
        """The ladder's way down, which leaves time for its other steps."""
        await self.close(at_most_s, drain_s=at_most_s * DRAIN_SHARE)

    async def up(self) -> None:
        for slot in self.board.devices:
            slot.actor.reopen()
        self.ejector.reopen()

    async def close(self, at_most_s: float, *, drain_s: float = math.inf) -> None:
        """In-flight work ends. Console output may take ``drain`` or ``drain_s``, whichever is less: what is left is
        part of the state.

        :raises DeadlineError: ``quiesce``, naming the device; the gate may be half closed."""
        with self.deadlines.enter("quiesce", self._diagnose, at_most_s=at_most_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.ejector.quiesce)
                for slot in self.board.devices:
                    nursery.start_soon(slot.actor.quiesce)
                for line in self.board.lines.values():
                    nursery.start_soon(line.drain, min(self.deadlines.drain, at_most_s, drain_s))

    def _diagnose(self) -> str:
        late = [slot.actor for slot in self.board.devices if slot.actor.busy]
        names = [f"{each.name} ({each.stuck or each.state.stage.value})" for each in late]
        names += [f"PCI slot {number} (being ejected)" for number in self.ejector.serving]
        return f"in-flight work did not end: {', '.join(names) or 'console output'}"
