"""How far a machine is stopped: one ladder, walked down to move it away and up to run it.

====================  ===========================================================  ==================  ===========
on the way down       what is so from there on                                     its way up          bounded by
====================  ===========================================================  ==================  ===========
``RUNNING``           the vCPUs run guest code
``PAUSED``            each vCPU is parked between two instructions                 they go on          pause
``GATED``             no queue takes a chain, nothing activates, output drained    the gate opens      quiesce
``DETACHED``          no eventfd injects: what was pending is in vCPUs or saved    interrupts return   kernel
``SAVED``             the state is taken, and nothing changes it                   it is stale         (computes)
``FLUSHED``           what the guest wrote is on its disks' storage, not cached    (nothing)           storage
``UNLOCKED``          images and console sockets may be another process's          locks are retaken   storage
====================  ===========================================================  ==================  ===========

A machine that boots starts at ``DETACHED``, a migration's destination at the bottom. A stage is entered before its work
is done on the way down, and after it on the way up: whatever fails or is cancelled half way, the way up undoes it.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping

import attrs

__all__ = ["Ladder", "Rung", "Stage"]


class Stage(enum.IntEnum):
    """Ordered: the higher, the closer to running."""

    UNLOCKED = 0
    FLUSHED = 1
    SAVED = 2
    DETACHED = 3
    GATED = 4
    PAUSED = 5
    RUNNING = 6


@attrs.frozen
class Rung:
    """The step between a stage and the one above it. ``down`` gets the seconds that it may take; ``up`` undoes a
    ``down`` that was not finished, too, and is safe when there is nothing to undo. Both bound themselves."""

    down: Callable[[float], Awaitable[None]]
    up: Callable[[], Awaitable[None]]


@attrs.define(eq=False)
class Ladder:
    """``stage`` is assigned here and nowhere else. ``rungs`` by the lower of the two stages they join."""

    stage: Stage
    rungs: Mapping[Stage, Rung]

    async def down(self, to: Stage, left_s: Callable[[], float]) -> None:
        """Walk down to ``to``; nothing to do where it is lower already. ``left_s`` is asked before each step.

        What a rung raises leaves the stage where that rung leads to: walk up."""
        while self.stage > to:
            lower = Stage(self.stage - 1)
            self.stage = lower
            await self.rungs[lower].down(left_s())

    async def up(self, to: Stage) -> None:
        """Walk up to ``to``; nothing to do where it is higher already. What a rung raises leaves the stage below it."""
        while self.stage < to:
            await self.rungs[self.stage].up()
            self.stage = Stage(self.stage + 1)

    def fall(self, to: Stage) -> None:
        """The machine is down there at once: its locks were given back in an emergency, its state was loaded."""
        self.stage = min(self.stage, to)
