"""virtio-vsock: its rules against a mock driver and real sockets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm._native import lib
from trivmm.testing.driver import until
from trivmm.testing.vsock import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Packet,
    VsockGuest,
    serving,
)
from trivmm.virtio.setup import VERSION_1
from trivmm.virtio.vsock.config import VsockConfig
from trivmm.virtio.vsock.device import VsockDevice

LIMIT_S = 20
EVENT_IDX = 1 << 29
RCV, SEND = 1, 2
BUFFER = int(lib.TV_VSOCK_BUFFER)
PORT = 52


@pytest.fixture
def guest() -> Iterator[VsockGuest]:
    made = VsockGuest()
    yield made
    made.close()


@pytest.fixture
def device(guest: VsockGuest, tmp_path: Path) -> Iterator[VsockDevice]:
    made = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    yield made
    made.close()


class Client:
    """Of the host: a unix stream."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = trio.socket.from_stdlib_socket(sock)

    @classmethod
    def at(cls, path: Path) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return cls(sock)

    async def line(self) -> bytes:
        said = b""
        while not said.endswith(b"\n"):
            more = await self.sock.recv(1)
            if not more:
                break
            said += more
        return said

    async def exactly(self, count: int) -> bytes:
        said = b""
        while len(said) < count:
            more = await self.sock.recv(count - len(said))
            assert more, f"ended after {len(said)} bytes"
            said += more
        return said

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self.sock.send(view) :]

    async def end(self) -> bytes:
        """What comes until the end."""
        said = b""
        while more := await self.sock.recv(65536):
            said += more
        return said

    def close(self) -> None:
        self.sock.close()


async def connected(device: VsockDevice, guest: VsockGuest, path: Path, **how: Any) -> tuple[Client, int]:
    """A client of the host, whom the guest has accepted on PORT, and its port."""
    client = Client.at(path / "v.sock")
    await client.send(b"CONNECT %d\n" % PORT)
    asked = await guest.packet()
    assert (asked.op, asked.guest, asked.src_cid, asked.dst_cid, asked.type) == (REQUEST, PORT, 2, 3, 1)
    assert asked.buf_alloc == BUFFER
    await guest.send(Packet(RESPONSE, PORT, asked.host, **how))
    assert await client.line() == b"OK %d\n" % asked.host
    return client, asked.host


@asynccontextmanager
async def service(path: Path, port: int, backlog: int = 16) -> AsyncIterator[Any]:
    """A unix socket that the guest's connections to ``port`` go to."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{path}/v.sock_{port}")
    sock.listen(backlog)
    sock.setblocking(False)
    listener = trio.socket.from_stdlib_socket(sock)
    yield listener
    listener.close()


# --- connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
async def test_a_client_of_the_host_talks_with_the_guest(event_idx: bool, tmp_path: Path) -> None:
    guest = VsockGuest(event_idx=event_idx)
    device = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    async with serving(device, guest, VERSION_1 | (EVENT_IDX if event_idx else 0)):
        client, host = await connected(device, guest, tmp_path)
        await client.send(b"hello, guest")
        got = await guest.packet()
        assert (got.op, got.guest, got.host, got.data) == (RW, PORT, host, b"hello, guest")
        await guest.send(Packet(RW, PORT, host, b"hello, host"))
        assert await client.exactly(11) == b"hello, host"
        counted = device.counters()
        assert (counted["open"], counted["established"], counted["accepted"]) == (1, 1, 1)
        assert (counted["to_guest"], counted["to_host"]) == (12, 11)
        client.close()
        ended = await guest.packet()
        assert (ended.op, ended.flags, ended.fwd_cnt) == (SHUTDOWN, RCV | SEND, 11)
        await guest.send(Packet(RST, PORT, host))
    assert not any(device.counters()[name] for name in ("open", "half_open", "ending", "lingering"))
    device.close()
    device.close()
    guest.close()


async def test_the_guest_talks_with_a_server_of_the_host(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest), service(tmp_path, 7) as listener:
        await guest.send(Packet(REQUEST, 1000, 7))
        answer = await guest.packet()
        assert (answer.op, answer.guest, answer.host, answer.buf_alloc) == (RESPONSE, 1000, 7, BUFFER)
        sock, _ = await listener.accept()
        await guest.send(Packet(RW, 1000, 7, b"ask"))
        assert await sock.recv(10) == b"ask"
        await sock.send(b"answer")
        assert (await guest.packet()).data == b"answer"
        await guest.send(Packet(SHUTDOWN, 1000, 7, flags=RCV | SEND))
        assert (await guest.packet()).op == RST
        assert await sock.recv(10) == b""
        sock.close()
    assert device.counters()["connected"] == 1


async def test_a_guest_that_receives_no_more_hears_that_its_peer_has_gone(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest), service(tmp_path, 7) as listener:
        await guest.send(Packet(REQUEST, 1000, 7))
        assert (await guest.packet()).op == RESPONSE
        sock, _ = await listener.accept()
        await guest.send(Packet(SHUTDOWN, 1000, 7, flags=RCV))
        await guest.send(Packet(RW, 1000, 7, b"last words"))
        assert await sock.recv(20) == b"last words"
        sock.close()
        told = await guest.packet()
        assert (told.op, told.flags) == (SHUTDOWN, RCV | SEND)
        await guest.send(Packet(RST, 1000, 7))
    assert not any(device.counters()[name] for name in ("open", "half_open", "ending", "lingering"))


async def test_nobody_listens(guest: VsockGuest, device: VsockDevice) -> None:
    async with serving(device, guest):
        await guest.send(Packet(REQUEST, 1000, 7))
        answer = await guest.packet()
        assert (answer.op, answer.guest, answer.host) == (RST, 1000, 7)
    assert device.counters()["no_listener"] == 1


async def test_what_follows_the_line_is_the_guests(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    """A client that doesn't wait for the OK, and one whose line comes in pieces."""
    async with serving(device, guest):
        client = Client.at(tmp_path / "v.sock")
        for piece in (b"CON", b"NECT 5", b"2\nand more"):
            await client.send(piece)
            await trio.sleep(0.01)
        asked = await guest.packet()
        await guest.send(Packet(RESPONSE, PORT, asked.host))
        assert (await guest.packet()).data == b"and more"
        assert await client.line() == b"OK %d\n" % asked.host
        client.close()


