"""virtio-balloon with its real worker thread over a real memfd, and the mock driver as the guest."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import attrs
import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError
from trivmm.memory.guest import PAGE_SIZE, GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, answered, until
from trivmm.testing.states import sent
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.balloon.device import BalloonDevice, BalloonState
from trivmm.virtio.queue.worker import BROKEN
from trivmm.virtio.setup import DriverSetup

VERSION_1 = 1 << 32
REPORTING = 1 << 5
SIZE, HIGH, HIGH_SIZE = 8 << 20, 1 << 32, 4 << 20
LIST = 0x100000
FIRST = 0x200  # the first page that is given away here: 2 MiB
INFLATE, DEFLATE, REPORT = range(3)
MADV_COLLAPSE = 25  # since Linux 6.1


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, SIZE), (HIGH, HIGH_SIZE)])
    yield made
    made.close()


@pytest.fixture
def queues(memory: GuestMemory) -> Iterator[list[MockDriver]]:
    made = [MockDriver(memory, base=0x10000 + 0x10000 * number) for number in range(3)]
    yield made
    for each in made:
        each.close()


@pytest.fixture
def device(memory: GuestMemory) -> BalloonDevice:
    return BalloonDevice(BalloonConfig(0, free_page_reporting=True), memory, "__balloon")


def active(device: BalloonDevice, queues: Sequence[MockDriver]) -> AbstractAsyncContextManager[None]:
    """From where each queue's driver is."""
    setup = DriverSetup(VERSION_1 | REPORTING, tuple(each.queue(each.avail, each.seen) for each in queues))
    return activated(device, setup, [each.handle for each in queues])


async def used(driver: MockDriver) -> int:
    """Until its chain is back: the used length."""
    ((_, length),) = await answered(driver)
    return length


async def give(driver: MockDriver, *pages: int) -> int:
    return await give_bytes(driver, struct.pack(f"<{len(pages)}I", *pages))


async def give_bytes(driver: MockDriver, listed: bytes) -> int:
    driver.memory.write(LIST, listed)
    driver.offer(driver.chain(Descriptor(LIST, len(listed))))
    driver.ring()
    return await used(driver)


async def report(driver: MockDriver, *parts: tuple[int, int]) -> int:
    driver.offer(driver.chain(*(Descriptor(gpa, length, WRITE) for gpa, length in parts)))
    driver.ring()
    return await used(driver)


def fill(memory: GuestMemory, page: int, count: int = 1) -> None:
    memory.write(page * PAGE_SIZE, b"\xa5" * PAGE_SIZE * count)


def is_zero(memory: GuestMemory, page: int, count: int = 1) -> bool:
    return memory.read(page * PAGE_SIZE, PAGE_SIZE * count) == bytes(PAGE_SIZE * count)


def resident(memory: GuestMemory, slot: int = 0) -> int:
    """Bytes of memory under a region, mapped or not."""
    return os.fstat(memory.regions[slot].memfd).st_blocks * 512


