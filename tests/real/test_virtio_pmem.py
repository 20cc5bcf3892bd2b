"""virtio-pmem with its real worker thread, real files and real mappings, and the mock driver as the guest."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from trivmm._native import lib
from trivmm.errors import ConfigError, MigrationError
from trivmm.memory import layout
from trivmm.memory.device_memory import DeviceMemory, FileMapping
from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, answered, until
from trivmm.testing.scripted import ScriptedVm
from trivmm.testing.states import sent
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.virtio.pmem.device import PmemDevice
from trivmm.virtio.queue.worker import BROKEN

VERSION_1 = 1 << 32
REQUEST, ANSWER = 0x100000, 0x101000
MIB = 1 << 20
TOP = layout.DEVICE_MEMORY_END


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 * MIB)])
    yield made
    made.close()


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[MockDriver]:
    made = MockDriver(memory)
    yield made
    made.close()


@pytest.fixture
def room(memory: GuestMemory) -> Iterator[DeviceMemory]:
    made = DeviceMemory(ScriptedVm(()), memory, 10)
    yield made
    made.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "pmem.img"
    path.write_bytes(bytes(range(256)) * (4 * MIB // 256))
    return path


def calls(room: DeviceMemory) -> list[object]:
    found: list[object] = list(room.vm.calls)
    room.vm.calls.clear()
    return found


def peek(mapping: FileMapping, offset: int, length: int) -> bytes:
    return ctypes.string_at(mapping.hva + offset, length)


def poke(mapping: FileMapping, offset: int, data: bytes) -> None:
    ctypes.memmove(mapping.hva + offset, data, len(data))


def active(device: PmemDevice, driver: MockDriver) -> AbstractAsyncContextManager[None]:
    """From where the driver is."""
    setup = driver.setup(VERSION_1, next_avail=driver.avail, next_used=driver.seen)
    return activated(device, setup, [driver.handle])


async def ask(driver: MockDriver, request: bytes, room: int = 4) -> tuple[int, int]:
    """(the answer, the used length)"""
    driver.memory.write(REQUEST, request.ljust(8, b"\xee"))
    driver.memory.write(ANSWER, b"\xaa" * 8)
    parts = [Descriptor(REQUEST, len(request))] if request else []
    driver.offer(driver.chain(*parts, Descriptor(ANSWER, room, WRITE)))
    driver.ring()
    found = await answered(driver)
    return struct.unpack("<I", driver.memory.read(ANSWER, 4))[0], found[0][1]


async def test_what_is_stored_is_in_the_file_and_flushed(
    memory: GuestMemory, driver: MockDriver, room: DeviceMemory, image: Path
) -> None:
    device = PmemDevice(PmemConfig(image), memory, "_pmem0")
    device.plug(room)
    assert struct.unpack("<QQ", device.read_config(0, 16)) == (TOP - 4 * MIB, 4 * MIB)
    assert calls(room) == [("add_device_memory", 64, TOP - 4 * MIB, 4 * MIB)]
    assert peek(device.mapping, MIB, 256) == bytes(range(256))
    async with active(device, driver):
        poke(device.mapping, 3 * MIB, b"stored")
        assert await ask(driver, struct.pack("<I", 0)) == (0, 4)
    assert image.read_bytes()[3 * MIB :].startswith(b"stored")
    assert device.counters() == {"flush_ops": 1, "errors": 0}
    device.close()
    room.close()


@pytest.mark.parametrize(("request_", "room_"), [(b"\1\0\0\0", 4), (b"\0\0\0", 4), (b"", 8), (b"\xff" * 4, 4)])
async def test_what_is_no_request_is_an_error(
    memory: GuestMemory, driver: MockDriver, image: Path, request_: bytes, room_: int
) -> None:
    device = PmemDevice(PmemConfig(image), memory, "_pmem0")
    async with active(device, driver):
        assert await ask(driver, request_, room_) == (1, 4)
        assert await ask(driver, bytes(64)) == (0, 4)
    assert device.counters() == {"flush_ops": 1, "errors": 1}
    device.close()


async def test_a_flush_that_fails_is_an_error(
    memory: GuestMemory, driver: MockDriver, image: Path, tmp_path: Path
) -> None:
    device = PmemDevice(PmemConfig(image), memory, "_pmem0")
    read, write = os.pipe()  # which can't be flushed
    assert device._image is not None
    os.dup2(write, device._image.fd)
    async with active(device, driver):
        assert await ask(driver, bytes(4)) == (1, 4)
    assert device.counters() == {"flush_ops": 1, "errors": 1}
    device.close()
    os.close(read)
    os.close(write)


async def test_a_request_without_room_for_its_answer_breaks_the_queue(
    memory: GuestMemory, driver: MockDriver, image: Path
) -> None:
    device = PmemDevice(PmemConfig(image), memory, "_pmem0")
    broken: list[str] = []
    device.on_broken = broken.append
    async with active(device, driver):
        driver.offer(driver.chain(Descriptor(REQUEST, 4), Descriptor(ANSWER, 3, WRITE)))
        driver.ring()
        with trio.fail_after(20):
            await until(lambda: bool(broken))
    assert broken == [f"queue 0: {BROKEN[lib.TV_BROKEN_REQUEST]}"]
    device.close()


async def test_writes_that_are_discarded(memory: GuestMemory, driver: MockDriver, image: Path) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    config = PmemConfig(image, size=2 * MIB, discard_writes=True)
    device, other = PmemDevice(config, memory, "_pmem0"), PmemDevice(config, memory, "_pmem1")
    poke(device.mapping, 0, b"mine alone")
    assert peek(other.mapping, 0, 10) == before[:10]
    async with active(device, driver):
        assert await ask(driver, bytes(4)) == (0, 4)
    assert image.read_bytes() == before
    with pytest.raises(MigrationError, match=r"_pmem0: what the guest writes there is in this process only \(discard"):
        device.describe()
    with pytest.raises(ConfigError, match="in use by another VM or program"):
        PmemDevice(PmemConfig(image), memory, "_pmem2")
    device.close()
    other.close()


def test_a_scratch_file_in_a_folder(memory: GuestMemory, tmp_path: Path) -> None:
    device = PmemDevice(PmemConfig(tmp_path, "2M"), memory, "_pmem0")
    poke(device.mapping, 2 * MIB - 4, b"last")
    assert list(tmp_path.iterdir()) == []
    assert device.storage is None
    with pytest.raises(MigrationError, match=r"in this process only \(a scratch file in a folder\)"):
        device.describe()
    device.close()


@pytest.mark.parametrize(
    ("length", "size", "said"),
    [
        (0, None, "its 0 bytes are no multiple of 2 MiB; make it longer"),
        (MIB, None, f"its {MIB} bytes are no multiple of 2 MiB; make it longer"),
        (5 * MIB, None, f"its {5 * MIB} bytes are no multiple of 2 MiB; give size={4 * MIB}, or make it longer"),
        (2 * MIB, 4 * MIB, f"has {2 * MIB} bytes, size says {4 * MIB}"),
    ],
)
def test_a_file_of_another_size(memory: GuestMemory, tmp_path: Path, length: int, size: int | None, said: str) -> None:
    path = tmp_path / "pmem.img"
    path.touch()
    os.truncate(path, length)
    with pytest.raises(ConfigError) as caught:
        PmemDevice(PmemConfig(path, size), memory, "_pmem0")
    assert str(caught.value).startswith(f'pmem.file = "{path}": {said}')
    assert path.stat().st_size == length
    again = PmemDevice(PmemConfig(path, 2 * MIB), memory, "_pmem0") if length > 2 * MIB else None  # nothing is locked
    if again is not None:
        again.close()


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("nowhere", None, "No such file or directory; create it"),
        (".", None, "a folder, and no size; give size=SIZE, or a file"),
        ("/proc", 2 * MIB, "Operation not supported; give a folder for new files, or a file"),
        ("/dev/null", None, "neither a file nor a block device"),
    ],
)
def test_what_is_no_file(memory: GuestMemory, tmp_path: Path, name: str, size: int | None, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PmemDevice(PmemConfig(tmp_path / name, size), memory, "_pmem0")
    assert str(caught.value).startswith(f'pmem.file = "{tmp_path / name}": {said}')


async def test_a_file_that_is_cut_costs_nobody_but_its_guest(
    memory: GuestMemory, room: DeviceMemory, image: Path
) -> None:
    """Where this process touches a page that is gone, that is a SIGBUS of all of it."""
    device = PmemDevice(PmemConfig(image), memory, "_pmem0")
    device.plug(room)
    poke(device.mapping, 3 * MIB, b"there")
    assert room.fault(stopped=False) is room.fault(stopped=True) is None
    os.truncate(image, MIB)
    assert room.fault(stopped=False) is None  # nobody has touched it
    said = f"the file behind _pmem0 ({image})"
    assert room.fault(stopped=True) == f"{said}: cut to {MIB} bytes, of which the guest has {4 * MIB}"
    assert peek(device.mapping, 3 * MIB, 5) == bytes(5)
    poke(device.mapping, 4 * MIB - 1, b"x")
    assert peek(device.mapping, MIB - 256, 256) == bytes(range(256))
    assert room.fault(stopped=False) == f"{said}: a page of it is gone"
    assert image.stat().st_size == MIB
    device.close()


def test_a_signal_that_is_not_ours_goes_where_it_went_before(tmp_path: Path, image: Path) -> None:
    """In a process of its own, which it ends."""
    source = f"""
