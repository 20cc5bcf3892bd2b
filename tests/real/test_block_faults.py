"""What a disk does when its image fails, and when its rate limiter says not yet."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm._native import ffi
from trivmm.config import DiskConfig, MemoryConfig, PayloadConfig, RateLimiterConfig, TokenBucketConfig, VmConfig
from trivmm.errors import ConfigError, NoSuchDevice, WrongState
from trivmm.guest import probe_path
from trivmm.testing.blocks import DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES, BlockDriver, open_blocks, ranges
from trivmm.testing.driver import MockDriver, activated, until
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.block.device import F_DISCARD, F_WRITE_ZEROES, BlockDevice
from trivmm.virtio.queue import F_VERSION_1
from trivmm.vm import open_vm

FEATURES = F_VERSION_1 | F_DISCARD | F_WRITE_ZEROES | 1 << 9
SIZE = 1 << 20


@pytest.fixture
def blocks() -> Iterator[BlockDriver]:
    with open_blocks() as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * SIZE)
    return path


def failing(device: BlockDevice, number: int) -> None:
    """Its image says ``number`` to everything from now on."""
    own = device.image.native.ops[0]
    ops = ffi.new("struct tv_image_ops *")
    kept: list[Any] = [ops]

    def fail(*_: Any) -> int:
        ffi.errno = number
        return -1

    for name in ("read", "write", "flush", "discard", "write_zeroes"):
        kept.append(ffi.callback(ffi.typeof(getattr(own, name)), fail, error=-1))
        setattr(ops, name, kept[-1])
    device.image.native.ops = ops
    device.image.failing = kept  # type: ignore[attr-defined]


REQUESTS: list[tuple[str, int, dict[str, Any]]] = [
    ("read", IN, {"room": 512}),
    ("write", OUT, {"data": b"x" * 512}),
    ("flush", FLUSH, {}),
    ("discard", DISCARD, {"data": ranges((0, 8, 0))}),
    ("write-zeroes", WRITE_ZEROES, {"data": ranges((0, 8, 1))}),
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_errors_of_the_image_are_the_guests_io_errors_and_one_event_a_kind(
    blocks: BlockDriver, image: Path, number: int
) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    events: list[tuple[str, dict[str, str]]] = []
    device.on_event = lambda event, **properties: events.append((event, properties))
    failing(device, number)
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        for _ in range(3):
            for _, kind, how in REQUESTS:
                assert (await blocks.do(kind, **how)).status == 1
        assert (await blocks.do(GET_ID, room=20)).status == 0, "the disk goes on"
    told = [("io-error", {"operation": name, "error": errno.errorcode[number]}) for name, _, _ in REQUESTS]
    assert events == told
    shown = device.counters()
    assert (shown["io_errors"], shown["errors"]) == (15, 15)
    assert (shown["flush_ops"], shown["discard_ops"], shown["write_zeroes_ops"]) == (0, 0, 0)
    device.close()


async def test_a_driver_that_resets_its_disk_again_and_again_makes_no_flood_of_events(
    blocks: BlockDriver, image: Path
) -> None:
    """Once a minute and kind, of the disk: neither a reset nor another queue begins anew."""
    device = BlockDevice(DiskConfig(str(image), num_queues=2), blocks.driver.memory, "_disk0")
    events: list[dict[str, str]] = []
    device.on_event = lambda event, **properties: events.append(properties)
    failing(device, errno.EIO)
    other = BlockDriver(MockDriver(blocks.driver.memory, base=4 << 20, size=64), base=5 << 20)
    for each in (blocks, other, blocks):
        each.driver.avail = each.driver.seen = 0
        async with activated(device, each.driver.setup(FEATURES), [each.driver.handle]):
            assert (await each.do(IN, 0, room=512)).status == 1
        device.reset()
        each.driver.memory.write(each.driver.base, bytes(0x9000))
    other.driver.close()
    assert events == [{"operation": "read", "error": "EIO"}]
    device.close()


@pytest.mark.parametrize("written_back", [False, True])
async def test_zeroes_are_written_through_where_the_driver_has_no_flush(
    blocks: BlockDriver, image: Path, written_back: bool
) -> None:
    """A driver without F_FLUSH can't ask for it later. The image's flush fails here, so that it is seen."""
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    failing(device, errno.EIO)
    own = device.image.native.ops[0]
    device.image.native.ops.write_zeroes = kept = ffi.callback(ffi.typeof(own.write_zeroes), lambda *given: given[2])
    features = FEATURES if written_back else FEATURES & ~(1 << 9)
    async with activated(device, blocks.driver.setup(features), [blocks.driver.handle]):
        answer = await blocks.do(WRITE_ZEROES, data=ranges((0, 8, 1)))
    assert answer.status == (0 if written_back else 1)
    device.close()
    del kept


@pytest.mark.parametrize("disable_io_uring", [False, True])
async def test_an_image_that_shrinks_under_us_fails_its_reads_alone(
    blocks: BlockDriver, image: Path, disable_io_uring: bool
) -> None:
    device = BlockDevice(DiskConfig(str(image), disable_io_uring=disable_io_uring), blocks.driver.memory, "_disk0")
    events: list[dict[str, str]] = []
    device.on_event = lambda event, **properties: events.append(properties)
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        os.truncate(image, SIZE // 2)
        assert (await blocks.do(IN, 0, room=4096)).data == b"\xaa" * 4096
        for sector in (SIZE // 1024, SIZE // 1024 - 1, SIZE // 512 - 8):
            assert (await blocks.do(IN, sector, room=4096)).status == 1
        os.truncate(image, SIZE)
        assert (await blocks.do(IN, SIZE // 1024, room=4096)).data == bytes(4096), "and heals"
        os.truncate(image, 2 * SIZE)
        assert (await blocks.do(IN, SIZE // 512, room=512)).status == 1, "what it has grown was not told"
    assert events == [{"operation": "read", "error": "EIO"}]
    assert device.counters()["io_errors"] == 3
    device.close()


async def test_a_full_file_system_is_the_guests_io_error(blocks: BlockDriver, tmp_path: Path) -> None:
    """A real one: a sparse image in a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = await trio.run_process(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_stderr=True
    )
    if done.returncode:
        pytest.skip("only root may mount a small file system: run this test as root")
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (
            trio.CancelScope(shield=True),
            trio.fail_after(60),
        ):  # goes with the last descriptor
            await trio.run_process(["umount", "-l", str(folder)])
        path = Path(f"/proc/self/fd/{inside}/disk.img")
        path.touch()
        os.truncate(path, SIZE)
        device = BlockDevice(DiskConfig(str(path)), blocks.driver.memory, "_disk0")
        events: list[dict[str, str]] = []
        device.on_event = lambda event, **properties: events.append(properties)
        async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
            statuses = [(await blocks.do(OUT, 8 * page, data=b"x" * 4096)).status for page in range(32)]
            assert statuses[0] == 0
            assert statuses[-1] == 1
            assert (await blocks.do(DISCARD, data=ranges((0, 8, 0)))).status == 0
            assert (await blocks.do(OUT, 8 * 31, data=b"y" * 4096)).status == 0, "room again"
        assert events == [{"operation": "write", "error": "ENOSPC"}]
        device.close()
    finally:
        os.close(inside)


