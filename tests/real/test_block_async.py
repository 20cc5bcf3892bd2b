"""Requests under way at once through io_uring, and direct I/O with every alignment: real files, real threads."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from trivmm._native import ffi
from trivmm.config import DiskConfig
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.testing.blocks import FLUSH, IN, OUT, BlockDriver, has_direct
from trivmm.testing.driver import MockDriver, activated
from trivmm.virtio.block.device import BlockDevice
from trivmm.virtio.queue import F_VERSION_1

FEATURES = F_VERSION_1 | 1 << 9
SIZE = 4 << 20
SLOTS = 128  # more than may be under way
PAGE = 4096


@pytest.fixture
def blocks() -> Iterator[BlockDriver]:
    memory = GuestMemory([(0, 64 << 20)])
    driver = MockDriver(memory, size=512)
    yield BlockDriver(driver, slot_bytes=0x8000)
    driver.close()
    memory.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def make(image: Path, blocks: BlockDriver, **options: Any) -> BlockDevice:
    return BlockDevice(DiskConfig(str(image), queue_size=512, **options), blocks.driver.memory, "_disk0")


def evict(path: Path) -> None:
    """Out of the page cache, so that reads wait for the medium."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("disable_io_uring", [False, True])
async def test_many_at_once_each_have_their_own_data(
    blocks: BlockDriver, image: Path, direct: bool, disable_io_uring: bool
) -> None:
    if direct and not has_direct(image.parent):
        pytest.skip("the folder for temporary files has no direct I/O: give --basetemp on a disk")
    rng = random.Random(2)
    expected = bytearray(image.read_bytes())
    evict(image)
    device = make(image, blocks, direct=direct, disable_io_uring=disable_io_uring)
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        for _ in range(4):
            sectors = rng.sample(range(SIZE // PAGE), SLOTS)
            kinds = [rng.choice((IN, OUT)) for _ in sectors]
            wanted = {}
            for slot, (page, kind) in enumerate(zip(sectors, kinds, strict=True)):
                if kind == IN:
                    wanted[slot] = bytes(expected[page * PAGE : (page + 1) * PAGE])
                    blocks.offer(IN, page * 8, room=PAGE, slot=slot)
                else:
                    data = rng.randbytes(PAGE)
                    expected[page * PAGE : (page + 1) * PAGE] = data
                    blocks.offer(OUT, page * 8, data=data, slot=slot)
            blocks.driver.ring()
            answers = await blocks.answers(SLOTS)
            assert {answer.status for answer in answers.values()} == {0}
            for slot, data in wanted.items():
                assert answers[slot].data == data
                assert answers[slot].used == PAGE + 1
            assert {answers[slot].used for slot in range(SLOTS) if slot not in wanted} <= {1}
        assert (await blocks.do(FLUSH)).status == 0
    assert image.read_bytes() == bytes(expected)
    shown = device.counters()
    assert shown["read_ops"] + shown["write_ops"] == 4 * SLOTS
    assert shown["errors"] == 0
    device.close()


SHAPES = [  # sector, bytes, where segments end, bytes that the buffer is off a page
    (0, 4096, (), 0),
    (8, 4096, (512,), 0),
    (8, 4096, (1000,), 0),
    (1, 512, (), 0),
    (3, 1536, (7,), 0),
    (16, 8192, (4096,), 1),
    (17, 8192, (4000,), 3),
    (5, 512, (1,), 511),
    (SIZE // 512 - 1, 512, (), 13),
]


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("shape", SHAPES)
async def test_direct_io_of_any_alignment(
    blocks: BlockDriver, image: Path, shape: tuple[int, int, tuple[int, ...], int], block: int
) -> None:
    """Also on a medium whose blocks are larger than a sector."""
    if not has_direct(image.parent):
        pytest.skip("the folder for temporary files has no direct I/O: give --basetemp on a disk")
    sector, length, cut, shift = shape
    before = image.read_bytes()
    device = make(image, blocks, direct=True)
    if block < device.image.owner.block_align:
        pytest.skip("the folder for temporary files has larger blocks")
    device.image.owner.block_align = device.image.owner.memory_align = block
    data = random.Random(3).randbytes(length)
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        read = await blocks.do(IN, sector, room=length, cut=cut, shift=shift)
        assert (read.status, read.used) == (0, length + 1)
        assert read.data == before[sector * 512 : sector * 512 + length]
        assert (await blocks.do(OUT, sector, data=data, cut=cut, shift=shift)).status == 0
        blocks.offer(IN, sector, room=length, slot=1)
        blocks.driver.ring()
        assert (await blocks.answers())[1].data == data
    assert image.read_bytes() == before[: sector * 512] + data + before[sector * 512 + length :]
    device.close()


async def test_parts_of_one_block_written_side_by_side_all_arrive(blocks: BlockDriver, image: Path) -> None:
    """Sectors of a block of 4 KiB, and whole blocks, over and over: none undoes another."""
    if not has_direct(image.parent):
        pytest.skip("the folder for temporary files has no direct I/O: give --basetemp on a disk")
    device = make(image, blocks, direct=True)
    device.image.owner.block_align = device.image.owner.memory_align = PAGE
    half = 0x2000000
    other = MockDriver(blocks.driver.memory, base=half + 0x10000, size=512)
    second = BlockDriver(other, slot_bytes=0x8000, base=half)
    expected = bytearray(image.read_bytes())

    async def write(side: BlockDriver, name: int) -> None:
        rng = random.Random(name)
        for round_ in range(16):
            for slot in range(32):
                page = slot * 2
                sector = page * 8 + (name if round_ % 2 else 2 + name)
                data = rng.randbytes(512)
                expected[sector * 512 : (sector + 1) * 512] = data
                side.offer(OUT, sector, data=data, slot=slot)
            side.driver.ring()
            assert {each.status for each in (await side.answers(32)).values()} == {0}

    async with (
        activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]),
        activated(device, other.setup(FEATURES), [other.handle]),
        trio.open_nursery() as both,
    ):
        both.start_soon(write, blocks, 0)
        both.start_soon(write, second, 1)
    assert image.read_bytes() == bytes(expected)
    device.close()
    other.close()


def test_a_file_system_without_direct_io_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    real = os.open

    def refuse(name: Any, flags: int, *more: Any, **how: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *more, **how)

    monkeypatch.setattr(os, "open", refuse)
    memory = GuestMemory([(0, 4 << 20)])
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=r"disks\.direct = true: .* no direct I/O; leave it out"):
        BlockDevice(DiskConfig(str(path), direct=True), memory, "_disk0")
    assert os.listdir("/proc/self/fd") == before
    memory.close()


