"""The ring walker against the mock driver: what virtio 1.2 section 2.7 asks, and what a hostile driver tries."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import INDIRECT, NEXT, WRITE, Descriptor, MockDriver
from trivmm.virtio.queue.worker import BROKEN

RAM = 4 << 20
DATA = 0x100000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, RAM)])
    yield made
    made.close()


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[MockDriver]:
    made = MockDriver(memory)
    yield made
    made.close()


def pop(queue: Any) -> tuple[int, Any]:
    chain = ffi.new("struct tv_chain *")
    return lib.tv_queue_pop(queue, chain), chain


def test_an_empty_queue_gives_nothing(driver: MockDriver) -> None:
    assert pop(driver.open())[0] == 0


def test_a_chain_is_taken_once_with_its_segments(driver: MockDriver) -> None:
    queue = driver.open()
    parts = [Descriptor(DATA, 16), Descriptor(DATA + 16, 512, WRITE), Descriptor(DATA + 528, 1, WRITE)]
    driver.offer(driver.chain(*parts, first=2))
    got, chain = pop(queue)
    assert got == 1
    assert (chain.head, chain.readable, chain.writable) == (2, 1, 2)
    assert (chain.readable_bytes, chain.writable_bytes) == (16, 513)
    assert pop(queue)[0] == 0


def test_used_elements_and_the_wrap_of_the_indices(driver: MockDriver) -> None:
    driver.avail = driver.seen = 0xFFFE
    driver.set_avail_index(0xFFFE)
    driver.memory.write(driver.used_gpa + 2, struct.pack("<H", 0xFFFE))
    queue = driver.open(next_avail=0xFFFE, next_used=0xFFFE)
    for number in range(5):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE), first=number))
        got, chain = pop(queue)
        assert got == 1
        lib.tv_queue_push(queue, chain.head, 8)
        lib.tv_queue_publish(queue)
    assert driver.used() == [(number, 8) for number in range(5)]
    assert driver.used_index == 3


def test_pages_are_marked_dirty(driver: MockDriver) -> None:
    dirty = driver.memory.regions[0].dirty
    queue = driver.open()
    driver.offer(driver.chain(Descriptor(DATA, 8, WRITE)))
    for word in range(driver.memory.regions[0].bitmap_words):
        dirty[word] = 0
    _, chain = pop(queue)
    lib.tv_queue_push(queue, chain.head, 8)
    lib.tv_queue_publish(queue)
    used_page = driver.used_gpa >> 12
    assert dirty[used_page // 64] >> used_page % 64 & 1


def test_several_chains_are_published_together(driver: MockDriver) -> None:
    """As one packet in several buffers is (virtio 1.2 section 5.1.6.4): the driver sees all of it or nothing."""
    queue = driver.open()
    chains = []
    for number in range(3):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE), first=number))
        got, chain = pop(queue)
        assert got == 1
        chains.append(chain)
    for chain in chains:
        lib.tv_queue_push(queue, chain.head, 8)
    assert driver.used() == []
    assert driver.interrupts() == 0
    assert queue.taken == 3
    lib.tv_queue_publish(queue)
    assert driver.used() == [(0, 8), (1, 8), (2, 8)]
    assert driver.interrupts() == 1
    assert queue.taken == 0


def test_used_elements_around_the_rings_end_are_marked_dirty(memory: GuestMemory) -> None:
    """A ring of three pages, whose index is on the one before: the elements at its end and those at its start."""
    driver = MockDriver(memory, size=1024)
    queue = ffi.new("struct tv_queue *")
    queue.memory, queue.irq, queue.size = memory.native, driver.irq, 1024
    queue.desc_gpa, queue.avail_gpa, queue.used_gpa = 0x20000, 0x28000, 0x30FFC
    queue.next_avail = queue.next_used = 1022
    memory.write(queue.avail_gpa + 2, struct.pack("<H", 1026))
    assert lib.tv_queue_open(queue) == 0
    dirty = memory.regions[0].dirty
    for word in range(memory.regions[0].bitmap_words):
        dirty[word] = 0
    for _ in range(4):
        got, chain = pop(queue)
        assert got == 1
        lib.tv_queue_push(queue, chain.head, 0)
    lib.tv_queue_publish(queue)
    assert [page for page in range(0x30, 0x34) if dirty[page // 64] >> page % 64 & 1] == [0x30, 0x31, 0x32]
    driver.close()


def test_chains_that_were_not_pushed_can_be_given_back(driver: MockDriver) -> None:
    queue = driver.open()
    for number in range(4):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE), first=number))
    heads = [pop(queue)[1].head for _ in range(3)]
    lib.tv_queue_push(queue, heads[0], 8)
    lib.tv_queue_rewind(queue, 2)
    assert (queue.next_avail, queue.chains) == (1, 1)
    lib.tv_queue_publish(queue)
    assert driver.used() == [(0, 8)]
    assert [pop(queue)[1].head for _ in range(3)] == [1, 2, 3]
    lib.tv_queue_rewind(queue, 100)
    assert queue.next_avail == 1, "no further than to what was pushed"


def test_no_more_is_taken_than_a_queue_can_hold(driver: MockDriver) -> None:
    """A driver that offers a chain again before it was used."""
    queue = driver.open()
    for number in range(driver.size):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE), first=number))
        assert pop(queue)[0] == 1
    driver.offer(0)
    assert "avail index" in refused(driver, queue)


def test_whoever_keeps_copies_of_memory_is_told_before_the_driver(driver: MockDriver) -> None:
    queue = driver.open()
    seen = []

    @ffi.callback("void(void *)")  # type: ignore[untyped-decorator]
    def hook(argument: Any) -> None:
        seen.append((int(ffi.cast("uintptr_t", argument)), driver.used_index))

    driver.memory.before_told(hook, ffi.cast("void *", 7))
    for length in (8, 8, 1):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE)))
        lib.tv_queue_push(queue, pop(queue)[1].head, length)
        lib.tv_queue_publish(queue)
    assert seen == [(7, 0), (7, 1)], "a lone status byte is nothing to keep"


def test_every_way_to_break_has_its_words() -> None:
    kinds = set(ffi.typeof("enum tv_broken").elements) - {lib.TV_QUEUE_FINE}
    assert set(BROKEN) == kinds


# --- notifications, sections 2.7.7 and 2.7.10 ------------------------------------------------------------------


def serve(driver: MockDriver, queue: Any, count: int = 1) -> None:
    for _ in range(count):
        driver.offer(driver.chain(Descriptor(DATA, 8, WRITE)))
        _, chain = pop(queue)
        lib.tv_queue_push(queue, chain.head, 1)
    lib.tv_queue_publish(queue)


def test_without_event_idx_the_flag_decides(driver: MockDriver) -> None:
    queue = driver.open()
    serve(driver, queue)
    assert driver.interrupts() == 1
    assert driver.isr[0] & 1
    driver.set_avail_flags(1)
    serve(driver, queue)
    assert driver.interrupts() == 0
    driver.set_avail_flags(0)
    lib.tv_queue_publish(queue)
    assert driver.interrupts() == 0, "nothing new: no interrupt"


def test_with_event_idx_the_event_decides(memory: GuestMemory) -> None:
    driver = MockDriver(memory, event_idx=True)
    queue = driver.open()
    driver.set_used_event(0)
    serve(driver, queue)
    assert driver.interrupts() == 1
    driver.set_used_event(3)
    serve(driver, queue, 2)
    assert driver.interrupts() == 0
    serve(driver, queue)
    assert driver.interrupts() == 1, "the fourth entry, index 3, is the one asked for"
    driver.set_avail_flags(1)
    driver.set_used_event(4)
    serve(driver, queue)
    assert driver.interrupts() == 1, "flags are ignored once EVENT_IDX is negotiated"
    driver.close()


def test_rearm_asks_for_the_next_and_sees_what_came_meanwhile(memory: GuestMemory) -> None:
    driver = MockDriver(memory, event_idx=True)
    queue = driver.open()
    serve(driver, queue)
    assert lib.tv_queue_rearm(queue) == 0
    assert driver.avail_event == 1
    driver.offer(driver.chain(Descriptor(DATA, 8, WRITE)))
    assert lib.tv_queue_rearm(queue) == 1
    driver.close()


def test_without_event_idx_a_flag_asks_for_silence(driver: MockDriver) -> None:
    queue = driver.open()
    serve(driver, queue)
    lib.tv_queue_disarm(queue)
    assert driver.used_flags == 1
    assert lib.tv_queue_rearm(queue) == 0
    assert driver.used_flags == 0
    lib.tv_queue_disarm(queue)
    again = driver.open(next_avail=1, next_used=1)
    assert driver.used_flags == 1
    assert lib.tv_queue_rearm(again) == 0
    assert driver.used_flags == 0, "also where the walker before it ended in the middle of its work"


def test_with_event_idx_silence_is_an_index_that_has_passed(memory: GuestMemory) -> None:
    driver = MockDriver(memory, event_idx=True)
    queue = driver.open()
    lib.tv_queue_rearm(queue)
    serve(driver, queue, 2)
    lib.tv_queue_disarm(queue)
    assert driver.used_flags == 0, "section 2.7.10: it stays 0"
    assert driver.avail_event == 0
    lib.tv_queue_rearm(queue)
    assert driver.avail_event == 2
    driver.close()


# --- hostile drivers -------------------------------------------------------------------------------------------


def refused(driver: MockDriver, queue: Any) -> str:
    got, _ = pop(queue)
    assert got == -1
    assert pop(queue)[0] == -1, "a broken queue stays broken"
    return BROKEN[queue.broken]


def test_the_available_index_jumps(driver: MockDriver) -> None:
    queue = driver.open()
    driver.set_avail_index(driver.size + 1)
    assert "avail index" in refused(driver, queue)


@pytest.mark.parametrize("head", [8, 9, 0xFFFF])
def test_a_head_outside_the_table(driver: MockDriver, head: int) -> None:
    queue = driver.open()
    driver.offer(head)
    assert "head" in refused(driver, queue)


def test_a_next_outside_the_table(driver: MockDriver) -> None:
    queue = driver.open()
    driver.describe(0, Descriptor(DATA, 8, NEXT, 8))
    driver.offer(0)
    assert "next" in refused(driver, queue)


def test_a_loop(driver: MockDriver) -> None:
    queue = driver.open()
    driver.describe(0, Descriptor(DATA, 8, NEXT, 1))
    driver.describe(1, Descriptor(DATA, 8, NEXT, 0))
    driver.offer(0)
    assert "longer than the queue" in refused(driver, queue)


@pytest.mark.parametrize(("gpa", "length"), [(RAM, 1), (RAM - 1, 2), ((1 << 64) - 1, 2), (1 << 63, 8), (0, RAM + 1)])
def test_a_buffer_outside_ram(driver: MockDriver, gpa: int, length: int) -> None:
    queue = driver.open()
    driver.offer(driver.chain(Descriptor(gpa, length, WRITE)))
    assert "outside" in refused(driver, queue)


def test_readable_after_writable(driver: MockDriver) -> None:
    queue = driver.open()
    driver.offer(driver.chain(Descriptor(DATA, 8, WRITE), Descriptor(DATA, 8)))
    assert "after a writable" in refused(driver, queue)


def test_indirect_tables(driver: MockDriver) -> None:
    table = 0x80000
    queue = driver.open()
    driver.chain(Descriptor(DATA, 16), Descriptor(DATA + 16, 512, WRITE), table=table)
    driver.chain(Descriptor(DATA + 4096, 4), Descriptor(table, 32, INDIRECT))
    driver.offer(0)
    got, chain = pop(queue)
    assert got == 1
    assert (chain.readable, chain.writable, chain.readable_bytes) == (2, 1, 20)


@pytest.mark.parametrize(
    "outer",
    [
        Descriptor(0x80000, 0, INDIRECT),
        Descriptor(0x80000, 17, INDIRECT),
        Descriptor(0x80000, 16 * 9, INDIRECT),
        Descriptor(0x80000, 32, INDIRECT | NEXT, 1),
        Descriptor(RAM, 32, INDIRECT),
        Descriptor(0x81000, 32, INDIRECT),  # holds another indirect descriptor
    ],
)
def test_bad_indirect_tables(driver: MockDriver, outer: Descriptor) -> None:
    queue = driver.open()
    driver.chain(Descriptor(DATA, 16), Descriptor(DATA, 16), table=0x80000)
    driver.describe(0, Descriptor(0x80000, 32, INDIRECT), table=0x81000)
    driver.describe(0, outer)
    driver.offer(0)
    assert "indirect" in refused(driver, queue)


def test_an_indirect_table_that_was_not_negotiated(driver: MockDriver) -> None:
    queue = driver.open(indirect=False)
    driver.chain(Descriptor(DATA, 16), table=0x80000)
    driver.describe(0, Descriptor(0x80000, 16, INDIRECT))
    driver.offer(0)
    assert "indirect" in refused(driver, queue)


@pytest.mark.parametrize(("size", "base"), [(0, 0x10000), (3, 0x10000), (2048, 0x10000), (8, 0x10008), (8, RAM - 64)])
def test_queues_that_cannot_be(memory: GuestMemory, size: int, base: int) -> None:
    driver = MockDriver(memory, size=size, base=base)
    with pytest.raises(ValueError, match="rings"):
        driver.open()
    driver.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.binary(min_size=128, max_size=128),
    ring=st.lists(st.integers(0, 0xFFFF), min_size=8, max_size=8),
    index=st.integers(0, 0xFFFF),
    near=st.booleans(),
)
def test_random_memory_never_leads_outside(
    driver: MockDriver, table: bytes, ring: list[int], index: int, near: bool
) -> None:
    """Whatever the rings hold, a walk ends, and every segment it gives lies in RAM."""
    memory = driver.memory
    memory.write(driver.base, table)
    memory.write(driver.avail_gpa + 4, struct.pack("<8H", *(each % 8 if near else each for each in ring)))
    driver.set_avail_index(index % 9 if near else index)
    queue = driver.open()
    for _ in range(2 * driver.size):
        got, chain = pop(queue)
        if got != 1:
            break
        assert chain.readable + chain.writable <= driver.size * 2
        assert chain.readable_bytes + chain.writable_bytes <= 1 << 30
        lib.tv_queue_push(queue, chain.head, 0)
        lib.tv_queue_publish(queue)
    else:
        raise AssertionError("more chains than the queue can hold")
    memory.write(driver.used_gpa, bytes(128))
