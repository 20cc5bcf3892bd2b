"""virtio-net with its real worker threads, real sockets, and mock drivers as the guests."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm.errors import ConfigError, NotSupported, ProtocolError
from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import QueueState
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, until
from trivmm.testing.states import sent
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.net import link, tap
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.device import NetDevice, NetState
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

    async def heard(self) -> tuple[bytes, bytes]:
        """(header, frame) of the next one, out of as many buffers as it takes."""
        head, length = await self.receive.next_used()
        data = self.memory.read(0x100000 + self.room * head, length)
        header, data = data[:12], data[12:]
        for _ in range(struct.unpack_from("<H", header, 10)[0] - 1):
            head, length = await self.receive.next_used()
            data += self.memory.read(0x100000 + self.room * head, length)
        return header, data

    async def said(self) -> None:
        await self.transmit.next_used()

    async def command(self, kind: int, command: int, data: bytes) -> int:
        """The device's answer."""
        at = 0x60000
        self.memory.write(at, bytes((kind, command)) + data + b"\xee")
        length = 2 + len(data)
        parts = Descriptor(at, length), Descriptor(at + length, 1, WRITE)
        self.control.offer(self.control.chain(*parts))
        self.control.ring()
        await self.control.next_used()
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
            async with activated(device, guest.setup(features, queues), guest.handles):
                yield device
    finally:
        device.close()
        guest.close()


async def rests() -> bool:
    """No thread of this process spins: for a while, it is not all on the CPU."""
    wall, busy = time.monotonic(), time.process_time()
    await trio.sleep(0.3)
    return time.process_time() - busy < (time.monotonic() - wall) / 2


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


# --- lies of a guest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 13, 65551])
async def test_what_is_no_frame_is_counted_and_not_sent(tmp_path: Path, length: int) -> None:
    guest = Guest(size=256)
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            with await accepted(sock) as peer:
                guest.say(frame(length))
                await guest.said()
                guest.say(frame(60), first=1)
                await guest.said()
                assert await read_frame(peer) == frame(60)
                assert counted(device, "tx_malformed", "tx_frames") == (1, 1)


async def test_chains_without_even_a_header(tmp_path: Path) -> None:
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            with await accepted(sock):
                for length in (1, 11):
                    guest.say(b"", header=bytes(length))
                    await guest.said()
                assert counted(device, "tx_malformed") == (2,)


async def test_the_longest_frame_crosses_in_small_buffers(tmp_path: Path) -> None:
    one = f"{tmp_path}/one"
    a, b = Guest(), Guest(size=256)
    async with (
        running(NetConfig(link=f"listen:{one}"), a) as here,
        running(NetConfig(link=f"connect:{one}"), b, MERGEABLE),
    ):
        await until(lambda: counted(here, "link_connections") == (1,))
        b.offer(33)
        a.say(frame(65550))
        header, data = await b.heard()
        assert header[10:] == b"\x21\0"  # 12 + 65550 bytes, 2 KiB each
        assert data == frame(65550)


async def test_a_driver_without_mergeable_buffers_loses_what_is_too_long(tmp_path: Path) -> None:
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            with await accepted(sock) as peer:
                guest.offer(2)
                peer.sendall(spoken(frame(2037)) + spoken(frame(2036)))
                assert await guest.heard() == (bytes(10) + b"\1\0", frame(2036))
                assert counted(device, "rx_long", "rx_frames") == (1, 1)


async def test_buffers_that_can_never_hold_a_frame_cost_that_frame(tmp_path: Path) -> None:
    """All that a queue can offer at once is too little: waiting for more would be for ever."""
    guest = Guest(room=64, size=8)
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest, MERGEABLE) as device:
            with await accepted(sock) as peer:
                guest.offer(8)
                peer.sendall(spoken(frame(8 * 64 - 11)) + spoken(frame(8 * 64 - 12)))
                assert (await guest.heard())[1] == frame(8 * 64 - 12)
                assert counted(device, "rx_long") == (1,)


