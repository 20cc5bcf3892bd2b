"""The ladder on which a machine is stopped and comes back: order, failures at each rung, and what is undone."""

from __future__ import annotations

import attrs
import pytest
import trio

from trivmm.errors import IllegalTransition
from trivmm.state.stage import Ladder, Rung, Stage
from trivmm.vm.core import TRANSITIONS, VmState

LOWER = [stage for stage in reversed(Stage) if stage is not Stage.RUNNING]


class RungError(Exception):
    pass


@attrs.define
class Steps:
    """Rungs that write down what was done, and fail where they are told to."""

    done: list[str] = attrs.field(factory=list)
    limits: list[float] = attrs.field(factory=list)
    fails: set[str] = attrs.field(factory=set)

    def ladder(self, stage: Stage) -> Ladder:
        return Ladder(stage, {each: self.rung(each) for each in LOWER})

    def rung(self, lower: Stage) -> Rung:
        async def down(at_most_s: float) -> None:
            await trio.lowlevel.checkpoint()
            self.limits.append(at_most_s)
            self._note(f"down to {lower.name}")

        async def up() -> None:
            await trio.lowlevel.checkpoint()
            self._note(f"up from {lower.name}")

        return Rung(down, up)

    def _note(self, what: str) -> None:
        self.done.append(what)
        if what in self.fails:
            raise RungError(what)


async def test_all_the_way_down_and_up_again() -> None:
    steps = Steps()
    ladder = steps.ladder(Stage.RUNNING)
    left = iter((6.0, 5.0, 4.0, 3.0, 2.0, 1.0))
    await ladder.down(Stage.UNLOCKED, lambda: next(left))
    assert ladder.stage is Stage.UNLOCKED
    assert steps.limits == [6, 5, 4, 3, 2, 1]
    await ladder.up(Stage.RUNNING)
    assert steps.done == [f"down to {each.name}" for each in LOWER] + [f"up from {each.name}" for each in LOWER[::-1]]
    assert ladder.stage is Stage.RUNNING


async def test_there_is_nothing_to_do_where_it_is_already() -> None:
    steps = Steps()
    ladder = steps.ladder(Stage.GATED)
    await ladder.down(Stage.PAUSED, lambda: 1.0)
    await ladder.up(Stage.DETACHED)
    assert (steps.done, ladder.stage) == ([], Stage.GATED)
    ladder.fall(Stage.PAUSED)
    assert ladder.stage is Stage.GATED
    ladder.fall(Stage.UNLOCKED)
    assert ladder.stage is Stage.UNLOCKED


@pytest.mark.parametrize("fails", LOWER)
async def test_a_rung_that_fails_on_the_way_down_is_undone_too(fails: Stage) -> None:
    steps = Steps(fails={f"down to {fails.name}"})
    ladder = steps.ladder(Stage.RUNNING)
    with pytest.raises(RungError):
        await ladder.down(Stage.UNLOCKED, lambda: 1.0)
    assert ladder.stage is fails
    steps.done.clear()
    await ladder.up(Stage.RUNNING)
    assert steps.done[0] == f"up from {fails.name}"
    assert ladder.stage is Stage.RUNNING


@pytest.mark.parametrize("fails", LOWER)
async def test_a_rung_that_fails_on_the_way_up_is_where_it_stays(fails: Stage) -> None:
    steps = Steps(fails={f"up from {fails.name}"})
    ladder = steps.ladder(Stage.UNLOCKED)
    with pytest.raises(RungError):
        await ladder.up(Stage.RUNNING)
    assert ladder.stage is fails
    steps.fails.clear()
    await ladder.up(Stage.RUNNING)
    assert ladder.stage is Stage.RUNNING


@pytest.mark.parametrize("at", range(len(LOWER)))
async def test_a_cancellation_on_the_way_down_leaves_a_stage_with_a_way_up(at: int) -> None:
    steps = Steps()
    ladder = steps.ladder(Stage.RUNNING)
    with trio.CancelScope() as scope:

        def left_s() -> float:
            if len(steps.limits) == at:
                scope.cancel()
            return 1.0

        await ladder.down(Stage.UNLOCKED, left_s)
    assert ladder.stage is LOWER[at]
    steps.done.clear()
    await ladder.up(Stage.RUNNING)
    assert steps.done == [f"up from {each.name}" for each in LOWER[at::-1]]


def test_a_vm_that_was_shut_down_is_not_paused() -> None:
    from unittest.mock import Mock

    from trivmm.vm.core import VmCore

    vm = Mock(state=VmState.SHUTDOWN)
    with pytest.raises(IllegalTransition, match="no step from Shutdown to Paused"):
        VmCore._enter(vm, VmState.PAUSED)
    assert vm.state is VmState.SHUTDOWN
    assert set(TRANSITIONS) == set(VmState)
