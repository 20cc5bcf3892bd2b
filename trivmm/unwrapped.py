"""A nursery for those whose callers want to catch what they raise, and not groups of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

__all__ = ["unwrapped_nursery"]


@asynccontextmanager
async def unwrapped_nursery(*, patient: bool = False) -> AsyncIterator[trio.Nursery]:
    """As ``trio.open_nursery()``, but what the block raises leaves it as it is, not wrapped in a group: it is held
    until the tasks have ended, and raised again outside, unless they end by a cancellation from there. What a task
    raises comes in a group, as ever, and the block's error with it.

    ``patient``: an ``Exception`` of the block does not cancel the tasks; they are waited for."""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error
                if not (patient and isinstance(error, Exception)):
                    nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is None or group.split(trio.Cancelled)[1] is None:
            raise
        raise group.derive([failure, *group.exceptions]) from None
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame: a ring of references would keep what the block was about
