"""A block device as a disk: a real one, over a loop device, where the host lets us make one."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivmm.config import DiskConfig
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.testing.blocks import DISCARD, FLUSH, IN, OUT, WRITE_ZEROES, BlockDriver, has_direct, open_blocks, ranges
from trivmm.testing.driver import activated
from trivmm.virtio.block.device import F_DISCARD, F_WRITE_ZEROES, BlockDevice
from trivmm.virtio.block.geometry import Geometry, geometry_of
from trivmm.virtio.queue import F_VERSION_1

FEATURES = F_VERSION_1 | F_DISCARD | F_WRITE_ZEROES | 1 << 9
SIZE = 4 << 20
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
LOOP_CONFIG = struct.Struct("<II232x64x")  # struct loop_config: fd, block_size, struct loop_info64, reserved


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path, int]]:
    """A loop device, the file behind it, and its logical block size."""
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\xaa" * SIZE)
    fd = loop = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR)
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        os.close(control)
        path = Path(f"/dev/loop{number}")
        loop, fd = os.open(path, os.O_RDWR), os.open(backing, os.O_RDWR)
        fcntl.ioctl(loop, LOOP_CONFIGURE, LOOP_CONFIG.pack(fd, request.param))
    except OSError as error:
        for each in (fd, loop):
            if each >= 0:
                os.close(each)
        pytest.skip(f"no loop device can be made here ({error}): run this test as root")
    yield path, backing, request.param
    fcntl.ioctl(loop, LOOP_CLR_FD)
    os.close(fd)
    os.close(loop)


@pytest.fixture
def blocks() -> Iterator[BlockDriver]:
    with open_blocks() as made:
        yield made


@pytest.mark.parametrize("direct", [False, True])
async def test_a_block_device_is_a_disk(
    device: tuple[Path, Path, int], blocks: BlockDriver, direct: bool, tmp_path: Path
) -> None:
    path, backing, block = device
    if direct and not has_direct(tmp_path):
        pytest.skip("the folder for temporary files has no direct I/O: give --basetemp on a disk")
    disk = BlockDevice(DiskConfig(str(path), direct=direct), blocks.driver.memory, "_disk0")
    assert struct.unpack("<Q", disk.read_config(0, 8)) == (SIZE // 512,)
    assert struct.unpack("<I", disk.read_config(20, 4)) == (block,), "blk_size is the device's logical block"
    taken = os.stat(backing).st_blocks
    async with activated(disk, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        assert (await blocks.do(OUT, 8, data=b"w" * 4096)).status == 0
        assert (await blocks.do(OUT, 17, data=b"s" * 512)).status == 0, "a part of a block"
        assert (await blocks.do(IN, 8, room=8192)).data == b"w" * 4096 + b"\xaa" * 512 + b"s" * 512 + b"\xaa" * 3072
        assert (await blocks.do(WRITE_ZEROES, data=ranges((1024, 1024, 1)))).status == 0
        assert (await blocks.do(DISCARD, data=ranges((4096, 2048, 0)))).status == 0
        assert (await blocks.do(IN, 1024, room=4096)).data == bytes(4096)
        assert (await blocks.do(FLUSH)).status == 0
    assert disk.counters()["io_errors"] == 0
    disk.close()
    assert backing.read_bytes()[4096:8192] == b"w" * 4096
    assert os.stat(backing).st_blocks < taken, "the hole goes through to the file behind"


def test_a_block_device_in_use_is_named_and_has_its_own_size(device: tuple[Path, Path, int]) -> None:
    path, _, block = device
    memory = GuestMemory([(0, 4 << 20)])
    disk = BlockDevice(DiskConfig(str(path)), memory, "_disk0")
    with pytest.raises(ConfigError, match="in use by another VM"):
        BlockDevice(DiskConfig(str(path)), memory, "_disk1")
    disk.set_capacity(SIZE // 2)
    with pytest.raises(ConfigError, match=rf"desired_size = {2 * SIZE}: the device has {SIZE} bytes"):
        disk.set_capacity(2 * SIZE)
    fd = os.open(path, os.O_RDONLY)
    found = geometry_of(fd)
    os.close(fd)
    assert found.logical == block
    assert found.physical >= block
    assert found.discard % block == 0
    disk.close()
    memory.close()


def test_what_a_driver_is_told_of_blocks() -> None:
    assert Geometry(512, 4096).exponent == 3
    assert Geometry(4096, 4096).exponent == 0
    assert Geometry(512, 512).exponent == 0
