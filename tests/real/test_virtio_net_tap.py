"""virtio-net over a tap of the host's, where one may be made; its other end is a packet socket."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import NO_VECTOR, QueueState
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, until
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.device import NetDevice
from trivmm.virtio.net.tap import (
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFREQ,
    TUN,
    TUNGETIFF,
    TUNSETIFF,
    open_taps,
    why_no_tap,
)
from trivmm.virtio.setup import DriverSetup

NO_TAP = why_no_tap()
LIMIT_S = 30
VERSION_1 = 1 << 32
ETH_P_ALL = 3
IFF_DETACH_QUEUE = 0x400
IFF_TUN = 1
NAME = f"tvt{os.getpid() % 100000}"
FRAME = bytes.fromhex("ffffffffffff52540000000a88b5") + b"x" * 100

pytestmark = pytest.mark.skipif(NO_TAP is not None, reason=f"no tap can be made here ({NO_TAP}): run as root")


@asynccontextmanager
async def running(
    config: NetConfig, features: int, *, pairs: int = 1
) -> AsyncIterator[tuple[NetDevice, GuestMemory, list[MockDriver]]]:
    """With a driver for each queue: receive, transmit, …, commands."""
    memory = GuestMemory([(0, 16 << 20)])
    drivers = [MockDriver(memory, base=0x10000 * (1 + index)) for index in range(2 * pairs + 1)]
    device = NetDevice(config, memory, "_net0")
    setup = DriverSetup(features | VERSION_1, tuple(driver.queue() for driver in drivers))
    try:
        with trio.fail_after(LIMIT_S):
            async with activated(device, setup, [driver.handle for driver in drivers]):
                yield device, memory, drivers
    finally:
        device.close()
        for driver in drivers:
            driver.close()
        memory.close()


def say(memory: GuestMemory, driver: MockDriver, data: bytes, number: int = 0) -> None:
    at = 0x400000 + 0x20000 * number
    memory.write(at, data)
    driver.offer(driver.chain(Descriptor(at, len(data)), first=number))
    driver.ring()


@pytest.fixture
def wire() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        sock.settimeout(LIMIT_S)
        yield sock


def heard(wire: socket.socket, start: bytes) -> bytes:
    """The next frame that begins so: the host says things of its own there."""
    while True:
        data = wire.recv(1 << 17)
        if data.startswith(start):
            return data


async def test_frames_both_ways_and_the_tap_is_gone_afterwards(wire: socket.socket) -> None:
    config = NetConfig(tap=NAME, ip="10.213.7.1", mask="255.255.255.0", mtu=1400, host_mac="52:54:00:00:00:99")
    async with running(config, 0) as (_device, memory, (receive, transmit, _)):
        wire.bind((NAME, 0))
        assert Path(f"/sys/class/net/{NAME}/mtu").read_text() == "1400\n"
        assert Path(f"/sys/class/net/{NAME}/address").read_text() == "52:54:00:00:00:99\n"
        say(memory, transmit, bytes(12) + FRAME)
        assert await trio.to_thread.run_sync(heard, wire, FRAME[:14]) == FRAME
        for number in range(8):
            receive.offer(receive.chain(Descriptor(0x100000 + 4096 * number, 4096, WRITE), first=number))
        receive.ring()
        wire.send(FRAME[::-1])
        await until(lambda: any(memory.read(0x10000C + 4096 * n, len(FRAME)) == FRAME[::-1] for n in range(8)))
    assert not Path(f"/sys/class/net/{NAME}").exists()


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ((1, 0, 0, 0, 34, 16, 0), "a checksum inside the frame"),
        ((1, 1, 54, 1000, 34, 16, 0), "segmentation"),
    ],
)
async def test_offloads_reach_the_kernel(wire: socket.socket, header: tuple[int, ...], what: str) -> None:
    features = lib.TV_NET_F_CSUM | lib.TV_NET_F_HOST_TSO4
    tcp = bytes.fromhex("45000bb800004000400600000a0000010a000002") + struct.pack(
        ">HHIIBBHHH", 1, 2, 3, 4, 0x50, 16, 9, 0, 0
    )
    data = bytes.fromhex("ffffffffffff52540000000a0800") + tcp + bytes(2960)
    async with running(NetConfig(tap=NAME), features) as (device, memory, (_, transmit, _)):
        wire.bind((NAME, 0))
        say(memory, transmit, struct.pack("<BBHHHHH", *header) + data)
        await trio.to_thread.run_sync(heard, wire, data[:14])
        await until(lambda: device.counters()["tx_frames"] == 1)
        assert device.counters()["tx_malformed"] == device.counters()["tx_lost"] == 0


LIES = [
    (1, 0, 0, 0, 0xFFFF, 16, 0),  # a checksum behind the frame
    (1, 0, 0, 0, 34, 0xFFFF, 0),
    (1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),  # whose sum wraps
    (1, 0, 0, 0, 113, 0, 0),  # half of it
    (1, 0, 0, 0, 0, 0, 0),  # in the Ethernet header
    (0, 1, 54, 1000, 34, 16, 0),  # segmentation without a checksum
    (1, 1, 54, 0, 34, 16, 0),  # into pieces of nothing
    (1, 1, 0xFFFF, 1000, 34, 16, 0),  # headers behind the frame
    (1, 4, 54, 1000, 34, 16, 0),  # not negotiated: TCP over IPv6
    (1, 3, 54, 1000, 34, 16, 0),  # nor UDP
    (1, 0x81, 54, 1000, 34, 16, 0),  # nor ECN
    (1, 2, 54, 1000, 34, 16, 0),  # what nobody knows
    (1, 0x7F, 54, 1000, 34, 16, 0),
]


async def test_headers_that_lie_never_reach_the_tap(wire: socket.socket) -> None:
    features = lib.TV_NET_F_CSUM | lib.TV_NET_F_HOST_TSO4
    async with running(NetConfig(tap=NAME), features) as (device, memory, (_, transmit, _)):
        wire.bind((NAME, 0))
        for count, header in enumerate(LIES, 1):
            say(memory, transmit, struct.pack("<BBHHHHH", *header) + FRAME, count % 8)
            await until(lambda: device.counters()["tx_malformed"] == count)  # noqa: B023 - it has ended by the next
        say(memory, transmit, bytes(12) + FRAME)
        assert await trio.to_thread.run_sync(heard, wire, FRAME[:14]) == FRAME
        await until(lambda: device.counters()["tx_frames"] == 1)


def detached(fd: int) -> bool:
    flags: int = struct.unpack_from("<H", fcntl.ioctl(fd, TUNGETIFF, bytes(IFREQ.size)), 16)[0]
    return bool(flags & IFF_DETACH_QUEUE)


async def test_pairs_are_attached_as_the_driver_asks(wire: socket.socket) -> None:
    features = lib.TV_NET_F_MQ | lib.TV_NET_F_CTRL_VQ
    async with running(NetConfig(tap=NAME, num_queues=4), features, pairs=2) as (device, memory, drivers):
        assert device.read_config(6, 4) == b"\1\0\2\0"
        transmits, commands = (drivers[1], drivers[3]), drivers[4]
        wire.bind((NAME, 0))

        async def set_pairs(count: int, number: int) -> int:
            at = 0x300000 + 64 * number
            memory.write(at, struct.pack("<BBHB", 4, 0, count, 0xEE))
            commands.offer(commands.chain(Descriptor(at, 4), Descriptor(at + 4, 1, WRITE), first=2 * number))
            commands.ring()
            await until(lambda: memory.read(at + 4, 1) != b"\xee")
            return memory.read(at + 4, 1)[0]

        assert [await set_pairs(count, number) for number, count in enumerate((0, 3))] == [1, 1]
        assert [detached(native.fd) for native in device.links.natives] == [False, True]  # what nobody reads gets none
        assert await set_pairs(2, 2) == 0
        assert [detached(native.fd) for native in device.links.natives] == [False, False]
        for number, transmit in enumerate(transmits):
            say(memory, transmit, bytes(12) + FRAME, 2 + number)
            assert await trio.to_thread.run_sync(heard, wire, FRAME[:14]) == FRAME
        await until(lambda: device.counters()["tx_frames"] == 2)


async def test_without_multiqueue_the_third_queue_has_the_commands(wire: socket.socket) -> None:
    """Of a device that offers it, to a driver that does not take it (virtio 1.2 section 5.1.2)."""
    features = lib.TV_NET_F_CTRL_VQ | lib.TV_NET_F_CTRL_MAC_ADDR
    config = NetConfig(tap=NAME, num_queues=4)
    memory = GuestMemory([(0, 16 << 20)])
    drivers = [MockDriver(memory, base=0x10000 * (1 + index)) for index in range(3)]
    unused = QueueState(8, NO_VECTOR, False, 0, 0, 0, 0, 0)
    device = NetDevice(config, memory, "_net0")
    setup = DriverSetup(features | VERSION_1, (*(driver.queue() for driver in drivers), unused, unused))
    handles = [driver.handle for driver in (*drivers, *drivers[:2])]
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as workers:
            await device.activate(setup, handles, workers)
            memory.write(0x300000, bytes((1, 1, 2, 0, 0, 0, 0, 7, 0xEE)))
            drivers[2].offer(drivers[2].chain(Descriptor(0x300000, 8), Descriptor(0x300008, 1, WRITE)))
            drivers[2].ring()
            await until(lambda: device.read_config(0, 6) == bytes((2, 0, 0, 0, 0, 7)))
            await device.stop()
    device.close()
    for driver in drivers:
        driver.close()
    memory.close()


def test_a_tap_is_taken_by_descriptor_and_stays_its_owners(tmp_path: Path) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    (fd,) = open_taps(NetConfig(tap=NAME))
    NetDevice(NetConfig(fds=(fd,)), memory, "_net0").close()
    os.fstat(fd)
    with pytest.raises(ConfigError, match=rf'net\.tap = "{NAME}": cannot open it'):
        NetDevice(NetConfig(tap=NAME), memory, "_net0")  # it is busy
    os.close(fd)
    with open(tmp_path / "no tap", "wb") as file, pytest.raises(ConfigError, match=r"net\.fds = \d+: not a tap"):
        NetDevice(NetConfig(fds=(file.fileno(),)), memory, "_net0")
    for flags in (IFF_TAP, IFF_TAP | IFF_NO_PI, IFF_TUN | IFF_NO_PI | IFF_VNET_HDR):  # some kernels tell no PI always
        bare = os.open(TUN, os.O_RDWR)
        fcntl.ioctl(bare, TUNSETIFF, IFREQ.pack(NAME.encode(), struct.pack("<H", flags)))
        with pytest.raises(ConfigError, match="not a tap with virtio-net headers and nothing before them"):
            NetDevice(NetConfig(fds=(bare,)), memory, "_net0")
        os.close(bare)
    with pytest.raises(ConfigError, match=r"net\.fds = \d+: not an open descriptor"):
        NetDevice(NetConfig(fds=(bare,)), memory, "_net0")
    with pytest.raises(ConfigError, match=r'net\.tap = "lo": cannot open it'):
        NetDevice(NetConfig(tap="lo"), memory, "_net0")
    memory.close()


def test_without_permission_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("trivmm.virtio.net.tap.fcntl.ioctl", refuse)
    with pytest.raises(ConfigError) as caught:
        open_taps(NetConfig(tap="t0"))
    assert str(caught.value) == (
        'net.tap = "t0": cannot open it (Operation not permitted); '
        "make it for this user (ip tuntap add t0 mode tap user USER), or give link=passt"
    )
    with pytest.raises(ConfigError, match=r'net\.tap = "": cannot open it'):
        open_taps(NetConfig())


def test_links_are_nonblocking() -> None:
    """A worker that waited in a read could not be stopped."""
    memory = GuestMemory([(0, 1 << 20)])
    device = NetDevice(NetConfig(tap=NAME), memory, "_net0")
    assert not os.get_blocking(device.links.natives[0].fd)
    assert device.links.natives[0] != ffi.NULL
    device.close()
    memory.close()