def dirty_pages(memory: GuestMemory, slot: int = 0) -> set[int]:
    region = memory.regions[slot]
    bits = ffi.new("uint64_t[]", region.bitmap_words)
    lib.tv_dirty_take(region.dirty, bits, region.bitmap_words)
    return {page for page in range(region.pages) if bits[page // 64] >> page % 64 & 1}


async def test_inflating_gives_memory_back_and_what_is_touched_again_reads_zero(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    fill(memory, FIRST - 1, 258)
    async with active(device, queues):
        before = resident(memory)
        dirty_pages(memory)
        assert await give(queues[INFLATE], *range(FIRST, FIRST + 256)) == 0
        assert before - resident(memory) > 240 * PAGE_SIZE  # the rings and the list have taken some
        # The migration that has sent them sends them again, as zero.
        assert set(range(FIRST, FIRST + 256)) <= dirty_pages(memory)
        assert is_zero(memory, FIRST, 256)
        assert memory.read((FIRST - 1) * PAGE_SIZE, PAGE_SIZE) == b"\xa5" * PAGE_SIZE
        assert memory.read((FIRST + 256) * PAGE_SIZE, PAGE_SIZE) == b"\xa5" * PAGE_SIZE
        fill(memory, FIRST, 256)
        assert await give(queues[DEFLATE], *range(FIRST, FIRST + 256)) == 0
        assert not is_zero(memory, FIRST)
    counted = device.counters()
    assert (counted["inflated"], counted["deflated"], counted["released"]) == (256, 256, 256)
    assert (counted["ranges"], counted["refused"], counted["failed"]) == (1, 0, 0)


async def test_pages_in_any_order_are_given_back_in_whole_ranges(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    pages = [FIRST + number * 379 % 1024 for number in range(1024)]  # all of a range, well mixed
    fill(memory, FIRST, 1024)
    async with active(device, queues):
        await give(queues[INFLATE], *pages, FIRST, FIRST + 1, FIRST + 1)  # and some of them twice
    assert is_zero(memory, FIRST, 1024)
    assert device.counters()["ranges"] == 2  # 1024 of a list at a time
    assert device.counters()["refused"] == 0


async def test_both_regions_and_their_ends(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    last, high, top = SIZE // PAGE_SIZE - 1, HIGH // PAGE_SIZE, (HIGH + HIGH_SIZE) // PAGE_SIZE
    for page in (last, high, top - 1):
        fill(memory, page)
    async with active(device, queues):
        await give(queues[INFLATE], last, last + 1, high - 1, high, top - 1, top)
    assert all(is_zero(memory, page) for page in (last, high, top - 1))
    assert (device.counters()["released"], device.counters()["refused"]) == (3, 3)
    assert dirty_pages(memory, 1) == {0, HIGH_SIZE // PAGE_SIZE - 1}


@pytest.mark.parametrize(
    ("listed", "refused", "released"),
    [
        (struct.pack("<I", 0xFFFFFFFF), 1, 0),
        (struct.pack("<4I", SIZE // PAGE_SIZE, 0xC0000, 0xFEE00, 0xFFFF0), 4, 0),  # holes, devices, a ROM
        (struct.pack("<I", FIRST) + b"\1", 1, 1),  # a list that does not end with a number
        (struct.pack("<3I", FIRST, FIRST, FIRST), 0, 1),
        (b"\1\2\3", 1, 0),
    ],
)
async def test_a_list_that_lies_is_counted_and_nothing_else(
    memory: GuestMemory,
    queues: list[MockDriver],
    device: BalloonDevice,
    listed: bytes,
    refused: int,
    released: int,
) -> None:
    fill(memory, FIRST + 1)
    broken: list[str] = []
    device.on_broken = broken.append
    async with active(device, queues):
        assert await give_bytes(queues[INFLATE], listed) == 0
        assert await give_bytes(queues[DEFLATE], listed) == 0
        await give(queues[INFLATE], FIRST + 1)  # it goes on
    counted = device.counters()
    # What deflating refuses is counted too: the same lies.
    assert (counted["released"], counted["refused"]) == (released + 1, 2 * refused)
    assert is_zero(memory, FIRST + 1)
    assert broken == []


async def test_a_list_of_more_than_a_gigabyte_is_not_looked_at(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    fill(memory, FIRST)
    length = 4 * 1024 * 256 + 4
    memory.write(LIST, struct.pack("<I", FIRST))
    async with active(device, queues):
        queue = queues[INFLATE]
        queue.offer(queue.chain(Descriptor(LIST, length)))
        queue.ring()
        assert await used(queue) == 0
    assert not is_zero(memory, FIRST)
    assert device.counters()["refused"] == length // 4
    assert device.counters()["inflated"] == 0


async def test_the_longest_list_is_left_between_two_pieces_when_the_worker_is_to_stop(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    """Whatever a guest asks for, nobody who stops the device waits for the end of it."""
    queue = queues[INFLATE]
    stride = struct.pack("<1024I", *(2 * (number % 1024) for number in range(1024)))
    for number in range(256):
        memory.write(LIST + 4096 * number, stride)
    async with active(device, queues):
        for _ in range(7):
            queue.offer(queue.chain(Descriptor(LIST, 1 << 20)))
        queue.ring()
        with trio.fail_after(20):
            await until(lambda: device.counters()["ranges"] > 0)
    taken = device.queues[INFLATE].next_avail
    assert taken < 7
    assert device.queues[INFLATE].next_used == taken


async def test_reported_pages_are_given_back_whole_ones_only(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    fill(memory, FIRST, 1024)
    async with active(device, queues):
        dirty_pages(memory)
        start = FIRST * PAGE_SIZE
        assert await report(queues[REPORT], (start, 512 * PAGE_SIZE), (start + (513 << 12) - 1, 2 * PAGE_SIZE + 2)) == 0
        assert set(range(FIRST, FIRST + 512)) <= dirty_pages(memory)
    assert is_zero(memory, FIRST, 512)
    assert memory.read(start + (512 << 12), PAGE_SIZE) == b"\xa5" * PAGE_SIZE
    assert is_zero(memory, FIRST + 513, 2)
    assert memory.read(start + (515 << 12), PAGE_SIZE) == b"\xa5" * PAGE_SIZE
    assert (device.counters()["reported"], device.counters()["refused"]) == (514, 1)


@pytest.mark.parametrize("gpa", [1 << 52, SIZE, HIGH - PAGE_SIZE, (1 << 64) - PAGE_SIZE])
async def test_a_report_outside_ram_breaks_its_queue_and_no_other(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice, gpa: int
) -> None:
    broken: list[str] = []
    device.on_broken = broken.append
    fill(memory, FIRST)
    async with active(device, queues):
        queues[REPORT].offer(queues[REPORT].chain(Descriptor(gpa, PAGE_SIZE, WRITE)))
        queues[REPORT].ring()
        with trio.fail_after(20):
            await until(lambda: bool(broken))
        await give(queues[INFLATE], FIRST)
    assert broken == [f"queue 2: {BROKEN[lib.TV_BROKEN_ADDRESS]}"]
    assert is_zero(memory, FIRST)


async def test_a_guest_that_gives_away_its_own_rings_breaks_nothing_but_them(
    memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice
) -> None:
    own = [gpa // PAGE_SIZE + page for each in queues for gpa in (each.base, each.avail_gpa) for page in range(2)]
    memory.write(LIST, struct.pack(f"<{len(own) + 1}I", *own, LIST // PAGE_SIZE))
    async with active(device, queues):
        queue = queues[INFLATE]
        queue.offer(queue.chain(Descriptor(LIST, 4 * (len(own) + 1))))
        queue.ring()
        with trio.fail_after(20):
            await until(lambda: queue.used_index == 1)
    assert is_zero(memory, LIST // PAGE_SIZE)
    assert device.counters()["released"] == len(own) + 1


async def test_pages_of_a_huge_page(memory: GuestMemory, queues: list[MockDriver], device: BalloonDevice) -> None:
    """RAM that a migration brought may lie on huge pages."""
    region, offset = memory.regions[0], 4 << 20
    first = offset // PAGE_SIZE
    memory.write(offset, b"\xa5" * (2 << 20))
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(region.hva + offset), ctypes.c_size_t(2 << 20), MADV_COLLAPSE):
        pytest.skip("this host gives no huge page (madvise(MADV_COLLAPSE) on a memfd failed)")
    async with active(device, queues):
        await give(queues[INFLATE], *range(first + 3, first + 500))
        assert resident(memory) < 40 * PAGE_SIZE  # the rings, the list, and 15 pages of it; to look at them brings more
        assert is_zero(memory, first + 3, 497)
        assert memory.read((first + 2) * PAGE_SIZE, PAGE_SIZE) == b"\xa5" * PAGE_SIZE
        assert memory.read((first + 500) * PAGE_SIZE, PAGE_SIZE) == b"\xa5" * PAGE_SIZE
        fill(memory, first + 3)
        await give(queues[INFLATE], *range(first, first + 512))
        assert resident(memory) < 40 * PAGE_SIZE
        assert is_zero(memory, first, 512)
    assert device.counters()["failed"] == 0


def test_its_registers(memory: GuestMemory) -> None:
    device = BalloonDevice(BalloonConfig("2M", deflate_on_oom=True), memory, "__balloon")
    assert device.features & 0xFF == 1 << 2
    assert device.queue_sizes == (128, 128)
    assert struct.unpack("<II", device.read_config(0, 8)) == (512, 0)
    told: list[int] = []
    device.on_config_change = lambda: told.append(1)
    device.resize(3 << 20)
    assert (device.read_config(0, 4), told) == ((768).to_bytes(4, "little"), [1])
    for offset, data in [(0, b"abcd"), (4, b"a"), (4, b"abcdefgh"), (5, b"abc"), (2, b"abcd"), (4096, b"abcd")]:
        device.write_config(offset, data)
        assert device.read_config(0, 8) == struct.pack("<II", 768, 0)
    device.write_config(4, (500).to_bytes(4, "little"))
    assert device.given_bytes == 500 * PAGE_SIZE
    assert device.read_config(8, 4) == b"\xff" * 4
    device.reset()
    assert device.given_bytes == 0


def test_it_is_saved_and_loaded(memory: GuestMemory) -> None:
    device = BalloonDevice(BalloonConfig(1 << 20), memory, "__balloon")
    device.write_config(4, (200).to_bytes(4, "little"))
    there = BalloonDevice(BalloonConfig(1 << 20), memory, "__balloon")
    there.become(sent(device.describe()))
    there.load(sent(device.save()))
    assert there.read_config(0, 8) == device.read_config(0, 8)
    assert attrs.asdict(device.save()) == {"wanted": 256, "actual": 200}


@pytest.mark.parametrize("size", [SIZE + HIGH_SIZE, 1 << 40])
def test_one_as_large_as_ram_is_refused(memory: GuestMemory, size: int) -> None:
    with pytest.raises(ConfigError, match=f"^balloon.size = {size}: as much as the VM's memory, or more; give less"):
        BalloonDevice(BalloonConfig(size), memory, "__balloon")
    device = BalloonDevice(BalloonConfig(), memory, "__balloon")
    with pytest.raises(ConfigError, match=f"^desired_balloon = {size}: "):
        device.resize(size)
    assert device.save() == BalloonState(0, 0)
