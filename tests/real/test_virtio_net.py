"""virtio-net with its real worker threads, real sockets, and mock drivers as the guests."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import QueueState
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, until
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.device import NetDevice
from trivmm.virtio.setup import DriverSetup

LIMIT_S = 30
VERSION_1, EVENT_IDX, MERGEABLE = 1 << 32, 1 << 29, 1 << 15
CTRL_VQ, CTRL_MAC, OFFLOADS, ANNOUNCE, MQ = 1 << 17, 1 << 23, 1 << 2, 1 << 21, 1 << 22
STREAM_ROOM = 1 << 22
MAC_A, MAC_B = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
NO_HEADER = bytes(12)


def frame(length: int, seed: int = 1) -> bytes:
    """So many bytes that no other frame has, from an Ethernet header on."""
    head = bytes.fromhex("52540000000b52540000000a88b5")
    body = (seed * 2654435761 % (1 << 32)).to_bytes(4, "big") * (length // 4 + 1)
    return (head + body)[:length]


class Guest:
    """Memory, and a driver for receive, transmit and commands. Buffers of 2 KiB, or of ``room`` bytes."""

    def __init__(self, *, room: int = 2048, event_idx: bool = False, size: int = 64) -> None:
        self.memory = GuestMemory([(0, 32 << 20)])
        self.room = room
        self.receive = MockDriver(self.memory, size=size, event_idx=event_idx)
        self.transmit = MockDriver(self.memory, size=size, base=0x20000, event_idx=event_idx)
        self.control = MockDriver(self.memory, size=8, base=0x40000, event_idx=event_idx)

    @property
    def drivers(self) -> list[MockDriver]:
        return [self.receive, self.transmit, self.control]

    def setup(self, features: int, queues: tuple[QueueState, ...] = ()) -> DriverSetup:
        return DriverSetup(features | VERSION_1, queues or tuple(driver.queue() for driver in self.drivers))

    @property
    def handles(self) -> list[QueueHandle]:
        return [driver.handle for driver in self.drivers]

    def offer(self, count: int = 1, *, first: int = 0) -> None:
        """Buffers to receive into, numbered from ``first``."""
        for number in range(first, first + count):
            at = 0x100000 + self.room * number
            self.receive.offer(self.receive.chain(Descriptor(at, self.room, WRITE), first=number))
        self.receive.ring()

    def say(self, data: bytes, *, header: bytes = NO_HEADER, first: int = 0) -> None:
        at = 0x800000 + (1 << 17) * first
        self.memory.write(at, header + data)
        self.transmit.offer(self.transmit.chain(Descriptor(at, len(header) + len(data)), first=first))
        self.transmit.ring()

    async def used(self, driver: MockDriver) -> tuple[int, int]:
        driver.set_used_event(driver.seen)
        while driver.seen == driver.used_index:
            await trio.lowlevel.wait_readable(driver.call)
            driver.interrupts()
        entry = self.memory.read(driver.used_gpa + 4 + 8 * (driver.seen % driver.size), 8)
        driver.seen = (driver.seen + 1) & 0xFFFF
        head, length = struct.unpack("<II", entry)
        return head, length

    async def heard(self) -> tuple[bytes, bytes]:
        """(header, frame) of the next one, out of as many buffers as it takes."""
        head, length = await self.used(self.receive)
        data = self.memory.read(0x100000 + self.room * head, length)
        header, data = data[:12], data[12:]
        for _ in range(struct.unpack_from("<H", header, 10)[0] - 1):
            head, length = await self.used(self.receive)
            data += self.memory.read(0x100000 + self.room * head, length)
        return header, data

    async def said(self) -> None:
        await self.used(self.transmit)

    async def command(self, kind: int, command: int, data: bytes) -> int:
        """The device's answer."""
        at = 0x60000
        self.memory.write(at, bytes((kind, command)) + data + b"\xee")
        length = 2 + len(data)
        parts = Descriptor(at, length), Descriptor(at + length, 1, WRITE)
        self.control.offer(self.control.chain(*parts))
        self.control.ring()
        await self.used(self.control)
        return self.memory.read(at + length, 1)[0]

    def close(self) -> None:
        for driver in self.drivers:
            driver.close()
        self.memory.close()


@asynccontextmanager
async def running(
    config: NetConfig, guest: Guest, features: int = 0, *, queues: tuple[QueueState, ...] = ()
) -> AsyncIterator[NetDevice]:
    device = NetDevice(config, guest.memory, "_net0")
    try:
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as workers:
                await device.activate(guest.setup(features, queues), guest.handles, workers)
                try:
                    yield device
                finally:
                    with trio.CancelScope(shield=True):
                        await device.stop()
    finally:
        device.close()
        guest.close()


def counted(device: NetDevice, *names: str) -> tuple[int, ...]:
    return tuple(device.counters()[name] for name in names)


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(8)
    sock.setblocking(False)
    return sock


async def accepted(sock: socket.socket) -> socket.socket:
    await trio.lowlevel.wait_readable(sock)
    peer, _ = sock.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_ROOM)
    peer.setblocking(True)
    return peer


def spoken(data: bytes) -> bytes:
    """A frame as it is on a stream."""
    return struct.pack(">I", len(data)) + data


async def read_frame(peer: socket.socket) -> bytes:
    """The next one that the device sent."""

    def read(count: int) -> bytes:
        return peer.recv(count, socket.MSG_WAITALL)

    head = await trio.to_thread.run_sync(read, 4)
    return await trio.to_thread.run_sync(read, int.from_bytes(head, "big"))


# --- two guests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("kind", ["stream", "datagram"])
async def test_two_guests_exchange_frames(tmp_path: Path, kind: str, event_idx: bool) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    links = {
        "stream": ({"link": f"listen:{one}"}, {"link": f"connect:{one}"}),
        "datagram": ({"link": f"dgram:{one}", "peer": other}, {"link": f"dgram:{other}", "peer": one}),
    }[kind]
    features = MERGEABLE | (EVENT_IDX if event_idx else 0)
    a, b = Guest(event_idx=event_idx), Guest(event_idx=event_idx)
    async with (
        running(NetConfig(**links[0]), a, features) as here,
        running(NetConfig(**links[1]), b, features) as there,
    ):
        if kind == "stream":
            await until(lambda: counted(here, "link_connections") == (1,))
        a.offer(16)
        b.offer(16)
        for number in range(16):
            a.say(frame(60 + number, number), first=number)
        for number in range(16):
            header, data = await b.heard()
            assert data == frame(60 + number, number)
            assert header == bytes(10) + b"\1\0"  # nothing to be done with it, in one buffer
            b.say(data[::-1], first=number)
            _, data = await a.heard()
            assert data == frame(60 + number, number)[::-1]
            await b.said()
        assert counted(here, "tx_frames", "rx_frames", "tx_lost", "tx_malformed", "rx_malformed") == (16, 16, 0, 0, 0)
        assert counted(here, "tx_bytes") == counted(there, "rx_bytes") == (sum(range(60, 76)),)
    assert not list(tmp_path.iterdir())  # sockets and locks are gone
