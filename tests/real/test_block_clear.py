"""Discard and write-zeroes (virtio 1.2 section 5.2.6): holes in a real file, and every request that is none."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivmm._native import lib
from trivmm.config import DiskConfig
from trivmm.memory.guest import GuestMemory
from trivmm.testing.blocks import DISCARD, GET_ID, IN, OUT, WRITE_ZEROES, BlockDriver, open_blocks, ranges
from trivmm.testing.driver import activated
from trivmm.virtio.block.device import F_DISCARD, F_WRITE_ZEROES, BlockDevice
from trivmm.virtio.queue import F_VERSION_1

ALL = F_VERSION_1 | F_DISCARD | F_WRITE_ZEROES | 1 << 9
SIZE = 4 << 20
SECTORS = SIZE // 512
UNMAP = 1
OK, IOERR, UNSUPP = 0, 1, 2


@pytest.fixture
def blocks() -> Iterator[BlockDriver]:
    with open_blocks() as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * SIZE)
    return path


def room_taken(path: Path) -> int:
    return os.stat(path).st_blocks * 512


async def test_a_discard_gives_room_back_and_nothing_else_changes(blocks: BlockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    before = room_taken(image)
    async with activated(device, blocks.driver.setup(ALL), [blocks.driver.handle]):
        answer = await blocks.do(DISCARD, data=ranges((8, 2048, 0), (4096, 8, 0)))
        assert (answer.status, answer.used) == (OK, 1)
        assert (await blocks.do(IN, 0, room=512)).data == b"\xaa" * 512
    assert room_taken(image) == before - (2048 + 8) * 512
    data = image.read_bytes()
    assert len(data) == SIZE
    assert data == b"\xaa" * 4096 + bytes(1 << 20) + data[4096 + (1 << 20) :]
    assert data.count(0) == (2048 + 8) * 512
    shown = device.counters()
    assert (shown["discard_ops"], shown["write_zeroes_ops"], shown["errors"]) == (1, 0, 0)
    device.close()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("flags", [0, UNMAP])
@pytest.mark.parametrize("place", ["", "memory"])
async def test_zeroes_are_written_with_a_hole_or_without(
    blocks: BlockDriver, image: Path, sparse: bool, flags: int, place: str
) -> None:
    """On a file system with ZERO_RANGE and on one without, each sector for itself."""
    path = Path("/dev/shm") / f"trivmm-test-{os.getpid()}.img" if place else image
    path.write_bytes(b"\xaa" * SIZE)
    try:
        device = BlockDevice(DiskConfig(str(path), sparse=sparse), blocks.driver.memory, "_disk0")
        before = room_taken(path)
        async with activated(device, blocks.driver.setup(ALL), [blocks.driver.handle]):
            assert (await blocks.do(WRITE_ZEROES, data=ranges((9, 4099, flags)))).status == OK
        data = path.read_bytes()
        assert data == b"\xaa" * (9 * 512) + bytes(4099 * 512) + b"\xaa" * (SIZE - (9 + 4099) * 512)
        given_back = before - room_taken(path)
        assert given_back > 4000 * 512 if sparse and flags else given_back == 0
        assert device.counters()["write_zeroes_ops"] == 1
        device.close()
    finally:
        if place:
            path.unlink()


MOST = int(lib.TV_BLOCK_CLEAR_SECTORS)


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", IOERR),
        (b"x" * 15, IOERR),
        (ranges((0, 8, 0))[:-1], IOERR),
        (ranges((0, 8, 0)) + b"x", IOERR),
        (ranges(*[(0, 1, 0)] * 33), IOERR),
        (ranges((0, 8, 2)), UNSUPP),
        (ranges((0, 8, 1 << 31)), UNSUPP),
        (ranges((SECTORS, 1, 0)), IOERR),
        (ranges((SECTORS - 1, 2, 0)), IOERR),
        (ranges((1 << 63, 8, 0)), IOERR),
        (ranges(((1 << 64) - 1, 1, 0)), IOERR),
        (ranges((0, (1 << 32) - 1, 0)), IOERR),
        (ranges((0, MOST + 1, 0)), IOERR),
        (ranges((0, 8, 0), (8, 8, 4)), UNSUPP),
        (ranges((0, 8, 0), (SECTORS, 8, 0)), IOERR),
    ],
)
async def test_what_is_no_range_changes_nothing(
    blocks: BlockDriver, image: Path, kind: int, data: bytes, status: int
) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    async with activated(device, blocks.driver.setup(ALL), [blocks.driver.handle]):
        assert (await blocks.do(kind, data=data)).status == status
        assert (await blocks.do(kind, data=ranges((0, 0, 0), (SECTORS, 0, 0)))).status == OK, "nothing, anywhere"
        assert (await blocks.do(GET_ID, room=20)).status == OK
    assert image.read_bytes() == b"\xaa" * SIZE
    shown = device.counters()
    assert (shown["errors"], shown["io_errors"]) == (1, 0)
    device.close()


async def test_a_discard_must_not_say_unmap(blocks: BlockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    async with activated(device, blocks.driver.setup(ALL), [blocks.driver.handle]):
        assert (await blocks.do(DISCARD, data=ranges((0, 8, UNMAP)))).status == UNSUPP
    assert image.read_bytes() == b"\xaa" * SIZE
    device.close()


async def test_what_was_not_negotiated_is_not_there(blocks: BlockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    async with activated(device, blocks.driver.setup(F_VERSION_1), [blocks.driver.handle]):
        for kind in (DISCARD, WRITE_ZEROES):
            assert (await blocks.do(kind, data=ranges((0, 8, 0)))).status == UNSUPP
    assert image.read_bytes() == b"\xaa" * SIZE
    device.close()


async def test_a_read_only_disk_keeps_what_it_has(blocks: BlockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image), readonly=True), blocks.driver.memory, "_disk0")
    assert not device.features & (F_DISCARD | F_WRITE_ZEROES)
    async with activated(device, blocks.driver.setup(ALL), [blocks.driver.handle]):
        for kind in (DISCARD, WRITE_ZEROES):
            assert (await blocks.do(kind, data=ranges((0, 8, 0)))).status == IOERR
        assert (await blocks.do(OUT, data=b"x" * 512)).status == IOERR
    assert image.read_bytes() == b"\xaa" * SIZE
    device.close()


@pytest.mark.parametrize("sparse", [True, False])
def test_the_driver_is_told_of_limits_and_queues(tmp_path: Path, sparse: bool) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    memory = GuestMemory([(0, 4 << 20)])
    device = BlockDevice(DiskConfig(str(path), num_queues=3, sparse=sparse), memory, "_disk0")
    told = struct.unpack("<QIIHBBIBBHIBBHIIIIIB", device.read_config(0, 57))
    block = os.stat(path).st_blksize
    assert told[0] == 2048
    assert told[6] == 512
    assert 512 << told[7] == block, "a physical block of the file system, told as a power of two"
    assert told[11:14] == (1, 0, 3), "writeback, and as many queues as there are"
    assert told[14:17] == ((MOST, 32, block // 512) if sparse else (0, 0, 0))
    assert told[17:20] == (MOST, 32, sparse)
    assert bool(device.features & F_DISCARD) == sparse
    assert device.features & F_WRITE_ZEROES
    assert device.features & 1 << 12, "VIRTIO_BLK_F_MQ"
    assert device.features & 1 << 10, "VIRTIO_BLK_F_TOPOLOGY"
    assert device.read_config(60, 8) == b"\xff" * 8
    device.close()
    memory.close()