async def test_buffers_that_do_not_suffice_yet_are_not_looked_at_again_and_again(tmp_path: Path) -> None:
    """The driver is asked to ring for the one behind them, which is the first that helps."""
    guest = Guest(room=64, size=8, event_idx=True)
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest, MERGEABLE | EVENT_IDX):
            with await accepted(sock) as peer:
                guest.offer(3)
                peer.sendall(spoken(frame(4 * 64 - 12)))
                await until(lambda: guest.receive.avail_event == 3)
                guest.offer(first=3)
                header, data = await guest.heard()
                assert (header[10:], data) == (b"\4\0", frame(4 * 64 - 12))


async def test_a_buffer_without_room_for_a_header_breaks_the_queue(tmp_path: Path) -> None:
    guest = Guest(room=12)
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            told: list[str] = []
            device.on_broken = told.append
            with await accepted(sock) as peer:
                guest.offer(1)
                peer.sendall(spoken(frame(60)))
                await until(lambda: bool(told))
                assert told == ["queue 0: request without room for its answer"]
                peer.sendall(spoken(frame(61)))
                assert await rests()


# --- lies of a peer ------------------------------------------------------------------------------------------------


async def test_a_peer_that_floods_waits_for_the_guest_and_loses_nothing(tmp_path: Path) -> None:
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            with await accepted(sock) as peer:
                flood = b"".join(spoken(frame(60 + number % 64, number)) for number in range(20000))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.to_thread.run_sync, peer.sendall, flood)
                    for number in range(20000):
                        guest.offer(first=number % 64)
                        assert (await guest.heard())[1] == frame(60 + number % 64, number)
                        if number == 100:  # the other direction goes on meanwhile
                            guest.say(frame(99))
                            await guest.said()
                assert await read_frame(peer) == frame(99)
                assert counted(device, "rx_frames", "rx_long", "rx_malformed") == (20000, 0, 0)


@pytest.mark.parametrize("length", [0, 1, 13])
async def test_a_peer_that_sends_no_frames(tmp_path: Path, length: int) -> None:
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            with await accepted(sock) as peer:
                guest.offer(1)
                peer.sendall(spoken(frame(length)) + spoken(frame(77)))
                assert (await guest.heard())[1] == frame(77)
                assert counted(device, "rx_malformed", "link_violations") == (1, 0)


@pytest.mark.parametrize("said", [65551, 1 << 31, (1 << 32) - 1])
async def test_a_peer_whose_frame_can_not_be_is_hung_up_on_and_may_come_again(tmp_path: Path, said: int) -> None:
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            guest.offer(1)
            with await accepted(sock) as peer:
                peer.sendall(struct.pack(">I", said) + b"x" * 1000)
                await trio.lowlevel.wait_readable(peer)
                assert peer.recv(1) == b""
            with await accepted(sock) as peer:
                peer.sendall(spoken(frame(77)))
                assert (await guest.heard())[1] == frame(77)
            assert counted(device, "link_violations", "link_connections") == (1, 2)


async def test_half_a_frame_and_a_peer_that_goes(tmp_path: Path) -> None:
    """What the next one says begins anew."""
    guest = Guest()
    with listening(tmp_path / "s") as sock:
        async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
            guest.offer(2)
            with await accepted(sock) as peer:
                for byte in spoken(frame(66)):
                    peer.send(bytes((byte,)))
                assert (await guest.heard())[1] == frame(66)
                peer.sendall(spoken(frame(77))[:-1])
            with await accepted(sock) as peer:
                peer.sendall(spoken(frame(88)))
                assert (await guest.heard())[1] == frame(88)
            assert counted(device, "rx_frames", "rx_malformed") == (2, 0)


