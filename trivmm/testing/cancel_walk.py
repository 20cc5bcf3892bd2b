"""Cancel a piece of code at its first await, at its second, … at its last: one run each. Or do something else there.

::

    async def world(walk: Walk) -> None:
        ...                                # make everything fresh
        await walk.run(lambda: send(...))  # cancelled at walk.step, if it gets that far
        ...                                # assert what must hold, wherever it was cancelled

    awaits = await cancel_walk(world)

An await is a point where the task gave control to trio; awaits of its children are reached through the points at
which the task itself waits, or as their own where ``of`` names them. Deterministic only as far as the world is: use it
with memory streams and autojump.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final, Generic, TypeVar

import trio

__all__ = ["Walk", "cancel_walk"]

MAX_STEPS: Final = 5000  # a world that never ends would otherwise walk for ever

T = TypeVar("T")


class Walk(trio.abc.Instrument, Generic[T]):
    """One run of a walk. ``fired``: the code got as far as ``step``; ``result`` is None when it was cancelled."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.fired = False
        self.result: T | None = None
        self.cancelled = False
        self._seen = 0
        self._task: trio.lowlevel.Task | None = None
        self._of: Collection[str] = ()
        self._scope = trio.CancelScope()
        self._strike: Callable[[], None] = self._scope.cancel
        self._error: BaseException | None = None

    async def run(
        self, code: Callable[[], Awaitable[T]], *, strike: Callable[[], None] | None = None, of: Collection[str] = ()
    ) -> T | None:
        """Run ``code`` in this task, cancelled at its ``step``-th await. Its own exceptions come through.

        ``strike`` is called there instead; what it raises is raised at the end. ``of``: the awaits of the tasks with
        these names are counted, and not this task's."""
        self._task, self._of = trio.lowlevel.current_task(), of
        self._strike = strike or self._scope.cancel
        trio.lowlevel.add_instrument(self)
        try:
            with self._scope:
                self.result = await code()
        finally:
            trio.lowlevel.remove_instrument(self)
        if self._error is not None:
            raise self._error
        self.cancelled = self._scope.cancelled_caught
        return self.result

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        counts = task.name in self._of if self._of else task is self._task
        if counts and not self.fired:
            self._seen += 1
            if self._seen == self.step:
                self.fired = True
                try:
                    self._strike()
                except BaseException as error:  # noqa: ASYNC103 - raised by run(); trio would only log it
                    self._error = error


async def cancel_walk(world: Callable[[Walk[T]], Awaitable[None]]) -> int:
    """Run ``world`` once for each await of the code in its :meth:`Walk.run`, and once to the end; gives their
    number."""
    for step in range(1, MAX_STEPS):
        walk: Walk[T] = Walk(step)
        await world(walk)
        if not walk.fired:
            return step - 1
    raise AssertionError(f"more than {MAX_STEPS} awaits")
