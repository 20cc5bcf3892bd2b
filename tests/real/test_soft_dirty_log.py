"""The soft CPU's dirty log, which is the kernel's: exactly the pages that were written, by whomever; none forgotten."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from trivmm._native import ffi, lib
from trivmm.config import RngConfig
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import PvhEntry
from trivmm.hypervisor.soft import written
from trivmm.hypervisor.soft.written import WrittenPages, why_no_dirty_log
from trivmm.memory.dirty_log import HostWriters
from trivmm.memory.guest import PAGE_SIZE, GuestMemory, MemoryRegion
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, answered
from trivmm.testing.recording import NOTED, RecordingBus
from trivmm.virtio.rng.device import RngDevice

pytestmark = pytest.mark.skipif(
    why_no_dirty_log() is not None, reason=f"needs Linux 6.7 or newer, and userfaultfd allowed: {why_no_dirty_log()}"
)

LOW: Final = 600  # pages of each region: more than a page table holds, and no multiple of 64
HIGH: Final = 77
HIGH_GPA: Final = 1 << 32
ENTRY: Final = 0x1000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(((0, LOW * PAGE_SIZE), (HIGH_GPA, HIGH * PAGE_SIZE)))
    yield made
    made.close()


@pytest.fixture
def log(memory: GuestMemory) -> Iterator[WrittenPages]:
    made = WrittenPages({region.slot: (region.hva, region.size) for region in memory.regions})
    yield made
    made.stop()


def pages_of(bits: Any, region: MemoryRegion) -> set[int]:
    return {page for page in range(region.bitmap_words * 64) if bits[page // 64] >> page % 64 & 1}


def take(log: WrittenPages, region: MemoryRegion) -> set[int]:
    bits = ffi.new("uint64_t[]", region.bitmap_words)
    log.take(region.slot, bits)
    return pages_of(bits, region)


def store(region: MemoryRegion, page: int, value: int, length: int = 1) -> None:
    """As code of this process does: nobody but the kernel is told."""
    ctypes.memset(region.hva + page * PAGE_SIZE, value, length)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_exactly_what_was_written_once(memory: GuestMemory, log: WrittenPages) -> None:
    low, high = memory.regions
    for page in (0, 3, 599):
        store(low, page, 1)
    log.start()
    assert (take(log, low), take(log, high)) == (set(), set())
    memory.read(0, LOW * PAGE_SIZE)  # to read is not to write, with memory and without
    assert take(log, low) == set()
    for page in (0, 3, 64, 65, 511, 512, 599):  # some had memory, some not
        store(low, page, 2)
    store(high, 76, 2)
    assert take(log, low) == {0, 3, 64, 65, 511, 512, 599}
    assert take(log, low) == set()
    assert take(log, high) == {76}
    store(low, 65, 2)  # the same again, and the same value
    assert take(log, low) == {65}


def test_runs_and_single_pages_beyond_what_one_call_gives(memory: GuestMemory, log: WrittenPages) -> None:
    big = GuestMemory(((0, 4096 * PAGE_SIZE),))
    try:
        region = big.regions[0]
        watched = WrittenPages({0: (region.hva, region.size)})
        watched.start()
        wanted = set(range(0, 4096, 2)) | set(range(1000, 1700))  # more than a thousand runs
        for page in wanted:
            store(region, page, 1)
        assert take(watched, region) == wanted
        ctypes.memset(region.hva, 3, region.size)
        assert take(watched, region) == set(range(4096))
        watched.stop()
    finally:
        big.close()


def test_what_the_kernel_writes_for_us_is_seen(memory: GuestMemory, log: WrittenPages) -> None:
    """A worker's read(2) of a disk into guest memory."""
    low = memory.regions[0]
    log.start()
    fd = os.memfd_create("disk")
    try:
        os.ftruncate(fd, PAGE_SIZE)
        into = (ctypes.c_char * (2 * PAGE_SIZE)).from_address(low.hva + 9 * PAGE_SIZE)
        assert os.preadv(fd, [memoryview(into)[100:4000]], 0) == 3900
    finally:
        os.close(fd)
    assert take(log, low) == {9}


async def test_what_a_devices_worker_writes_is_seen(memory: GuestMemory, log: WrittenPages) -> None:
    """Its buffer and its used ring, by the device's own marks and by the kernel: the same pages."""
    low = memory.regions[0]
    driver = MockDriver(memory, base=0x10000)
    device = RngDevice(RngConfig(), memory)
    host, marked = HostWriters(memory), ffi.new("uint64_t[]", low.bitmap_words)
    async with activated(device, driver.setup(0), [driver.handle]):
        driver.offer(driver.chain(Descriptor(0x40800, 0x1000, WRITE)))  # over a page's end
        log.start()
        host.set_dirty_log(True)
        driver.ring()
        assert await answered(driver) == [(0, 0x1000)]
    host.harvest_dirty(0, marked)
    assert take(log, low) == pages_of(marked, low) == {0x40, 0x41, driver.used_gpa >> 12}
    device.close()
    driver.close()


