"""virtio-blk and virtio-rng with their real worker threads, real files, and the mock driver as the guest."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trivmm._native import ffi
from trivmm.config import DiskConfig, RngConfig
from trivmm.errors import ConfigError, TrivmmError
from trivmm.memory.guest import GuestMemory
from trivmm.state.strict import structure, unstructure
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, answered
from trivmm.testing.states import sent
from trivmm.virtio.block.device import BlockDevice
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.rng.device import RngDevice

VERSION_1 = 1 << 32
FLUSH = 1 << 9
HEADER, DATA, STATUS = 0x100000, 0x101000, 0x140000
IN, OUT, T_FLUSH, GET_ID = 0, 1, 4, 8
PIECES = 32  # of a long request
NONE_YET = (1 << 64) - 1
FRESH_COUNTERS = {  # Cloud Hypervisor's answer for a disk that has done nothing, and what only we count
    "read_bytes": 0,
    "read_ops": 0,
    "read_latency_min": NONE_YET,
    "read_latency_max": NONE_YET,
    "read_latency_avg": 1844674407370955,
    "write_bytes": 0,
    "write_ops": 0,
    "write_latency_min": NONE_YET,
    "write_latency_max": NONE_YET,
    "write_latency_avg": 1844674407370955,
    "flush_ops": 0,
    "discard_ops": 0,
    "write_zeroes_ops": 0,
    "errors": 0,
    "io_errors": 0,
    "limited": 0,
}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 << 20)])
    yield made
    made.close()


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[MockDriver]:
    made = MockDriver(memory)
    yield made
    made.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 256)  # 128 sectors
    return path


@asynccontextmanager
async def active(
    device: WorkerDevice, driver: MockDriver, features: int = VERSION_1 | FLUSH, **where: int
) -> AsyncIterator[None]:
    async with activated(device, driver.setup(features, **where), [driver.handle]):
        yield


def request(driver: MockDriver, kind: int, sector: int, length: int, writable: bool) -> None:
    driver.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write(STATUS, b"\xaa")
    parts = [Descriptor(HEADER, 16)]
    if length:
        parts.append(Descriptor(DATA, length, WRITE if writable else 0))
    parts.append(Descriptor(STATUS, 1, WRITE))
    driver.offer(driver.chain(*parts))
    driver.ring()


async def do(driver: MockDriver, kind: int, sector: int = 0, length: int = 0, writable: bool = True) -> tuple[int, int]:
    """(status byte, used length)"""
    request(driver, kind, sector, length, writable)
    ((_, used),) = await answered(driver)
    return driver.memory.read(STATUS, 1)[0], used


async def test_read_write_flush_and_identity(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image), serial="a-serial"), memory, "_disk0")
    async with active(device, driver):
        assert await do(driver, IN, 1, 1024) == (0, 1025)
        assert memory.read(DATA, 1024) == image.read_bytes()[512:1536]
        memory.write(DATA, b"w" * 512)
        assert await do(driver, OUT, 127, 512, writable=False) == (0, 1)
        assert image.read_bytes()[127 * 512 :] == b"w" * 512
        assert await do(driver, T_FLUSH) == (0, 1)
        assert await do(driver, GET_ID, 0, 20) == (0, 21)
        assert memory.read(DATA, 20) == b"a-serial".ljust(20, b"\0")
    assert device.counters()["read_bytes"] == 1024
    assert device.counters()["write_ops"] == 1
    device.close()


async def test_latencies_are_none_yet_then_measured_and_kept_over_activations(
    memory: GuestMemory, driver: MockDriver, image: Path
) -> None:
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    assert device.counters() == FRESH_COUNTERS
    seen: list[dict[str, int]] = []
    for activation in range(1, 3):
        async with active(device, driver, **({} if activation == 1 else {"next_avail": 2, "next_used": 2})):
            began = time.monotonic_ns()
            assert await do(driver, IN, 0, 4096) == (0, 4097)
            took_us = (time.monotonic_ns() - began) // 1000
            assert (await do(driver, IN, 128, 512))[0] == 1, "past the end: an error, and no latency"
            seen.append(device.counters())  # while its worker runs
            live = seen[-1]
            assert live["read_latency_min"] <= live["read_latency_avg"] <= live["read_latency_max"]
            assert live["read_latency_min"] <= took_us, "measured inside what the driver waited"
        assert device.counters() == live, "an ended worker's are kept"
    assert [(each["read_ops"], each["read_bytes"], each["errors"]) for each in seen] == [(1, 4096, 1), (2, 8192, 2)]
    assert seen[1]["read_latency_min"] <= seen[0]["read_latency_min"]
    assert seen[1]["read_latency_max"] >= seen[0]["read_latency_max"]
    writes = [name for name in FRESH_COUNTERS if name.startswith("write")]
    assert {name: seen[1][name] for name in writes} == {name: FRESH_COUNTERS[name] for name in writes}
    device.close()


async def test_a_stop_that_expires_counts_each_worker_once(
    memory: GuestMemory, driver: MockDriver, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = BlockDevice(DiskConfig(str(image), num_queues=2), memory, "_disk0")
    async with trio.open_nursery() as workers:
        await device.activate(driver.setup(VERSION_1 | FLUSH), [driver.handle], workers)
        assert await do(driver, IN, 0, 512) == (0, 513)
        (worker,) = device._workers
        native, queues = device._make_worker(VERSION_1), {0: driver.queue()}
        late = QueueWorker("late", native, memory, queues, [driver.handle], VERSION_1, device._broken)
        device._workers.append(late)  # it does not hear of the stop yet
        with trio.fail_after(10):
            async with trio.open_nursery() as stopping:
                stopping.start_soon(device.stop)
                await worker.done.wait()
                await trio.testing.wait_all_tasks_blocked()
                stopping.cancel_scope.cancel()
        assert device.counters()["read_ops"] == 1
        late.done.set()
        await device.stop()
        late.close()
    assert device.counters()["read_ops"] == 1
    device.close()


@pytest.mark.parametrize(
    ("kind", "sector", "length", "writable", "status"),
    [
        (IN, 128, 512, True, 1),
        (IN, 127, 1024, True, 1),
        (IN, (1 << 64) - 1, 512, True, 1),
        (IN, 1 << 55, 512, True, 1),
        (IN, 0, 100, True, 1),
        (OUT, 128, 512, False, 1),
        (77, 0, 512, True, 2),
    ],
)
async def test_what_cannot_be_is_answered_so(
    memory: GuestMemory,
    driver: MockDriver,
    image: Path,
    kind: int,
    sector: int,
    length: int,
    writable: bool,
    status: int,
) -> None:
    before = image.read_bytes()
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    async with active(device, driver):
        assert (await do(driver, kind, sector, length, writable))[0] == status
        assert (await do(driver, IN, 0, 512))[0] == 0, "the queue goes on"
    assert image.read_bytes() == before
    device.close()


@pytest.mark.parametrize(("kind", "length", "status", "used"), [(IN, 1000, 1, 0), (77, 512, 2, 0), (GET_ID, 40, 0, 20)])
async def test_the_used_length_counts_no_byte_that_was_not_written(
    memory: GuestMemory, driver: MockDriver, image: Path, kind: int, length: int, status: int, used: int
) -> None:
    """Virtio 1.2 section 2.7.8.2: ``len`` bytes from the first writable one on. The status byte, the last of the
    buffers, counts only where everything before it was written."""
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    memory.write(DATA, b"\xaa" * length)
    async with active(device, driver):
        assert await do(driver, kind, 0, length) == (status, used)
    assert memory.read(DATA + used, length - used) == b"\xaa" * (length - used)
    device.close()


async def test_a_read_only_disk_is_not_written(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    device = BlockDevice(DiskConfig(str(image), readonly=True), memory, "_disk0")
    assert device.features & 1 << 5
    async with active(device, driver):
        assert (await do(driver, OUT, 0, 512, writable=False))[0] == 1
    assert image.read_bytes() == before
    device.close()


async def test_an_image_that_shrank_is_an_io_error(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    os.truncate(image, 512)
    async with active(device, driver):
        assert (await do(driver, IN, 8, 512))[0] == 1
    device.close()


async def test_a_request_without_room_for_its_status_breaks_the_queue(
    memory: GuestMemory, driver: MockDriver, image: Path
) -> None:
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    told = trio.Event()
    problems: list[str] = []

    def broken(problem: str) -> None:
        problems.append(problem)
        told.set()

    device.on_broken = broken
    async with active(device, driver):
        driver.offer(driver.chain(Descriptor(HEADER, 16)))
        driver.ring()
        with trio.fail_after(20):
            await told.wait()
    assert "without room" in problems[0]
    device.close()


async def test_work_that_was_queued_but_not_notified_is_served(
    memory: GuestMemory, driver: MockDriver, image: Path
) -> None:
    """A kick lost over a restore: every queue is looked at once when its worker starts."""
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    async with active(device, driver):
        await do(driver, IN, 0, 512)
    assert device.queues == (driver.queue(1, 1),)
    driver.memory.write(HEADER, struct.pack("<IIQ", IN, 0, 3))
    driver.offer(driver.chain(Descriptor(HEADER, 16), Descriptor(DATA, 512, WRITE), Descriptor(STATUS, 1, WRITE)))
    async with active(device, driver, next_avail=1, next_used=1):
        assert await answered(driver) == [(0, 513)]
    device.close()


def stand_in(device: BlockDevice, kind: int, move: Callable[..., int]) -> None:
    """Its image's reads (or writes) become ``move(real, iov, count, at, flags)``, where ``real(iov, count, at, flags)``
    is the format's own."""
    native = device.image.native
    slow, own, name = ffi.new("struct tv_image_ops *", native.ops[0]), native.ops[0], "read" if kind == IN else "write"

    def called(image: Any, iov: Any, count: int, at: int, flags: int = 0) -> int:
        def real(iov: Any, count: int, at: int, flags: int) -> int:
            args = (flags,) if kind == IN else ()
            return int(getattr(own, name)(image, iov, count, at, *args))

        return move(real, iov, count, at, flags)

    callback = ffi.callback(ffi.typeof(getattr(slow, name)), called, error=-1)
    setattr(slow, name, callback)
    slow.where = ffi.NULL  # the kernel would not ask it
    native.ops = slow
    device.image.stood_in = slow, callback  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [IN, OUT])