# --- the rate limiter ----------------------------------------------------------------------------------------


def limited(image: Path, blocks: BlockDriver, **buckets: TokenBucketConfig) -> BlockDevice:
    config = DiskConfig(str(image), rate_limiter_config=RateLimiterConfig(**buckets))
    return BlockDevice(config, blocks.driver.memory, "_disk0")


async def test_a_rate_is_kept_and_everything_is_served(blocks: BlockDriver, image: Path) -> None:
    """Eight at once, then one every 20 ms: the last of 16 is not earlier than the buckets allow."""
    device = limited(image, blocks, ops=TokenBucketConfig(8, 160), bandwidth=TokenBucketConfig(1 << 30, 1))
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        began = trio.current_time()
        for slot in range(16):
            blocks.offer(IN, 8 * slot, room=4096, slot=slot)
        blocks.driver.ring()
        answers = await blocks.answers(16)
        took = trio.current_time() - began
    assert {answer.data for answer in answers.values()} == {b"\xaa" * 4096}
    assert took > 0.15
    assert device.counters()["limited"] > 0
    device.close()


async def test_a_limiter_never_holds_a_stop_and_the_chain_goes_back(blocks: BlockDriver, image: Path) -> None:
    hour = 3_600_000
    device = limited(image, blocks, bandwidth=TokenBucketConfig(4096, hour))
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        assert (await blocks.do(IN, 0, room=4096)).status == 0
        blocks.offer(OUT, 0, data=b"x" * 512)
        blocks.driver.ring()
        with trio.fail_after(20):
            await until(lambda: device.counters()["limited"] > 0)
    (queue,) = device.queues
    assert (queue.next_avail, queue.next_used) == (1, 1), "it is the driver's next request again"
    assert image.read_bytes() == b"\xaa" * SIZE
    device.close()


