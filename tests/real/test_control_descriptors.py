"""Taps that API clients pass along with vm.add-net: taken where one is added, closed everywhere else."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm.config import MemoryConfig, PayloadConfig, VmConfig
from trivmm.control.descriptors import MAX_KEPT
from trivmm.control.http import Request, Response
from trivmm.control.routes import Router
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.guest import probe_cmdline, probe_path
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.control import FakeHypervisor
from trivmm.testing.driver import until
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.tap import open_taps, why_no_tap
from trivmm.vmm import Vmm, open_vmm

NO_TAP = why_no_tap()
LIMIT_S = 60
EMPTY = b"PUT /api/v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
TAP = f"tvd{os.getpid() % 100000}"

needs_tap = pytest.mark.skipif(NO_TAP is not None, reason=f"no tap can be made here ({NO_TAP}): run as root")


@asynccontextmanager
async def serving(folder: Path, hypervisor: Hypervisor) -> AsyncIterator[tuple[Vmm, str]]:
    path = str(folder / "api.sock")
    deadlines = Deadlines()
    with trio.fail_after(LIMIT_S):
        async with open_vmm(hypervisor, deadlines=deadlines) as vmm:
            async with open_server(path, Router(vmm), deadlines):
                yield vmm, path


def ask(path: str, name: str, body: Any, fds: list[int]) -> tuple[int, Any]:
    """(code, JSON) of one request."""
    data = json.dumps(body).encode() if body is not None else b""
    head = f"PUT /api/v1/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(path)
        socket.send_fds(sock, [head.encode() + data], fds)
        found = b""
        while piece := sock.recv(4096):
            found += piece
    answer, _, text = found.partition(b"\r\n\r\n")
    return int(answer.split()[1]), json.loads(text) if text else None


async def call(path: str, name: str, body: Any = None, fds: list[int] | None = None) -> tuple[int, Any]:
    return await trio.to_thread.run_sync(ask, path, name, body, fds or [])


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(one end to pass, the other one): it says when nobody has the first one any more."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield write, read
    os.close(read)


async def everybody_has_closed(read: int) -> bool:
    await trio.lowlevel.wait_readable(read)
    return os.read(read, 1) == b""


def held(read: int) -> bool:
    try:
        return os.read(read, 1) != b""
    except BlockingIOError:
        return True


def named(vmm: Vmm) -> list[tuple[int, ...] | None]:
    return [net.fds for net in vmm.vm.config.virtio]


async def test_one_that_is_added_on_paper_is_kept_until_the_vm_goes(tmp_path: Path, pipe: tuple[int, int]) -> None:
    write, read = pipe
    async with serving(tmp_path, FakeHypervisor()) as (vmm, path):
        await vmm.create(VmConfig(PayloadConfig("/k")))
        # The numbers in the body are the client's own, and mean nothing here.
        assert (await call(path, "vm.add-net", {"fds": [1], "id": "n"}, [write]))[0] == 204
        os.close(write)
        ((fd,),) = named(vmm)
        assert os.fstat(fd).st_ino == os.fstat(read).st_ino
        assert not os.get_inheritable(fd)
        assert held(read)
        await vmm.delete()
        assert await everybody_has_closed(read)


async def test_one_of_a_removed_device_goes_with_the_next_change(tmp_path: Path, pipe: tuple[int, int]) -> None:
    write, read = pipe
    async with serving(tmp_path, FakeHypervisor()) as (vmm, path):
        await vmm.create(VmConfig(PayloadConfig("/k")))
        assert (await call(path, "vm.add-net", {"id": "n"}, [write]))[0] == 204
        os.close(write)
        assert (await call(path, "vm.remove-device", {"id": "n"}))[0] == 204
        assert (await call(path, "vm.add-net", {"tap": "t"}))[0] == 204
        assert await everybody_has_closed(read)


@pytest.mark.parametrize(
    ("name", "body", "count", "expected", "said"),
    [
        ("vm.add-net", {"num_queues": 4}, 1, 400, "net.fds = ["),
        ("vm.add-net", {"tap": "t"}, 1, 400, "there is a tap's name too"),
        ("vm.add-net", {"link": "passt"}, 1, 400, "of a tap, and there is a link"),
        ("vm.add-net", {"fds": [5]}, 0, 400, "fds = [5]: numbers of descriptors mean nothing to another process"),
        ("vm.add-net", {"fds": []}, 0, 400, "fds = []: numbers of descriptors mean nothing to another process"),
        ("vm.add-net", [], 1, 400, "not an object"),
        ("vm.add-disk", {"path": "/d"}, 1, 204, ""),  # has no use for them
        ("vm.pause", None, 1, 500, "must be Running"),
        ("vm.nothing", None, 1, 404, "is not a route"),
    ],
)
async def test_those_that_nobody_takes_are_closed(
    tmp_path: Path, pipe: tuple[int, int], name: str, body: Any, count: int, expected: int, said: str
) -> None:
    write, read = pipe
    async with serving(tmp_path, FakeHypervisor()) as (vmm, path):
        await vmm.create(VmConfig(PayloadConfig("/k")))
        code, answer = await call(path, name, body, [write] * count)
        os.close(write)
        assert await everybody_has_closed(read)
        assert code == expected
        assert any(said in line for line in answer or [""]), answer


async def test_a_client_that_passes_more_than_anybody_needs(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """With each byte of a request that it never ends: what is kept is bounded, and gone with the connection."""
    write, read = pipe
    async with serving(tmp_path, FakeHypervisor()) as (vmm, path):
        await vmm.create(VmConfig(PayloadConfig("/k")))
        before = len(os.listdir("/proc/self/fd"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            for byte in b"PUT /api/v1/vm.add-net HTTP/1.1\r\n":
                socket.send_fds(sock, [bytes((byte,))], [write] * 100)
            sock.send(b"Host: x\r\n")
            most = before + MAX_KEPT + 4  # sockets, and a thread's own
            await until(lambda: len(os.listdir("/proc/self/fd")) <= most)
        os.close(write)
        assert await everybody_has_closed(read)


async def test_a_request_that_fails_leaves_none_to_the_next_one(
    tmp_path: Path, pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """On one connection; a bug of ours is what it fails by."""
    write, read = pipe
    seen: list[int] = []

    async def handle(request: Request) -> Response:
        seen.append(len(request.passed.fds))
        raise RuntimeError("a bug")

    path = str(tmp_path / "api.sock")
    with trio.fail_after(LIMIT_S):
        async with open_server(path, handle, Deadlines()):
            with trio.socket.socket(socket.AF_UNIX) as sock:
                await sock.connect(path)
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))
                await sock.sendmsg([EMPTY], [rights])
                os.close(write)
                assert b" 500 " in await sock.recv(4096)
                assert await everybody_has_closed(read)
                await sock.send(EMPTY)
                assert b" 500 " in await sock.recv(4096)
    assert seen == [1, 0]
    assert "API handler failed" in caplog.text


async def test_a_vm_that_is_made_takes_none_by_number(tmp_path: Path) -> None:
    async with serving(tmp_path, FakeHypervisor()) as (_vmm, path):
        body = {"payload": {"kernel": "/k"}, "net": [{"tap": "a"}, {"fds": [5]}]}
        code, answer = await call(path, "vm.create", body)
        assert code == 400
        assert "net[1].fds = [5]: numbers of descriptors mean nothing" in answer[-1]


@needs_tap
@pytest.mark.kvm
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm can't be opened")
async def test_a_running_guest_gets_a_tap_that_was_passed(tmp_path: Path) -> None:
    config = VmConfig(PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, mem=4)), memory=MemoryConfig(32 << 20))
    async with serving(tmp_path, choose_hypervisor("kvm")) as (vmm, path):
        await vmm.create(config)
        await vmm.boot()
        (fd,) = open_taps(NetConfig(tap=TAP))
        code, answer = await call(path, "vm.add-net", {"id": "n"}, [fd])
        os.close(fd)
        assert code == 200
        assert answer["id"] == "n"
        assert "n" in vmm.vm.counters()
        assert Path(f"/sys/class/net/{TAP}").exists()
        code, answer = await call(path, "vm.add-net", {"id": "m"}, [0])
        assert (code, answer[:2]) == (500, ["Error from API", "The network device could not be added to the VM"])
        assert "not a tap" in answer[2]
        await vmm.reboot()
        assert "n" in vmm.vm.counters()
        await vmm.delete()
        assert not Path(f"/sys/class/net/{TAP}").exists()