def test_harvests_add_to_what_is_there(memory: GuestMemory, log: WrittenPages) -> None:
    low = memory.regions[0]
    log.start()
    store(low, 70, 1)
    bits = ffi.new("uint64_t[]", low.bitmap_words)
    bits[1] = 1
    log.take(0, bits)
    assert pages_of(bits, low) == {64, 70}


MADV_DONTNEED, MADV_PAGEOUT = 4, 21


@pytest.mark.parametrize("how", ["given back", MADV_DONTNEED, MADV_PAGEOUT])
def test_a_page_that_was_written_and_is_gone_from_the_page_table_is_not_forgotten(
    memory: GuestMemory, log: WrittenPages, how: str | int
) -> None:
    low = memory.regions[0]
    log.start()
    store(low, 5, 1)
    store(low, 6, 1)
    start = low.hva + 5 * PAGE_SIZE
    if isinstance(how, str):
        assert lib.tv_memory_give_back(low.native, 5 * PAGE_SIZE, PAGE_SIZE) == 0
    else:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(PAGE_SIZE), how) == 0
    assert take(log, low) == {5, 6}
    assert take(log, low) == set()
    store(low, 5, 2)
    assert take(log, low) == {5}


def test_nothing_is_left_of_it_when_it_is_off(memory: GuestMemory, log: WrittenPages) -> None:
    low, before = memory.regions[0], open_files()
    for _ in range(3):
        log.start()
        store(low, 1, 1)
    log.start()
    assert take(log, low) == set(), "starting gives a log in which nothing is dirty"
    log.stop()
    log.stop()
    assert (open_files(), log.is_on) == (before, False)
    store(low, 1, 2)
    with pytest.raises(HypervisorError, match="start the log first"):
        take(log, low)


def test_a_log_that_is_not_whole_is_an_error_and_not_an_empty_one(memory: GuestMemory, log: WrittenPages) -> None:
    """Something has mapped over a page in the middle: writes to that are not seen any more."""
    low = memory.regions[0]
    log.start()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    at = ctypes.c_void_p(low.hva + 100 * PAGE_SIZE)
    flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
    where = ctypes.c_long(100 * PAGE_SIZE)
    assert libc.mmap(at, ctypes.c_size_t(PAGE_SIZE), 3, flags, low.memfd, where) == at.value
    with pytest.raises(HypervisorError, match="PAGEMAP_SCAN") as caught:
        take(log, low)
    assert caught.value.errno == errno.EPERM


def test_a_start_that_fails_leaves_nothing(memory: GuestMemory) -> None:
    before = open_files()
    log = WrittenPages({0: (memory.regions[0].hva, memory.regions[0].size), 1: (0x1000, PAGE_SIZE)})
    with pytest.raises(HypervisorError, match="UFFDIO_WRITEPROTECT"):
        log.start()
    assert (open_files(), log.is_on) == (before, False)


