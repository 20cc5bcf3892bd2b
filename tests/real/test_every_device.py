"""Every kind of device but one, driven by one mock driver: requests of any bytes, in chains of any shape, on any queue.

Whatever comes: the device stops when it is asked to, memory outside the chains that it was given and its used rings is
as it was, and after a reset it works for a driver that behaves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm._native import ffi
from trivmm.config import ConsoleConfig, DiskConfig, RngConfig
from trivmm.memory.guest import GuestMemory
from trivmm.platform.sinks import NullSink
from trivmm.testing.driver import DeviceDriver
from trivmm.testing.tape import Tape
from trivmm.virtio.block.device import BlockDevice
from trivmm.virtio.console.device import ConsoleDevice
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.device import NetDevice
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.virtio.pmem.device import PmemDevice
from trivmm.virtio.rng.device import RngDevice
from trivmm.virtio.vsock.config import VsockConfig
from trivmm.virtio.vsock.device import VsockDevice
from trivmm.virtio.watchdog.device import WatchdogDevice

LIMIT_S = 60
RAM = 2 << 20
SETTLE_S = 0.003  # what a device does with a chain takes microseconds; what it does later is looked at all the same

Make = Callable[[GuestMemory, Path], WorkerDevice]


def disk(memory: GuestMemory, folder: Path) -> WorkerDevice:
    (folder / "disk.img").write_bytes(bytes(range(256)) * 256)
    return BlockDevice(DiskConfig(str(folder / "disk.img")), memory, "_disk0")


def pmem(memory: GuestMemory, folder: Path) -> WorkerDevice:
    (folder / "pmem").write_bytes(bytes(2 << 20))
    return PmemDevice(PmemConfig(str(folder / "pmem")), memory, "_pmem0")


KINDS: dict[str, Make] = {  # but the balloon, which may empty any page: see test_virtio_balloon.py
    "rng": lambda memory, folder: RngDevice(RngConfig("/dev/zero"), memory),
    "disk": disk,
    "console": lambda memory, folder: ConsoleDevice(ConsoleConfig("Null"), memory, NullSink()),
    "net": lambda memory, folder: NetDevice(NetConfig(link=f"listen:{folder}/net"), memory, "_net0"),
    "vsock": lambda memory, folder: VsockDevice(VsockConfig(3, str(folder / "vsock")), memory),
    "pmem": pmem,
    "watchdog": lambda memory, folder: WatchdogDevice(memory),
}
# what a driver that behaves asks of it: (readable, writable, queue)
GOOD: dict[str, tuple[bytes, tuple[int, ...], int]] = {
    "rng": (b"", (8,), 0),
    "disk": (struct.pack("<IIQ", 0, 0, 1), (512, 1), 0),
    "console": (b"hello", (), 1),
    "net": (bytes(12 + 64), (), 1),
    "vsock": (struct.pack("<QQIIIHHIII", 3, 2, 1, 52, 0, 1, 3, 0, 0, 0), (), 1),
    "pmem": (bytes(4), (4,), 0),
    "watchdog": (b"", (1,), 0),
}
HEADERS = (
    struct.pack("<IIQ", 0, 0, 1),  # a disk's read
    struct.pack("<IIQ", 1, 0, (1 << 64) - 1),  # a write, far out
    struct.pack("<IIQ", 11, 0, 0) + struct.pack("<QII", 1 << 63, 0xFFFF_FFFF, 1),  # discard
    struct.pack("<BBHHHH", 1, 1, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF) + bytes(2),  # a frame whose header lies
    struct.pack("<QQIIIHHIII", 3, 2, 1, 52, 0xFFFF_FFFF, 1, 5, 0, 0, 0),  # a packet without its bytes
    struct.pack("<BB", 1, 0) + b"\0\0\0\0\0\1",  # control: a MAC
    b"",
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, RAM)])
    yield made
    made.close()


class Hostile:
    """One driver, what its device may write, and what memory is to be otherwise."""

    def __init__(self, driver: DeviceDriver, tape: Tape) -> None:
        self.driver, self.tape = driver, tape
        self.memory = driver.device.memory
        self.allowed = [(queue.used_gpa, 6 + 8 * queue.size) for queue in driver.queues]
        self.expected = bytearray(RAM)
        self._write = self.memory.write
        self.memory.write = self.write  # type: ignore[method-assign]

    def write(self, gpa: int, data: bytes) -> None:
        self.expected[gpa : gpa + len(data)] = data
        self._write(gpa, data)

    def check(self) -> None:
        (region,) = self.memory.regions
        found = bytearray(ffi.buffer(region.mapping, region.size))
        for gpa, length in self.allowed:
            found[gpa : gpa + length] = self.expected[gpa : gpa + length]
        assert found == self.expected, "it wrote where no chain was"

    def offer(self) -> None:
        tape = self.tape
        at = tape.below(len(self.driver.queues))
        readable = [
            tape.of(HEADERS)[: tape.mostly(64, range(40))] + bytes(tape.below(40)) for _ in range(tape.below(4))
        ]
        writable = [tape.of((1, 16, 64, 512, 1526, 4096, 0)) for _ in range(tape.below(4))]
        places = self.driver.offer(*readable, writable=writable, queue=at, first=tape.below(2))
        self.allowed += zip(places, writable, strict=True)

    def scribble(self) -> None:
        queue = self.driver.queues[self.tape.below(len(self.driver.queues))]
        match self.tape.below(4):
            case 0:
                queue.set_avail_index(self.tape.below(0x10000))
            case 1:
                queue.offer(self.tape.below(0x10000))
            case 2:
                queue.set_used_event(self.tape.below(0x10000))
            case _:
                at = queue.base + 16 * self.tape.below(queue.size)
                gpa, length = struct.unpack("<QI", queue.memory.read(at, 12))
                self.allowed.append((gpa, length))  # it may be writable now
                queue.memory.write(at + 12, bytes([self.tape.below(4), 0]))
        queue.ring()


async def misuse(name: str, memory: GuestMemory, folder: Path, choices: bytes) -> None:
    tape = Tape(choices)
    device = KINDS[name](memory, folder)
    driver = DeviceDriver.of(device, event_idx=bool(tape.below(2)))
    hostile = Hostile(driver, tape)
    try:
        with trio.fail_after(LIMIT_S):
            async with driver.active():
                for _ in range(8):
                    hostile.scribble() if tape.below(6) == 0 else hostile.offer()
                await trio.sleep(SETTLE_S)
        hostile.check()
    finally:
        driver.close()
        del memory.write
    device.reset()
    again = DeviceDriver.of(device)
    readable, writable, queue = GOOD[name]
    try:
        with trio.fail_after(LIMIT_S):
            async with again.active():
                await again.request(*([readable] if readable else []), writable=writable, queue=queue)
    finally:
        again.close()
        device.close()


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.binary(min_size=80, max_size=200))
def test_any_bytes_on_any_queue(memory: GuestMemory, tmp_path: Path, name: str, choices: bytes) -> None:
    ffi.buffer(memory.regions[0].mapping, RAM)[:] = bytes(RAM)
    for path in tmp_path.iterdir():
        path.unlink()
    trio.run(misuse, name, memory, tmp_path, choices)


# --- the mock driver as it is meant -------------------------------------------------------------------------------


async def use(make: Make, memory: GuestMemory, folder: Path, wanted: Callable[[DeviceDriver], Any]) -> Any:
    device = make(memory, folder)
    driver = DeviceDriver.of(device, event_idx=True)
    try:
        with trio.fail_after(LIMIT_S):
            async with driver.active():
                return await wanted(driver)
    finally:
        driver.close()
        device.close()


async def test_a_request_is_one_call(memory: GuestMemory, tmp_path: Path) -> None:
    async def two_sectors(driver: DeviceDriver) -> list[bytes]:
        first = await driver.request(struct.pack("<IIQ", 0, 0, 1), writable=(512, 1))
        second = await driver.request(struct.pack("<IIQ", 0, 0, 1 << 40), writable=(512, 1))
        return [*first, second[1]]

    assert await use(disk, memory, tmp_path, two_sectors) == [bytes(range(256)) * 2, b"\0", b"\1"]
    assert await use(KINDS["rng"], memory, tmp_path, lambda driver: driver.request(writable=(8, 8))) == [bytes(8)] * 2