async def test_queues_of_a_disk_share_its_limit(blocks: BlockDriver, image: Path) -> None:
    device = limited(image, blocks, ops=TokenBucketConfig(2, 3_600_000))
    half = 4 << 20
    other = BlockDriver(MockDriver(blocks.driver.memory, base=half + 0x10000, size=64), base=half)
    async with (
        activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]),
        activated(device, other.driver.setup(FEATURES), [other.driver.handle]),
    ):
        assert (await blocks.do(GET_ID, room=20)).status == 0
        assert (await other.do(GET_ID, room=20)).status == 0
        for each in (blocks, other):
            each.offer(GET_ID, room=20)
            each.driver.ring()
        with trio.fail_after(20):
            await until(lambda: device.counters()["limited"] >= 2)
        assert not blocks.driver.used()
        assert not other.driver.used()
    other.driver.close()
    device.close()


# --- sharing and resizing ------------------------------------------------------------------------------------


def test_readers_share_an_image_and_a_writer_does_not(blocks: BlockDriver, image: Path) -> None:
    memory = blocks.driver.memory
    readers = [BlockDevice(DiskConfig(str(image), readonly=True), memory, f"_disk{each}") for each in range(3)]
    with pytest.raises(ConfigError, match=r"disks\.path = .*: in use by another VM or program; .*") as caught:
        BlockDevice(DiskConfig(str(image)), memory, "_disk9")
    assert "\n" not in str(caught.value)
    for reader in readers:
        reader.close()
    writer = BlockDevice(DiskConfig(str(image)), memory, "_disk0")
    with pytest.raises(ConfigError, match="in use by another VM"):
        BlockDevice(DiskConfig(str(image), readonly=True), memory, "_disk1")
    writer.close()


async def test_a_disk_that_is_resized_tells_its_driver(blocks: BlockDriver, image: Path) -> None:
    device = BlockDevice(DiskConfig(str(image)), blocks.driver.memory, "_disk0")
    told: list[bytes] = []
    device.on_config_change = lambda: told.append(device.read_config(0, 8))
    async with activated(device, blocks.driver.setup(FEATURES), [blocks.driver.handle]):
        assert (await blocks.do(OUT, SIZE // 512, data=b"x" * 512)).status == 1
        device.set_capacity(2 * SIZE)
        device.capacity_changed()
        assert told == [(SIZE // 256).to_bytes(8, "little")]
        assert (await blocks.do(OUT, SIZE // 512, data=b"x" * 512)).status == 0
        device.set_capacity(SIZE)
        device.capacity_changed()
        assert (await blocks.do(IN, SIZE // 512, room=512)).status == 1
    assert image.stat().st_size == SIZE
    for size, said in ((0, "whole sectors"), (513, "whole sectors"), (1 << 62, "desired_size")):
        with pytest.raises(ConfigError, match=said):
            device.set_capacity(size)
    device.close()


# --- in a VM -------------------------------------------------------------------------------------------------


async def test_a_vm_resizes_its_disks_and_names_what_it_can_not(image: Path, tmp_path: Path) -> None:
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(16 << 20), disks=(DiskConfig(str(image)),))
    async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
        with pytest.raises(WrongState, match="resize-disk"):
            await vm.resize_disk("_disk0", 2 * SIZE)
        await vm.boot()
        assert vm.host.machine is not None
        (slot,) = [each for each in vm.host.machine.board.devices if each.backend.name == "_disk0"]
        before = slot.transport.state.generation
        await vm.resize_disk("_disk0", 2 * SIZE)
        assert slot.backend.read_config(0, 8) == (2 * SIZE // 512).to_bytes(8, "little")
        assert image.stat().st_size == 2 * SIZE
        assert slot.transport.state.generation == before
        for name in ("_disk1", "__rng"):
            with pytest.raises(NoSuchDevice, match=name):
                await vm.resize_disk(name, SIZE)
        with pytest.raises(ConfigError, match="desired_size = 1000: not whole sectors"):
            await vm.resize_disk("_disk0", 1000)


async def test_an_io_error_is_an_event_of_the_vm(image: Path) -> None:
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(16 << 20), disks=(DiskConfig(str(image)),))
    async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
        await vm.boot()
        assert vm.host.machine is not None
        (device,) = [each.backend for each in vm.host.machine.board.devices if isinstance(each.backend, BlockDevice)]
        with vm.events.subscribe() as events:
            device.on_event("io-error", operation="write", error="ENOSPC")
            event = await anext(events)
    assert (event.source, event.event) == ("virtio-device", "io-error")
    assert event.properties == {"id": "_disk0", "generation": "0", "operation": "write", "error": "ENOSPC"}