@pytest.mark.parametrize("seed", range(12))
def test_random_writes_against_a_shadow(memory: GuestMemory, log: WrittenPages, seed: int) -> None:
    """Pages that a harvest names are copied to the shadow: it is the memory then, and no page too many was named."""
    randomness = random.Random(seed)
    shadows = {region.slot: bytearray(region.size) for region in memory.regions}
    host = HostWriters(memory)
    expected: dict[int, set[int]] = {region.slot: set() for region in memory.regions}

    def put(region: MemoryRegion, page: int) -> None:
        store(region, page, randomness.randrange(256), randomness.choice((1, 8, 4096)))
        expected[region.slot].add(page)

    def sweep(region: MemoryRegion, page: int) -> None:
        count = randomness.randrange(1, region.pages - page + 1)
        ctypes.memset(region.hva + page * PAGE_SIZE, randomness.randrange(256), count * PAGE_SIZE)
        expected[region.slot].update(range(page, page + count))

    def by_host(region: MemoryRegion, page: int) -> None:
        length = randomness.randrange(1, min(3, region.pages - page) * PAGE_SIZE)
        memory.write(region.gpa + page * PAGE_SIZE, randomness.randbytes(length))
        expected[region.slot].update(range(page, page + (length - 1) // PAGE_SIZE + 1))

    def give_back(region: MemoryRegion, page: int) -> None:
        """Marked by whoever does it, as a balloon does."""
        assert lib.tv_memory_give_back(region.native, page * PAGE_SIZE, PAGE_SIZE) == 0
        region.dirty[page // 64] |= 1 << page % 64
        expected[region.slot].add(page)

    def read(region: MemoryRegion, page: int) -> None:
        memory.read(region.gpa + page * PAGE_SIZE, PAGE_SIZE)

    acts: list[Callable[[MemoryRegion, int], None]] = [put, put, put, sweep, by_host, give_back, read]
    log.start()
    for _ in range(40):
        for _ in range(randomness.choice((0, 1, 5, 60))):
            region = randomness.choice(memory.regions)
            randomness.choice(acts)(region, randomness.randrange(region.pages))
        for region in memory.regions:
            bits = ffi.new("uint64_t[]", region.bitmap_words)
            log.take(region.slot, bits)
            host.harvest_dirty(region.slot, bits)
            found = pages_of(bits, region)
            assert found == expected[region.slot]
            expected[region.slot].clear()
            for page in found:
                at = page * PAGE_SIZE
                shadows[region.slot][at : at + PAGE_SIZE] = memory.read(region.gpa + at, PAGE_SIZE)
            assert memory.read(region.gpa, region.size) == shadows[region.slot]


def test_no_write_falls_between_two_harvests(memory: GuestMemory, log: WrittenPages) -> None:
    """A thread writes as fast as it can while pages are harvested and copied: after the last harvest the copy is the
    memory. Each of its writes is to come before a scan, or after it and be found by the next."""
    low = memory.regions[0]
    shadow = bytearray(low.size)
    done = threading.Event()
    counts = [0]

    def write() -> None:
        randomness = random.Random(1)
        while not done.is_set():
            for _ in range(200):
                counts[0] += 1
                store(low, randomness.randrange(LOW), counts[0] & 255, 64)

    log.start()
    writer = threading.Thread(target=write)
    writer.start()
    found: set[int] = set()
    try:
        for _ in range(300):
            for page in take(log, low):
                found.add(page)
                at = page * PAGE_SIZE
                shadow[at : at + PAGE_SIZE] = ffi.buffer(ffi.cast("char *", low.hva + at), PAGE_SIZE)[:]
    finally:
        done.set()
        writer.join(20)
    for page in take(log, low):
        at = page * PAGE_SIZE
        shadow[at : at + PAGE_SIZE] = memory.read(at, PAGE_SIZE)
    assert counts[0]
    assert found
    assert memory.read(0, low.size) == shadow


# --- a VM's ------------------------------------------------------------------------------------------------------


def test_a_vcpus_stores_and_no_others(memory: GuestMemory) -> None:
    pytest.importorskip("unicorn", reason="the soft extra is not installed")
    from trivmm.hypervisor.soft.vm import SoftVm

    # out 0x10, al; mov [0x20000], eax; mov [0x23ffe], eax (two pages); mov eax, [0x30000]; out 0x10, al; hlt
    code = bytes.fromhex("e610 a300000200 a3fe3f0200 a100000300 e610 f4")
    low = memory.regions[0]
    rom = GuestMemory(((0, PAGE_SIZE),))
    vm = SoftVm()
    try:
        for region in memory.regions:
            vm.add_memory(region.slot, region.gpa, region.size, region.hva)
        vm.add_memory(2, 0xFFFF_F000, PAGE_SIZE, rom.regions[0].hva, rom=True)
        vm.add_device_memory(3, HIGH_GPA * 2, PAGE_SIZE, rom.regions[0].hva)
        memory.write(ENTRY, code)
        cpu = vm.create_vcpu(0)
        cpu.set_boot_state(PvhEntry(ENTRY, 0x2000))
        assert vm.live_copy
        bus = RecordingBus()
        assert cpu.run(bus) is NOTED
        vm.set_dirty_log(True)
        assert cpu.run(bus) is NOTED
        bits = ffi.new("uint64_t[]", low.bitmap_words)
        vm.harvest_dirty(0, bits)
        assert pages_of(bits, low) == {0x20, 0x23, 0x24}
        for slot in (1, 2):  # nothing of the other; a ROM has no log
            none = ffi.new("uint64_t[]", low.bitmap_words)
            vm.harvest_dirty(slot, none)
            assert pages_of(none, low) == set()
        vm.set_dirty_log(False)
        with pytest.raises(HypervisorError, match="start the log first"):
            vm.harvest_dirty(0, bits)
    finally:
        vm.close()
        rom.close()


def test_a_closed_vm_leaves_no_log(memory: GuestMemory) -> None:
    pytest.importorskip("unicorn", reason="the soft extra is not installed")
    from trivmm.hypervisor.soft.vm import SoftVm

    before = open_files()
    vm = SoftVm()
    vm.add_memory(0, 0, memory.regions[0].size, memory.regions[0].hva)
    vm.set_dirty_log(True)
    vm.close()
    assert open_files() == before


def test_a_kernel_without_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    monkeypatch.setattr(written, "lib", Without())
    assert why_no_dirty_log() == f"userfaultfd: {os.strerror(errno.EINVAL)}"
    assert open_files() == before


@pytest.mark.parametrize("seen", [0b00, 0b10, 0b01])
def test_a_kernel_that_does_not_see_all_is_not_trusted(monkeypatch: pytest.MonkeyPatch, seen: int) -> None:
    monkeypatch.setattr(written, "lib", Blind(seen))
    assert why_no_dirty_log() == "the kernel does not see all that is written"


class Without:
    """The C library on a kernel before 6.7."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def tv_written_open(self) -> int:
        return -errno.EINVAL


class Blind(Without):
    """… and on one that takes every call, and reports some pages only."""

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def tv_written_open(self) -> int:
        return int(lib.tv_written_open())

    def tv_written_take(self, pagemap: int, start: int, size: int, into: Any) -> int:
        result = int(lib.tv_written_take(pagemap, start, size, into))
        into[0] &= self.seen
        return result