import ctypes, mmap, os, sys
from trivmm.memory.device_memory import FileMapping
fd = os.open({str(image)!r}, os.O_RDWR)
mapping = FileMapping(fd, {4 * MIB}, private=False, what="it")
os.truncate({str(image)!r}, 0)
assert ctypes.string_at(mapping.hva, 3) == bytes(3) and mapping.lost()
mapping.close()
other = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(other, 4096)
theirs = mmap.mmap(other, 4096)
os.truncate(other, 0)
print("still here", flush=True)
theirs[0]
print("and now", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path / "other")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (-7, "still here\n"), done.stderr


def test_where_they_lie_and_where_a_sender_has_them(memory: GuestMemory, room: DeviceMemory, tmp_path: Path) -> None:
    devices = []
    for number in range(3):
        path = tmp_path / f"{number}.img"
        path.touch()
        os.truncate(path, 2 * MIB << number)
        devices.append(PmemDevice(PmemConfig(path), memory, f"_pmem{number}"))
        devices[-1].plug(room)
    assert [each.start for each in devices] == [TOP - 2 * MIB, TOP - 6 * MIB, TOP - 14 * MIB]
    devices[1].unplug()
    devices[1].unplug()
    hole = PmemDevice(PmemConfig(tmp_path, 2 * MIB), memory, "hole")
    hole.plug(room)
    assert hole.start == TOP - 4 * MIB
    calls(room)
    described = sent(devices[0].describe(), start=TOP - 6 * MIB)
    devices[0].become(described)
    assert devices[0].start == TOP - 6 * MIB
    assert calls(room) == [
        ("remove_device_memory", 64, TOP - 2 * MIB, 2 * MIB),
        ("add_device_memory", 64, TOP - 6 * MIB, 2 * MIB),
    ]
    devices[0].become(sent(devices[0].describe(), start=1 << 32))  # right above RAM: there is room
    assert devices[0].start == 1 << 32
    for start in (TOP - 4 * MIB, TOP, 0, TOP - 2 * MIB + 4096, (1 << 64) - 2 * MIB):
        with pytest.raises(ConfigError, match="no place for device memory"):
            devices[0].become(sent(devices[0].describe(), start=start))
    with pytest.raises(MigrationError, match="_pmem2: the sender's has 1 bytes, here it is 8388608"):
        devices[2].become(sent(devices[2].describe(), size=1))
    for each in (*devices, hole):
        each.close()
    assert devices[1].mapping.hva  # unplugged: it is closed by itself; the others go with the room
    room.close()


def test_the_room_is_what_ram_and_bars_leave(tmp_path: Path, memory: GuestMemory, room: DeviceMemory) -> None:
    huge = PmemDevice(PmemConfig(tmp_path, layout.DEVICE_MEMORY_END - layout.RAM_64BIT_START), memory, "huge")
    huge.plug(room)
    assert huge.start == layout.RAM_64BIT_START
    more = PmemDevice(PmemConfig(tmp_path, 2 * MIB), memory, "more")
    with pytest.raises(ConfigError, match="there is no room for it above RAM"):
        more.plug(room)
    more.close()
    huge.close()