@pytest.mark.parametrize("kind", ["stream", "datagram"])
async def test_a_peer_that_never_reads_costs_frames_and_never_the_queue(tmp_path: Path, kind: str) -> None:
    guest = Guest(size=64)
    link = NetConfig(link=f"connect:{tmp_path}/s")
    if kind == "datagram":
        link = NetConfig(link=f"dgram:{tmp_path}/me", peer=f"{tmp_path}/s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM) as deaf:
        deaf.bind(f"{tmp_path}/s")
        if kind == "stream":
            deaf.listen(1)  # its queue is all that connects
        async with running(link, guest) as device:
            sent = 0
            while counted(device, "tx_lost") < (100,):
                guest.say(frame(60000, sent), first=sent % 32)
                await guest.said()
                sent += 1
            assert sent < 10000
            assert counted(device, "tx_frames", "tx_lost") == (sent - 100, 100)
            if kind == "stream":
                deaf.accept()[0].close()
                deaf.close()
            guest.say(frame(60))
            await guest.said()
            assert await rests()


async def test_without_a_peer_frames_are_lost_and_the_next_peer_is_found(tmp_path: Path) -> None:
    guest = Guest()
    async with running(NetConfig(link=f"connect:{tmp_path}/s"), guest) as device:
        for number in range(3):
            guest.say(frame(60), first=number)
            await guest.said()
        assert counted(device, "tx_lost", "tx_frames") == (3, 0)
        with listening(tmp_path / "s") as sock, await accepted(sock) as peer:
            await until(lambda: counted(device, "link_connections") == (1,))
            guest.say(frame(70))
            await guest.said()
            assert await read_frame(peer) == frame(70)


async def test_the_newest_peer_counts(tmp_path: Path) -> None:
    """As when the other end has moved: its old connection may still be there."""
    guest = Guest()
    async with running(NetConfig(link=f"listen:{tmp_path}/s"), guest) as device:
        guest.offer(1)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.connect(f"{tmp_path}/s")
            await until(lambda: counted(device, "link_connections") == (1,))
            second.connect(f"{tmp_path}/s")
            await until(lambda: counted(device, "link_connections") == (2,))
            guest.say(frame(70))
            await guest.said()
            assert await read_frame(second) == frame(70)
            assert first.recv(1) == b""
            second.sendall(spoken(frame(71)))
            assert (await guest.heard())[1] == frame(71)


# --- commands ------------------------------------------------------------------------------------------------------


async def test_commands(tmp_path: Path) -> None:
    guest, mac = Guest(), bytes.fromhex("525400aabbcc")
    async with running(
        NetConfig(link=f"listen:{tmp_path}/s", mac=MAC_A), guest, CTRL_VQ | CTRL_MAC | ANNOUNCE
    ) as device:
        assert device.read_config(0, 12) == bytes.fromhex("52540000000a") + b"\1\0" + b"\1\0" + b"\0\0"
        assert await guest.command(1, 1, mac) == 0
        assert device.read_config(0, 6) == mac
        for kind, command, data in [(1, 1, mac[:5]), (1, 0, b""), (0, 0, b"\1"), (4, 0, b"\1\0"), (5, 0, bytes(8))]:
            assert await guest.command(kind, command, data) == 1  # not negotiated, or not whole, or not there
        assert counted(device, "commands", "refused") == (6, 5)
        await device.stop()
        device.reset()
        assert device.read_config(0, 6) == bytes.fromhex("52540000000a")


async def test_a_command_without_room_for_its_answer_breaks_the_queue(tmp_path: Path) -> None:
    guest = Guest()
    async with running(NetConfig(link=f"listen:{tmp_path}/s"), guest, CTRL_VQ) as device:
        told: list[str] = []
        device.on_broken = told.append
        guest.control.offer(guest.control.chain(Descriptor(0x60000, 2)))
        guest.control.ring()
        await until(lambda: bool(told))
        assert told == ["queue 2: request without room for its answer"]


# --- moves ---------------------------------------------------------------------------------------------------------


async def test_a_moved_device_goes_on_and_announces_where_it_is(tmp_path: Path) -> None:
    guest = Guest()
    config = NetConfig(link=f"connect:{tmp_path}/s", mac=MAC_A)
    features = CTRL_VQ | CTRL_MAC | ANNOUNCE
    mac = bytes.fromhex("525400aabbcc")
    with listening(tmp_path / "s") as sock:
        async with running(config, guest, features) as source:
            with await accepted(sock):
                assert await guest.command(1, 1, mac) == 0
                await source.stop()
                queues, state = source.queues, sent(source.save())
                destination = NetDevice(config, guest.memory, "_net0", incoming=True)
                destination.load(state)
                source.links.release_lock()
                destination.links.take_lock()
                changed: list[bool] = []
                destination.on_config_change = lambda: changed.append(True)
                async with trio.open_nursery() as workers:
                    await destination.activate(guest.setup(features, queues), guest.handles, workers)
                    with await accepted(sock) as peer:
                        rarp = await read_frame(peer)
                        assert rarp[:16] == b"\xff" * 6 + mac + b"\x80\x35\0\1"
                        assert rarp[20:28] == b"\0\3" + mac
                        assert len(rarp) == 60
                        assert changed == [True]
                        assert destination.read_config(0, 8) == mac + b"\3\0"  # up, and "announce yourself"
                        assert await guest.command(3, 0, b"") == 0
                        assert destination.read_config(6, 2) == b"\1\0"
                        guest.say(frame(70))
                        await guest.said()
                        while (got := await read_frame(peer)) == rarp:
                            pass
                        assert got == frame(70)
                    await destination.stop()
                destination.close()


async def test_a_link_is_let_go_and_taken_again(tmp_path: Path) -> None:
    """An undone switchover, after the source had let go."""
    guest = Guest()
    async with running(NetConfig(link=f"listen:{tmp_path}/s"), guest) as device:
        await device.stop()
        device.links.release_lock()
        device.links.release_lock()
        assert not (tmp_path / "s").exists()
        device.links.take_lock()
        device.links.take_lock()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/s")


@pytest.mark.parametrize("link", ["listen:{}/s", "dgram:{}/s"])
def test_a_path_that_somebody_has(tmp_path: Path, link: str) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    config = NetConfig(link=link.format(tmp_path), peer=f"{tmp_path}/t" if link.startswith("dgram") else None)
    first = NetDevice(config, memory, "_net0")
    with pytest.raises(ConfigError, match="in use by another process"):
        NetDevice(config, memory, "_net1")
    first.close()
    NetDevice(config, memory, "_net1").close()
    (tmp_path / "s").write_text("")
    with pytest.raises(ConfigError, match=r"net\.link = "):
        NetDevice(config, memory, "_net0")
    memory.close()


def test_a_link_that_is_taken_by_half_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors may run out between the socket and what the worker has of it."""

    def fail(sock: socket.socket) -> int:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(link, "_copy", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r'^net\.link = "listen:.*": cannot make it \(no more\)'):
        link.NetLinks(NetConfig(link=f"listen:{tmp_path}/s"), incoming=False, passt_s=2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not os.listdir(tmp_path)


def test_a_tap_that_no_socket_is_left_for_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(name: str, multi_queue: bool) -> tuple[int, str]:
        return os.dup(0), "tap0"

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(tap, "_attach", attach)
    monkeypatch.setattr("socket.socket", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r'^net\.tap = "tap0": cannot open it \(no more\); look at the host.s limits'):
        tap.open_taps(NetConfig(tap="tap0"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_do_not_travel() -> None:
    """Numbers of the sender's are somebody else's descriptors here."""
    memory = GuestMemory([(0, 1 << 20)])
    with pytest.raises(NotSupported, match=r"net\.fds = \[7\]: descriptors do not travel with a migration yet"):
        NetDevice(NetConfig(fds=(7,)), memory, "_net0", incoming=True)
    memory.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"pairs": 17}, "pairs is 17"),
        ({"mac": "AAAA"}, "mac is"),
        ({"offloads": -1}, "offloads is -1"),
        ({"begun": 1}, "begun is 1"),
        ({"more": 1}, "more"),
    ],
)
def test_states_that_can_not_be_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        sent(NetState(bytes(6), 1, 0, False), **changes)


async def test_what_a_state_says_beyond_the_drivers_features_is_left_out(tmp_path: Path) -> None:
    """More pairs than there are, offloads that were not negotiated: the driver has what it may have."""
    guest = Guest()
    device = NetDevice(NetConfig(link=f"listen:{tmp_path}/s"), guest.memory, "_net0")
    device.load(NetState(bytes(6), 16, (1 << 64) - 1, True))
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as workers:
            await device.activate(guest.setup(CTRL_VQ), guest.handles, workers)
            saved = device.save()
            assert (saved.pairs, saved.offloads, saved.begun) == (1, 0, True)
            await device.stop()
    device.reset()
    assert device.save() == NetState(device.mac, 1, 0, False)
    device.close()
    guest.close()


async def test_a_timer_that_can_not_be_had_is_an_activation_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest()
    device = NetDevice(NetConfig(link=f"listen:{tmp_path}/s"), guest.memory, "_net0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
    try:
        async with trio.open_nursery() as workers:
            with pytest.raises(OSError, match="Too many open files"):
                await device.activate(guest.setup(0), guest.handles, workers)
            await device.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(spare)
    device.close()
    guest.close()