@pytest.mark.parametrize(
    "line",
    [b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"CONNECT 99999999999999999999\n",
     b"CONNECT 1 2\n", b"CONNECT -1\n", b"GET / HTTP/1.1\r\n", b"CONNECT" + b" " * 40 + b"1\n", bytes(32)],
)  # fmt: skip
async def test_a_client_that_says_something_else_is_closed(
    line: bytes, guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        client = Client.at(tmp_path / "v.sock")
        await client.send(line)
        with contextlib.suppress(ConnectionResetError):  # what it said was not read
            assert await client.end() == b""
        client.close()
    assert device.counters()["bad_greeting"] == 1
    assert guest.no_packet()


async def test_a_guest_that_refuses(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        client = Client.at(tmp_path / "v.sock")
        await client.send(b"connect 52 \r\n")
        asked = await guest.packet()
        await guest.send(Packet(RST, PORT, asked.host))
        assert await client.end() == b""
        client.close()
    assert device.counters()["half_open"] == 0


async def test_half_made_connections_have_a_limit_in_time(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    device.set_patience(0.15, 0.15)
    async with serving(device, guest):
        silent, unanswered = Client.at(tmp_path / "v.sock"), Client.at(tmp_path / "v.sock")
        await unanswered.send(b"CONNECT 52\n")
        asked = await guest.packet()
        assert await silent.end() == b""
        assert await unanswered.end() == b""
        reset = await guest.packet()
        assert (reset.op, reset.host) == (RST, asked.host)
        silent.close()
        unanswered.close()
    assert device.counters()["timed_out"] == 2
    assert device.counters()["half_open"] == 0


async def test_half_made_connections_have_a_limit_in_number(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    """The next clients wait in the listener's queue; that somebody is done with lets them in."""
    device.set_patience(60, 60)
    most = int(lib.TV_VSOCK_HALF_OPEN)
    async with serving(device, guest):
        silent = [Client.at(tmp_path / "v.sock") for _ in range(most)]
        await until(lambda: device.counters()["half_open"] == most)
        late = Client.at(tmp_path / "v.sock")
        await late.send(b"CONNECT 52\n")
        silent.pop().close()
        assert (await guest.packet()).op == REQUEST
        for each in [*silent, late]:
            each.close()


async def test_a_thousand_connections_side_by_side(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    most = int(lib.TV_VSOCK_CONNECTIONS)
    clients: list[Client] = []
    ports: list[int] = []
    async with serving(device, guest):
        for _ in range(1000):
            client, host = await connected(device, guest, tmp_path)
            clients.append(client)
            ports.append(host)
        assert len(set(ports)) == 1000
        assert device.counters()["open"] == 1000
        for number, client in enumerate(clients):
            await client.send(b"%d" % number)
            got = await guest.packet()
            assert (got.host, got.data) == (ports[number], b"%d" % number)
            await guest.send(Packet(RW, PORT, got.host, got.data[::-1]))
        for number, client in enumerate(clients):
            said = b"%d" % number
            assert await client.exactly(len(said)) == said[::-1]
        for _ in range(most - 1000):
            clients.append((await connected(device, guest, tmp_path))[0])
        over = Client.at(tmp_path / "v.sock")
        assert await over.end() == b""
        over.close()
        await guest.send(Packet(REQUEST, 1, 7))
        assert (await guest.packet()).op == RST
        assert device.counters()["refused"] == 2
        clients.pop().close()
        assert (await guest.packet()).op == SHUTDOWN
        for client in clients:
            client.close()


# --- credit ------------------------------------------------------------------------------------------------------


async def test_the_guest_gets_no_more_than_it_has_room_for(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path, buf_alloc=10)
        await client.send(bytes(range(25)))
        assert (await guest.packet()).data == bytes(range(10))
        assert (await guest.packet()).op == CREDIT_REQUEST
        await guest.send(Packet(CREDIT_UPDATE, PORT, host, buf_alloc=10, fwd_cnt=4))
        assert (await guest.packet()).data == bytes(range(10, 14))
        assert (await guest.packet()).op == CREDIT_REQUEST
        await guest.send(Packet(CREDIT_UPDATE, PORT, host, buf_alloc=5, fwd_cnt=4))  # less room than it has taken
        await guest.send(Packet(CREDIT_UPDATE, PORT, host, buf_alloc=5, fwd_cnt=4000))  # more than it was sent
        await guest.send(Packet(CREDIT_UPDATE, PORT, host, buf_alloc=100, fwd_cnt=14))
        ops = [await guest.packet(), await guest.packet()]
        while ops[-1].op != RW:
            ops.append(await guest.packet())
        assert ops[-1].data == bytes(range(14, 25))
        client.close()


async def test_a_peer_that_never_reads_holds_up_its_own_stream(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        lazy, lazy_port = await connected(device, guest, tmp_path)
        client, host = await connected(device, guest, tmp_path)
        forwarded = sent = 0
        piece = bytes(each & 0xFF for each in range(16384))
        while sent - forwarded + len(piece) <= BUFFER:
            await guest.send(Packet(RW, PORT, lazy_port, piece))
            sent += len(piece)
            await guest.send(Packet(CREDIT_REQUEST, PORT, lazy_port))
            while (update := await guest.packet()).op != CREDIT_UPDATE or not guest.no_packet():
                pass
            forwarded = update.fwd_cnt
        assert sent > forwarded + BUFFER - len(piece)
        await guest.send(Packet(RW, PORT, host, b"meanwhile"))
        assert await client.exactly(9) == b"meanwhile"
        said = await lazy.exactly(sent)
        assert said == piece * (sent // len(piece))
        while (update := await guest.packet()).op != CREDIT_UPDATE:
            pass
        lazy.close()
        client.close()


async def test_a_guest_that_floods_loses_the_connection(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        lazy, port = await connected(device, guest, tmp_path)
        while not device.counters()["over_credit"]:
            await guest.send(Packet(RW, PORT, port, bytes(65536)))
        while (answer := await guest.packet()).op != RST:
            assert answer.op == CREDIT_UPDATE
        assert not device.counters()["open"]
        await lazy.end()
        lazy.close()


async def test_a_guest_that_offers_no_buffers_is_served_when_it_does(tmp_path: Path) -> None:
    """And one that has 300 answers to come has its packets taken only so far."""
    guest = VsockGuest(buffers=0)
    device = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    most = int(lib.TV_VSOCK_REPLIES)
    async with serving(device, guest):
        client = Client.at(tmp_path / "v.sock")
        await client.send(b"CONNECT 52\n")
        for number in range(most):
            await guest.send(Packet(RW, number, 1))
        guest.post(Packet(RW, most, 1))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert guest.transmit.used_index == most
        guest.listen(8)
        for number in range(most):
            answer = await guest.packet()
            assert (answer.op, answer.guest, answer.host) == (RST, number, 1)
        assert {(await guest.packet()).op, (await guest.packet()).op} == {REQUEST, RST}
        client.close()
    device.close()
    guest.close()


# --- ends --------------------------------------------------------------------------------------------------------


async def test_each_direction_ends_by_itself(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path)
        client.sock.shutdown(socket.SHUT_WR)
        ended = await guest.packet()
        assert (ended.op, ended.flags) == (SHUTDOWN, SEND)
        await guest.send(Packet(RW, PORT, host, b"still"))
        assert await client.exactly(5) == b"still"
        await guest.send(Packet(SHUTDOWN, PORT, host, flags=SEND))
        assert await client.end() == b""
        ended = await guest.packet()
        assert (ended.op, ended.flags) == (SHUTDOWN, RCV | SEND)
        await guest.send(Packet(SHUTDOWN, PORT, host, flags=RCV | SEND))
        assert (await guest.packet()).op == RST
        client.close()
    assert device.counters()["ending"] == 0


async def test_a_guest_that_receives_no_more(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path)
        await guest.send(Packet(SHUTDOWN, PORT, host, flags=RCV))
        await guest.send(Packet(RW, PORT, host, b"I talk"))
        assert await client.exactly(6) == b"I talk"
        with pytest.raises(BrokenPipeError):
            await client.send(b"and you don't")
        client.close()


async def test_a_peer_that_receives_no_more(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path)
        client.sock.shutdown(socket.SHUT_RD)
        await guest.send(Packet(RW, PORT, host, b"for nobody"))
        told = await guest.packet()
        assert (told.op, told.flags, told.fwd_cnt) == (SHUTDOWN, RCV, 10)
        await client.send(b"I talk")
        assert (await guest.packet()).data == b"I talk"
        client.close()
        told = await guest.packet()
        assert (told.op, told.flags) == (SHUTDOWN, RCV | SEND)


async def test_a_peer_that_goes_away_with_something_unread(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path)
        await client.send(b"the last words")
        await guest.send(Packet(RW, PORT, host, b"unread"))
        client.close()
        assert (await guest.packet()).data == b"the last words"
        told = await guest.packet()
        assert (told.op, told.flags) == (SHUTDOWN, RCV | SEND)
        await guest.send(Packet(RW, PORT, host, b"too late"))
        await guest.send(Packet(RST, PORT, host))
        await until(lambda: not device.counters()["ending"])


async def test_what_the_guest_sent_before_its_end_arrives(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    """Its ports are its own again at once, while the rest lingers."""
    async with serving(device, guest), service(tmp_path, 7) as listener:
        await guest.send(Packet(REQUEST, 1000, 7))
        assert (await guest.packet()).op == RESPONSE
        first, _ = await listener.accept()
        await until(lambda: device.counters()["open"] == 1)
        sent = 0
        while device.counters()["to_host"] == sent:  # until the socket is full
            await guest.send(Packet(RW, 1000, 7, bytes(32768)))
            sent += 32768
        await guest.send(Packet(SHUTDOWN, 1000, 7, flags=RCV | SEND))
        while (await guest.packet()).op != RST:
            pass
        assert device.counters()["lingering"] == 1
        await guest.send(Packet(REQUEST, 1000, 7))
        assert (await guest.packet()).op == RESPONSE
        second = Client((await listener.accept())[0]._sock)
        await guest.send(Packet(RW, 1000, 7, b"the second"))
        assert await second.exactly(10) == b"the second"
        second.close()
        got = 0
        while more := await first.recv(65536):
            got += len(more)
        assert got == sent
        first.close()
        await until(lambda: not device.counters()["lingering"])


async def test_a_reset_ends_every_connection(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    """And a stop ends none: what comes meanwhile is there afterwards."""
    async with serving(device, guest):
        client, host = await connected(device, guest, tmp_path)
        waiting = Client.at(tmp_path / "v.sock")
    await client.send(b"meanwhile")
    async with serving(device, guest, queues=device.queues):
        assert (await guest.packet()).data == b"meanwhile"
        await guest.send(Packet(RW, PORT, host, b"and back"))
        assert await client.exactly(8) == b"and back"
    device.reset()
    assert await client.end() == b""
    assert await waiting.end() == b""
    assert not any(device.counters()[name] for name in ("open", "half_open", "ending", "lingering"))
    client.close()
    waiting.close()
    again = VsockGuest()
    device.memory = again.memory
    async with serving(device, again):
        client, _ = await connected(device, again, tmp_path)
        client.close()
    again.close()
