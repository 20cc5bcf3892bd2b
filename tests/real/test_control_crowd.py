"""Too many clients: idle ones, half-sent requests, slow ones, no descriptors left. Whoever comes next is served."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trivmm.control.http import Request, Response
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.testing.control import ChRemoteError, ch_remote, command_environment

LIMIT_S = 30
FOR_EVER = 1e6  # no deadline frees a connection in these tests unless it says so
PATIENT = Deadlines(api_read=FOR_EVER, api_write=FOR_EVER, api_idle=FOR_EVER)
HALF = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /api/v1/x HTTP/1.1\r\nHost: x\r\n\r\n"
DESCRIPTORS = 64  # what the server is told that it has: a table of 16
TABLE = 16


async def ok(request: Request) -> Response:
    return Response.of(request.name)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (DESCRIPTORS, DESCRIPTORS))


Connect = Callable[..., Awaitable[trio.SocketStream]]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
async def connect(path: str) -> AsyncIterator[Connect]:
    """Connects, and the server knows: it has read ``data``. The test's end closes them all."""
    streams: list[trio.SocketStream] = []

    async def made(data: bytes = b"") -> trio.SocketStream:
        stream = await trio.open_unix_socket(path)
        streams.append(stream)
        if data:
            await stream.send_all(data)
        await trio.testing.wait_all_tasks_blocked()
        return stream

    yield made
    for stream in streams:
        await stream.aclose()


async def to_end(stream: trio.SocketStream) -> bytes:
    found = b""
    with trio.fail_after(LIMIT_S), contextlib.suppress(trio.BrokenResourceError):
        while piece := await stream.receive_some(4096):
            found += piece
    return found


async def answer(stream: trio.SocketStream) -> bytes:
    """One answer's first bytes: they are sent together, and here they are few."""
    with trio.fail_after(LIMIT_S):
        return bytes(await stream.receive_some(4096))


async def ask(path: str) -> None:
    with trio.fail_after(LIMIT_S):
        assert await trio.to_thread.run_sync(ch_remote, path, "GET", "x") == '"x"'


@pytest.mark.usefixtures("few")
async def test_the_oldest_idle_one_is_closed_for_the_next(path: str, connect: Connect) -> None:
    async with open_server(path, ok, PATIENT):
        first, second, *_ = clients = [await connect() for _ in range(TABLE)]
        await first.send_all(GET)
        assert b'"x"' in await answer(first)  # now it has been idle for less long than the others
        await ask(path)
        assert await to_end(second) == b""
        for client in [first, *clients[2:]]:
            await client.send_all(GET)
            assert b'"x"' in await answer(client)


@pytest.mark.usefixtures("few")
async def test_the_oldest_half_sent_one_is_told_why(path: str, connect: Connect) -> None:
    async with open_server(path, ok, PATIENT):
        clients = [await connect(HALF) for _ in range(TABLE + 3)]
        for given_up in clients[:3]:
            said = await to_end(given_up)
            assert said.startswith(b"HTTP/1.1 503 \r\nServer: TriVMM API\r\nConnection: close\r\n")
            assert "did not come to its end" in json.loads(said.partition(b"\r\n\r\n")[2])[1]
        for client in clients[3:]:
            await client.send_all(b"\r\n")
            assert (await answer(client)).endswith(b'"vm.create"')


