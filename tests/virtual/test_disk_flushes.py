"""When a switchover may begin, as far as the disks go."""

from __future__ import annotations

import pytest
import trio.testing

from trivmm.migration.source.disks import ENOUGH, PATIENCE_S, SHORT_S, DiskFlushes
from trivmm.testing.migration import DiskLock, FakeSource

LONG = 2 * SHORT_S


async def asked(*flushes_s: float) -> list[bool]:
    """The answers until it is ready."""
    source = FakeSource(DiskLock())
    source.flushes_s = list(flushes_s)
    disks, answers = DiskFlushes(source), list[bool]()
    while not any(answers):
        answers.append(await disks.ready())
    source.close()
    return answers


@pytest.mark.parametrize(
    ("flushes_s", "answers"),
    [
        ([], [True]),
        ([SHORT_S / 2], [True]),
        ([LONG, SHORT_S / 2], [False, True]),
        ([LONG] * 10, [False] * (ENOUGH - 1) + [True]),  # a guest that writes faster than its storage
        ([2.5 * PATIENCE_S], [False, False, False, True]),  # it goes on by itself, beside two rounds
    ],
)
async def test_after_a_short_flush_or_enough_of_them(
    flushes_s: list[float], answers: list[bool], autojump_clock: trio.testing.MockClock
) -> None:
    assert await asked(*flushes_s) == answers


async def test_each_switchover_begins_anew(autojump_clock: trio.testing.MockClock) -> None:
    source = FakeSource(DiskLock())
    source.flushes_s = [LONG] * (2 * ENOUGH)
    disks = DiskFlushes(source)
    assert [await disks.ready() for _ in range(2 * ENOUGH)] == ([False] * (ENOUGH - 1) + [True]) * 2
    source.close()
