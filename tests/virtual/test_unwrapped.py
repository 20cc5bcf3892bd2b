"""``unwrapped_nursery``: trio's nursery, but for how the block's own exception leaves it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import pytest
import trio
import trio.testing

from trivmm.unwrapped import unwrapped_nursery

Clock: TypeAlias = trio.testing.MockClock


class Thing:
    pass


async def raising(error: BaseException, task: Callable[[], Awaitable[None]], *, patient: bool = False) -> None:
    """A block that raises after a second, over a task."""
    async with unwrapped_nursery(patient=patient) as nursery:
        nursery.start_soon(task)
        await trio.sleep(1)
        raise error


async def test_what_the_block_raises_is_itself_and_ends_the_tasks(autojump_clock: Clock) -> None:
    problem = KeyError("the block's")
    ended: list[str] = []

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("task")

    with pytest.raises(KeyError) as caught:
        await raising(problem, task)
    assert caught.value is problem
    assert ended == ["task"]


async def test_without_an_error_the_tasks_are_waited_for(autojump_clock: Clock) -> None:
    async with unwrapped_nursery() as nursery:
        nursery.start_soon(trio.sleep, 10)
    assert trio.current_time() >= 10


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
async def test_a_patient_one_waits_for_its_tasks_unless_it_is_the_end_of_everything(
    autojump_clock: Clock, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        await raising(error(), partial(trio.sleep, 10), patient=True)
    assert (trio.current_time() >= 10) is (error is ValueError)


async def test_a_cancellation_is_one(autojump_clock: Clock) -> None:
    with trio.move_on_after(1) as scope:
        async with unwrapped_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    async with unwrapped_nursery() as nursery:
        nursery.cancel_scope.cancel()
        await trio.sleep_forever()


async def test_a_cancellation_from_outside_wins_over_the_blocks_error(autojump_clock: Clock) -> None:
    with trio.move_on_after(1) as scope:
        async with unwrapped_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            with trio.CancelScope(shield=True):
                await trio.sleep(2)
            raise KeyError
    assert scope.cancelled_caught


async def fails(after_s: float) -> None:
    try:
        await trio.sleep(after_s)
    finally:
        raise LookupError("the task's")


@pytest.mark.parametrize(("after_s", "types"), [(0.5, [LookupError]), (10, [KeyError, LookupError])])
async def test_what_a_task_raises_comes_in_a_group_and_hides_nothing(
    autojump_clock: Clock, after_s: float, types: list[type]
) -> None:
    with pytest.RaisesGroup(*types):
        await raising(KeyError(), partial(fails, after_s))


async def test_it_keeps_nothing_alive() -> None:
    thing = Thing()
    gone = weakref.ref(thing)

    async def block(_: Thing) -> None:
        async with unwrapped_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise LookupError

    gc.disable()
    try:
        with suppress(LookupError):
            await block(thing)
        del thing
        assert gone() is None
    finally:
        gc.enable()