@pytest.mark.usefixtures("few")
async def test_a_request_in_progress_is_never_given_up(path: str, connect: Connect) -> None:
    go_on = trio.Event()
    running = 0

    async def handler(request: Request) -> Response:
        nonlocal running
        running += 1
        await go_on.wait()
        return Response.of(request.name)

    async with open_server(path, handler, PATIENT):
        clients = [await connect(GET) for _ in range(TABLE - 1)]
        for data in [b"", HALF] * TABLE:  # the one place that is left goes from one to the next
            await connect(data)
        last = await connect(GET)
        assert running == TABLE
        said = await to_end(await connect())
        assert said.startswith(b"HTTP/1.1 503 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])[1] == "too many requests in progress"
        go_on.set()
        for client in [*clients, last]:
            assert (await answer(client)).endswith(b'"x"')
        await ask(path)


@pytest.mark.usefixtures("few")
async def test_an_answer_that_is_being_sent_is_not_given_up_either(path: str, connect: Connect) -> None:
    large = "x" * (1 << 20)  # more than a socket's buffers take

    async def handler(_: Request) -> Response:
        return Response.of(large)

    async with open_server(path, handler, PATIENT):
        slow = await connect(GET)
        for _ in range(2 * TABLE):
            await connect()
        await slow.send_eof()
        assert (await to_end(slow)).endswith(large.encode() + b'"')


@pytest.mark.usefixtures("few")
async def test_trickling_does_not_make_a_request_younger(path: str, connect: Connect) -> None:
    async with open_server(path, ok, PATIENT):
        slow = await connect(b"GET /")
        for _ in range(TABLE):
            with contextlib.suppress(trio.BrokenResourceError):
                await slow.send_all(b"x")
            await connect()
        assert (await to_end(slow)).startswith(b"HTTP/1.1 503 ")
        await ask(path)


def trickle(path: str, data: bytes) -> bytes:
    """Send the same byte again and again until the server closes; what it said, at the end."""
    found = b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(path)
        sock.sendall(data)
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                sock.sendall(b"x")
                if select.select([sock], [], [], 0.02)[0]:
                    piece = sock.recv(4096)
                    if not piece:
                        return found
                    found += piece
            return b"never closed"
    return found


async def test_a_byte_now_and_then_does_not_put_off_the_deadline(path: str) -> None:
    async with open_server(path, ok, Deadlines(api_read=0.5)):
        with trio.fail_after(LIMIT_S):
            assert await trio.to_thread.run_sync(trickle, path, HALF + b"X: ") == b""


async def test_a_client_that_pipelines(path: str, connect: Connect) -> None:
    async with open_server(path, ok, PATIENT):
        client = await connect()
        names = [f"n{number}" for number in range(100)]
        for name in names:
            await client.send_all(GET.replace(b"/x ", b"/%s " % name.encode()))
        await client.send_eof()
        assert re.findall(rb'\r\n\r\n"(\w+)"', await to_end(client)) == [name.encode() for name in names]


async def test_a_client_that_pipelines_and_does_not_read_is_dropped(path: str, connect: Connect) -> None:
    async with open_server(path, ok, Deadlines(api_write=0.2)):
        greedy = await connect()
        with trio.fail_after(LIMIT_S), contextlib.suppress(trio.BrokenResourceError):
            while True:  # until it is dropped
                await greedy.send_all(GET * 100)
        await ask(path)


async def test_unfinished_bodies_together_hold_no_more_than_their_limit(
    path: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivmm.control.server.MAX_HELD", 100_000)
    head = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 50001\r\n\r\n"
    async with open_server(path, ok, PATIENT):
        first, second = [await connect(head + bytes(50_000)) for _ in range(2)]
        third = await connect(head + b"x")
        assert (await to_end(first)).startswith(b"HTTP/1.1 503 ")
        for client, rest in ((second, b"x"), (third, bytes(50_000))):
            await client.send_all(rest)
            assert (await answer(client)).endswith(b'"vm.create"')


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """So many descriptors more can be opened in this process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    holes = []
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    while not holes or holes[-1] <= highest:
        holes.append(os.open("/dev/null", os.O_RDONLY))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 1 + count, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in holes:
            os.close(fd)


@pytest.mark.parametrize("data", [b"", HALF])
async def test_no_descriptor_is_left(path: str, data: bytes) -> None:
    async with open_server(path, ok, PATIENT):
        socks = [trio.socket.socket(socket.AF_UNIX) for _ in range(50)]
        await trio.testing.wait_all_tasks_blocked()
        with room_for(12):
            for sock in socks[:-1]:
                await sock.connect(path)
                if data:
                    await sock.send(data)
                await trio.testing.wait_all_tasks_blocked()
            await socks[-1].connect(path)
            await socks[-1].send(GET)
            with trio.fail_after(LIMIT_S):
                assert (await socks[-1].recv(4096)).endswith(b'"x"')
                assert (await socks[0].recv(4096))[:13] == (b"HTTP/1.1 503 " if data else b"")
            assert os.close(os.open("/dev/null", os.O_RDONLY)) is None  # the VM gets one too
        for sock in socks:
            sock.close()


def test_the_process_serves_beside_a_thousand_idle_and_two_hundred_half_sent(tmp_path: Path) -> None:
    """With the usual soft limit of descriptors, and with deadlines that free none of them."""
    pytest.importorskip("unicorn")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    options = ["--hypervisor", "soft", "--deadlines", "api_read=10000,api_idle=10000"]
    listener = socket.socket(socket.AF_UNIX)  # passed in: its parent knows that it listens
    path = str(tmp_path / "s")
    listener.bind(path)
    listener.listen(1)
    options += ["--api-socket", f"fd={listener.fileno()}"]
    process = subprocess.Popen(
        ["sh", "-c", 'ulimit -S -n 1024; exec "$@"', "sh", sys.executable, "-m", "trivmm", *options],
        env=command_environment(),
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    listener.close()
    clients: list[socket.socket] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(limits[1], 4096)), limits[1]))
        assert json.loads(ch_remote(path, "GET", "vmm.ping") or "")["pid"] == process.pid
        for data in [b""] * 1000 + [HALF] * 200:
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            # A timeout of Python's would make it non-blocking: EAGAIN where the backlog is full for a moment.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", LIMIT_S, 0))
            client.connect(path)
            client.settimeout(LIMIT_S)
            if data:
                client.sendall(data)
        with pytest.raises(ChRemoteError) as caught:
            ch_remote(path, "GET", "vm.info")
        assert caught.value.status == 404  # there is no VM: an answer like any other
        assert clients[0].recv(1) == b""
        clients[-1].sendall(b"\r\n")  # the youngest half-sent one was not given up
        assert clients[-1].recv(4096).startswith(b"HTTP/1.1 400 ")
        assert not ch_remote(path, "PUT", "vmm.shutdown")
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (0, "")
        assert err.count("\n") == 1  # said once, not a thousand times
        assert "too many API connections" in err
        assert os.path.exists(path)  # its maker's
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for client in clients:
            client.close()
        process.kill()
        process.communicate(timeout=LIMIT_S)
