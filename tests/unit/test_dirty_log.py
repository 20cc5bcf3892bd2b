"""The dirty log over its sources: all on or none, read as one, and a call that comes late ends with what is wanted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any, TypeVar

import pytest

from trivmm._native import ffi, lib
from trivmm.errors import DeadlineError, HypervisorError
from trivmm.memory.dirty_log import DirtyLog, HostWriters
from trivmm.memory.guest import GuestMemory

T = TypeVar("T")


class Source:
    """A guest that dirties page ``slot + 2`` all the time. ``fails`` at being switched on, ``stays`` at being switched
    off."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[bool] = []
        self.fails = fails
        self.stays = False
        self.on_call: Callable[[], None] = lambda: None

    def set_dirty_log(self, enabled: bool) -> None:
        self.calls.append(enabled)
        self.on_call()
        if self.fails if enabled else self.stays:
            raise HypervisorError("KVM_SET_USER_MEMORY_REGION", "no memory")

    def harvest_dirty(self, slot: int, into: Any) -> None:
        into[0] |= 1 << slot + 2


class Calls:
    """Makes calls at once and notes them, or keeps the next for later, as a kernel that hangs."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.hangs = False
        self.kept: list[Callable[[], Any]] = []

    async def __call__(self, what: str, work: Callable[[], T]) -> T:
        self.made.append(what)
        if self.hangs:
            self.kept.append(work)
            raise DeadlineError("kernel", 1, what)
        return work()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 20)])
    yield made
    made.close()


def run(steps: Awaitable[T]) -> T:
    """Without a loop: nothing here waits."""
    generator: Generator[Any, Any, T] = steps.__await__()
    try:
        next(generator)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


def bitmaps(memory: GuestMemory) -> list[Any]:
    return [ffi.new("uint64_t[]", region.bitmap_words) for region in memory.regions]


def test_every_sources_writes_are_harvested_once_and_what_was_before_the_start_is_not(memory: GuestMemory) -> None:
    guest, calls = Source(), Calls()
    log = DirtyLog((HostWriters(memory), guest), calls)
    memory.write(0, b"before")
    run(log.start())
    memory.write(5 * 4096, b"x")
    memory.write((1 << 32) + 4096, b"x")
    into = bitmaps(memory)
    run(log.harvest(into, stopped=False))
    assert [bits[0] for bits in into] == [1 << 5 | 1 << 2, 1 << 1 | 1 << 3]
    again = bitmaps(memory)
    run(log.harvest(again, stopped=True))
    assert [bits[0] for bits in again] == [1 << 2, 1 << 3]
    run(log.stop())
    run(log.stop())
    assert guest.calls == [True, False]
    # With every vCPU stopped no thread is begun for it; and none to switch off what is off.
    assert calls.made == ["switching the dirty log on", "reading the dirty log", "switching the dirty log off"]


def test_harvests_add_to_what_is_there(memory: GuestMemory) -> None:
    log = DirtyLog((HostWriters(memory),), Calls())
    run(log.start())
    memory.write(0, b"x")
    into = bitmaps(memory)
    into[0][0] = 1 << 9
    run(log.harvest(into, stopped=True))
    assert into[0][0] == 1 << 9 | 1
    assert lib.tv_pages_count(into[0], memory.regions[0].bitmap_words) == 2


def test_one_source_that_does_not_come_on_leaves_none_on(memory: GuestMemory) -> None:
    good, bad = Source(), Source(fails=True)
    log = DirtyLog((good, bad), Calls())
    with pytest.raises(HypervisorError):
        run(log.start())
    assert good.calls == bad.calls == [True, False]
    run(log.stop())
    assert good.calls == [True, False]


def test_one_that_was_switched_off_half_way_is_switched_on_anew(memory: GuestMemory) -> None:
    """Else the next migration would believe the half that is off: nothing written there would ever travel."""
    first, second = Source(), Source()
    log = DirtyLog((first, second), Calls())
    run(log.start())
    second.stays = True
    with pytest.raises(HypervisorError):
        run(log.stop())
    run(log.start())
    assert first.calls == second.calls == [True, False, True]


def test_what_did_not_go_off_after_a_start_that_failed_is_switched_off_again(memory: GuestMemory) -> None:
    good, bad = Source(), Source(fails=True)
    good.stays = True
    log = DirtyLog((good, bad), Calls())
    with pytest.raises(HypervisorError):
        run(log.start())
    good.stays = False
    run(log.stop())
    assert good.calls == bad.calls == [True, False, False]


def test_a_log_that_was_never_on_is_not_switched_off(memory: GuestMemory) -> None:
    calls = Calls()
    run(DirtyLog((Source(),), calls).stop())
    assert calls.made == []


def test_one_whose_turn_comes_too_late_does_not_come_on() -> None:
    guest, calls = Source(), Calls()
    log = DirtyLog((guest,), calls)
    calls.hangs = True
    with pytest.raises(DeadlineError):
        run(log.start())
    with pytest.raises(DeadlineError):
        run(log.stop())
    for work in calls.kept:
        work()
    assert guest.calls == []


def test_one_that_comes_on_too_late_goes_off_by_itself() -> None:
    guest, calls = Source(), Calls()
    log = DirtyLog((guest,), calls)

    def gives_up() -> None:
        """Whoever waited stops waiting while the kernel is at it, and has to wait for its turn with that, too."""
        guest.on_call = lambda: None
        calls.hangs = True
        with pytest.raises(DeadlineError):
            run(log.stop())

    guest.on_call = gives_up
    run(log.start())
    assert guest.calls == [True, False]
    for work in calls.kept:
        work()
    assert guest.calls == [True, False]


def test_a_log_that_goes_with_its_vm_is_not_switched_off() -> None:
    guest, calls = Source(), Calls()
    log = DirtyLog((guest,), calls)
    run(log.start())
    log.forget()
    run(log.stop())
    assert guest.calls == [True]