async def test_a_stop_waits_for_what_is_under_way_and_gives_the_rest_back(
    blocks: BlockDriver, image: Path, tmp_path: Path
) -> None:
    """The ring positions fit what was answered, and the next worker does the rest."""
    device = make(image, blocks)
    pipe_read, pipe_write = os.pipe()  # a read of it waits for as long as we like
    own, slow = device.image.native.ops[0], ffi.new("struct tv_image_ops *", device.image.native.ops[0])
    asked = threading.Semaphore(0)

    def where(raw: Any, iov: Any, count: int, at: int, write: int, fd: Any, offset: Any) -> int:
        fd[0], offset[0] = pipe_read, (1 << 64) - 1
        asked.release()
        return 1

    callback = ffi.callback(ffi.typeof(own.where), where, error=0)
    slow.where = callback
    device.image.native.waits = 1
    device.image.native.ops = slow
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await device.activate(blocks.driver.setup(FEATURES), [blocks.driver.handle], nursery)
            for slot in range(3):
                blocks.offer(IN, 8 * slot, room=512, slot=slot)
            blocks.driver.ring()
            for _ in range(3):
                await trio.to_thread.run_sync(asked.acquire)
            nursery.start_soon(device.stop)
            await trio.testing.wait_all_tasks_blocked()
            assert blocks.driver.used_index == 0
            os.write(pipe_write, b"p" * 1536)
    assert [queue.next_avail for queue in device.queues] == [3]
    assert [queue.next_used for queue in device.queues] == [3]
    assert {slot: answer.data for slot, answer in (await blocks.answers(3)).items()} == dict.fromkeys(
        range(3), b"p" * 512
    )
    os.close(pipe_read)
    os.close(pipe_write)
    device.close()