async def test_a_long_request_goes_back_when_its_worker_is_to_stop(tmp_path: Path, kind: int) -> None:
    """Over the same megabyte again and again, as a chain of up to 1 GiB can: nobody waits for the end of that. The next
    worker, here or where the VM moves to, does it as a whole."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, PIECES << 20)
    memory = GuestMemory([(0, 4 << 20)])
    driver = MockDriver(memory, size=64)
    memory.write(DATA, b"d" * (1 << 20))
    memory.write(HEADER - 4096, struct.pack("<IIQ", kind, 0, 0))
    parts = [Descriptor(DATA, 1 << 20, WRITE if kind == IN else 0)] * PIECES
    driver.offer(driver.chain(Descriptor(HEADER - 4096, 16), *parts, Descriptor(STATUS + 0x100000, 1, WRITE)))
    device = BlockDevice(DiskConfig(str(path), queue_size=64), memory, "_disk0")
    began, go = threading.Event(), threading.Event()
    pieces: list[int] = []

    def slow(real: Any, iov: Any, count: int, at: int, flags: int) -> int:
        pieces.append(sum(int(iov[number].iov_len) for number in range(count)))
        began.set()
        assert go.wait(20)
        return int(real(iov, count, at, flags))

    stand_in(device, kind, slow)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await device.activate(driver.setup(VERSION_1 | FLUSH), [driver.handle], nursery)
            assert await trio.to_thread.run_sync(began.wait, 20)
            nursery.start_soon(device.stop)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
    assert pieces == [1 << 20], "and not one more"
    assert device.queues == (driver.queue(),), "it is the driver's next request again"
    assert driver.used_index == 0
    shown = device.counters()
    assert (shown["read_ops"], shown["write_ops"], shown["errors"]) == (0, 0, 0)
    async with active(device, driver):
        ((_, used),) = await answered(driver)
    assert pieces == [1 << 20] * (1 + PIECES)
    assert memory.read(STATUS + 0x100000, 1) == b"\0"
    if kind == IN:
        assert used == (PIECES << 20) + 1
        assert memory.read(DATA, 1 << 20) == bytes(1 << 20)
    else:
        with path.open("rb") as file:
            file.seek((PIECES - 1) << 20)
            assert file.read(1 << 20) == b"d" * (1 << 20)
    device.close()
    driver.close()
    memory.close()


def test_the_driver_is_told_how_long_a_request_may_be(memory: GuestMemory, image: Path) -> None:
    """Virtio 1.2 section 5.2.3: VIRTIO_BLK_F_SIZE_MAX and _SEG_MAX, what a worker moves between two looks at its stop
    word, and what a queue holds beside header and status."""
    device = BlockDevice(DiskConfig(str(image), queue_size=64), memory, "_disk0")
    assert device.features & 0b110 == 0b110
    assert struct.unpack("<II", device.read_config(8, 8)) == (1 << 20, 62)
    device.close()


async def test_what_is_done_does_not_wait_for_the_disk(memory: GuestMemory, image: Path) -> None:
    """Two reads in a row: the one that the page cache had is told of before the other one waits for the disk."""
    driver = MockDriver(memory, size=16)
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    for number in range(2):
        memory.write(HEADER + 16 * number, struct.pack("<IIQ", IN, 0, 8 * number))
        data, status = Descriptor(DATA, 512, WRITE), Descriptor(STATUS + number, 1, WRITE)
        driver.offer(driver.chain(Descriptor(HEADER + 16 * number, 16), data, status, first=4 * number))
    waits, go = threading.Event(), threading.Event()

    def cold(real: Any, iov: Any, count: int, at: int, flags: int) -> int:
        if at:
            if flags:
                ffi.errno = errno.EAGAIN  # RWF_NOWAIT
                return -1
            waits.set()
            assert go.wait(20)
        return int(real(iov, count, at, flags))

    stand_in(device, IN, cold)
    with trio.fail_after(20):
        async with active(device, driver):
            assert await trio.to_thread.run_sync(waits.wait, 20)
            first = driver.used()
            go.set()
            assert first + await answered(driver) == [(0, 513), (4, 513)]
    assert first == [(0, 513)]
    device.close()
    driver.close()


async def test_stopping_is_prompt_and_safe_at_any_time(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    where = {"next_avail": 0, "next_used": 0}
    for _ in range(100):
        async with active(device, driver, **where):
            pass
    await device.stop()
    device.close()


async def test_rng_fills_what_is_offered(memory: GuestMemory, driver: MockDriver) -> None:
    device = RngDevice(RngConfig(), memory)
    async with active(device, driver):
        driver.offer(driver.chain(Descriptor(DATA, 5000, WRITE), Descriptor(DATA + 8192, 100, WRITE)))
        driver.ring()
        assert await answered(driver) == [(0, 5100)]
        assert memory.read(DATA, 5000) != bytes(5000)
        assert memory.read(DATA + 8192, 100) != bytes(100)
    assert device.counters()["bytes"] == 5100
    device.close()


@pytest.mark.parametrize(("name", "message"), [("", "is a directory"), ("empty", "is empty"), ("none", "cannot open")])
def test_what_is_no_source_of_entropy(memory: GuestMemory, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=rf"rng\.src = .*{message}.*; give /dev/urandom"):
        RngDevice(RngConfig(str(tmp_path / name)), memory)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 2048])
def test_a_disks_queue_holds_a_request(memory: GuestMemory, image: Path, size: int) -> None:
    """Header, data and status are three descriptors, and ``seg_max`` of one segment is told for them."""
    with pytest.raises(ConfigError, match=r"disks\.queue_size = .*give a power of two, 4 to 1024"):
        BlockDevice(DiskConfig(str(image), queue_size=size), memory, "_disk0")


def test_a_full_request_of_the_smallest_queue_fits_it(memory: GuestMemory, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image), queue_size=4), memory, "_disk0")
    (seg_max,) = struct.unpack("<I", device.read_config(12, 4))
    assert seg_max + 2 <= 4
    device.close()


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "x" * 129])
def test_an_id_is_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"disks\.id = .{1,140}: not a name"):
        DiskConfig("x", id=name)
    with pytest.raises(ConfigError, match=r"rng\.id = .{1,140}: not a name"):
        RngConfig(id=name)


async def test_rng_with_a_source_that_has_nothing_can_be_stopped(
    memory: GuestMemory, driver: MockDriver, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keep = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    device = RngDevice(RngConfig(str(fifo)), memory)
    async with active(device, driver):
        driver.offer(driver.chain(Descriptor(DATA, 64, WRITE)))
        driver.ring()
    assert device.queues == (driver.queue(),), "the chain went back: it is served by the next worker"
    os.write(keep, b"e" * 10)
    async with active(device, driver):
        assert await answered(driver) == [(0, 10)]
    device.close()
    os.close(keep)


# --- images ------------------------------------------------------------------------------------------------------


def test_locks_exclude_and_can_be_handed_over(memory: GuestMemory, image: Path) -> None:
    first = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    with pytest.raises(ConfigError, match=r"disks\.path.*in use"):
        BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    incoming = BlockDevice(DiskConfig(str(image)), memory, "_disk0", lock=False)
    with pytest.raises(ConfigError, match="in use"):
        incoming.image.take_lock()
    first.image.release_lock()
    incoming.image.take_lock()
    with pytest.raises(ConfigError, match="in use"):
        first.image.take_lock()
    incoming.close()
    first.image.take_lock()
    first.image.take_lock()
    first.close()


def test_readers_share_and_exclude_a_writer(memory: GuestMemory, image: Path) -> None:
    readers = [BlockDevice(DiskConfig(str(image), readonly=True), memory, f"_disk{n}") for n in range(2)]
    with pytest.raises(ConfigError, match="in use"):
        BlockDevice(DiskConfig(str(image)), memory, "_disk2")
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.img", "No such file"), (".", "directory"), ("fifo", "neither a file")],
)
def test_what_is_no_image(memory: GuestMemory, tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=message):
        BlockDevice(DiskConfig(f"{tmp_path}/{name}"), memory, "_disk0")
    assert not (tmp_path / "absent.img").exists(), "never created"


def test_a_serial_that_is_no_text_leaks_nothing(memory: GuestMemory, image: Path) -> None:
    before = os.listdir("/proc/self/fd")
    BlockDevice(DiskConfig(str(image), serial="\ud800"), memory, "_disk0").close()
    assert os.listdir("/proc/self/fd") == before


async def test_a_destinations_disk_is_the_senders(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    source = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    described = sent(source.describe())
    copy = image.with_name("copy.img")
    copy.write_bytes(image.read_bytes() + bytes(512))
    device = BlockDevice(DiskConfig(str(copy)), memory, "_disk0")
    device.become(described)
    assert device.read_config(0, 8) == source.read_config(0, 8)
    async with active(source, driver):
        assert await do(driver, GET_ID, 0, 20) == (0, 21)
    identity = memory.read(DATA, 20)
    memory.write(DATA, bytes(20))
    other = MockDriver(memory, base=0x20000)
    async with active(device, other):
        assert await do(other, GET_ID, 0, 20) == (0, 21)
        assert memory.read(DATA, 20) == identity
        assert (await do(other, IN, 128, 512))[0] == 1  # what the sender's disk has not
    other.close()
    device.close()
    source.close()


def test_a_description_that_makes_no_sense_is_refused(memory: GuestMemory, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    described = device.describe()
    for field in attrs.fields(type(described)):
        for bad in (None, -1, "x", "_" * 40, [None], 1 << 70):
            with pytest.raises(TrivmmError, match=rf"part\.{field.name}.* is "):
                device.become(sent(described, **{field.name: bad}))
        given = {key: value for key, value in unstructure(described).items() if key != field.name}
        with pytest.raises(TrivmmError, match=rf"part\.{field.name} is missing"):
            structure("part", given, device.description_type)
    with pytest.raises(TrivmmError, match='unknown field "colour"'):
        sent(described, colour="red")
    for name in ("type", "features"):
        with pytest.raises(TrivmmError, match=rf"_disk0: the sender's {name} is 77, here it is "):
            device.become(sent(described, **{name: 77}))
    assert device.describe() == described
    device.close()


@pytest.mark.parametrize(
    ("options", "resize", "complaint"),
    [
        ({}, 127 * 512, r"disks\.path = .*copy\.img.*127 sectors, the sender's disk has 128.*full copy"),
        ({"readonly": True}, 128 * 512, r"_disk0: the sender's features is \d+, here it is \d+"),
        ({"queue_size": 64}, 128 * 512, r"_disk0: the sender's queue_sizes is \[128\], here it is \[64\]"),
    ],
)
async def test_a_destinations_disk_that_is_another_is_refused(
    memory: GuestMemory, image: Path, options: dict[str, Any], resize: int, complaint: str
) -> None:
    source = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    described = source.describe()
    source.close()
    copy = image.with_name("copy.img")
    copy.write_bytes(bytes(resize))
    device = BlockDevice(DiskConfig(str(copy), **options), memory, "_disk0")
    with pytest.raises(TrivmmError, match=complaint):
        device.become(described)
    device.close()
