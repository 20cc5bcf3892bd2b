"""What libvirt's ch driver does with a VMM, call by call: define, start, info, suspend, resume, reboot, shut down,
destroy.

It starts a program named ``cloud-hypervisor`` with a listening socket passed in and a FIFO for events, keeps one
libcurl handle (and so one connection), parses the event stream by counting braces, and looks for threads by name in
/proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from trivmm.guest import probe_cmdline, probe_path
from trivmm.testing.processes import until

pytestmark = pytest.mark.kvm

LIMIT_S: Final = 90
MEMORY: Final = 64 << 20


def braced(read: Callable[[], bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a stream, as libvirt finds them: by counting braces, whatever stands between them."""
    depth, text = 0, b""
    while piece := read():
        for byte in piece:
            char = bytes([byte])
            depth += (char == b"{") - (char == b"}")
            if depth or char == b"}":
                text += char
            if not depth and text:
                yield json.loads(text)
                text = b""
    assert depth == 0, text


class EventReader:
    """libvirt's thread: opens the FIFO for reading, which waits for a writer, after the VMM was started."""

    def __init__(self, fifo: Path) -> None:
        self.seen: list[tuple[str, str]] = []
        self._fifo = fifo
        self._news: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        fd = os.open(self._fifo, os.O_RDONLY)
        try:
            for event in braced(lambda: os.read(fd, 4096)):
                assert set(event) == {"timestamp", "source", "event", "properties"}
                assert set(event["timestamp"]) == {"secs", "nanos"}
                self._news.put((event["source"], event["event"]))
        finally:
            os.close(fd)
            self._news.put(None)

    def until(self, source: str, name: str) -> None:
        """The next event of that name, after whatever was seen."""
        while True:
            event = self._news.get(timeout=LIMIT_S)
            assert event is not None, f"the stream ended without {source}:{name}; {self.seen}"
            self.seen.append(event)
            if event == (source, name):
                return

    def rest(self) -> None:
        while (event := self._news.get(timeout=LIMIT_S)) is not None:
            self.seen.append(event)

    def close(self) -> None:
        """Lets the thread go, also where no VMM ever opened the FIFO."""
        with contextlib.suppress(OSError):  # ENXIO: nobody reads
            os.close(os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK))
        self._thread.join(LIMIT_S)


class CurlHandle:
    """One connection, kept open, with libcurl's bytes. ``chunked``: as before libvirt said that an upload is empty."""

    def __init__(self, path: Path, *, chunked: bool) -> None:
        self._chunked = chunked
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(LIMIT_S)
        self._sock.connect(str(path))
        self._file = self._sock.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def get(self, route: str) -> Any:
        code, body = self._send(f"GET {route}", "Accept: application/json", "Content-Type: application/json")
        assert code == 200
        return json.loads(body)

    def put(self, route: str) -> int:
        if not self._chunked:
            return self._send(f"PUT {route}", "Accept: application/json", "Content-Length: 0")[0]
        head = self._head(f"PUT {route}", "Accept: */*", "Transfer-Encoding: chunked", "Expect: 100-continue")
        self._sock.sendall(head)
        assert self._answer() == (100, b"")
        self._sock.sendall(b"0\r\n\r\n")
        return self._answer()[0]

    def create(self, config: dict[str, Any]) -> int:
        body = json.dumps(config, separators=(",", ":")).encode()
        headers = ("Accept: application/json", "Content-Type: application/json", f"Content-Length: {len(body)}")
        return self._send("PUT vm.create", *headers, body=body)[0]

    def _head(self, request: str, *headers: str) -> bytes:
        method, route = request.split()
        return "\r\n".join([f"{method} /api/v1/{route} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()

    def _send(self, request: str, *headers: str, body: bytes = b"") -> tuple[int, bytes]:
        self._sock.sendall(self._head(request, *headers) + body)
        return self._answer()

    def _answer(self) -> tuple[int, bytes]:
        status = self._file.readline().decode()
        match = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) .*\r\n", status)
        assert match, status
        length = 0
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            assert (name.lower(), value.strip().lower()) != ("connection", "close")
            if name.lower() == "content-length":
                length = int(value)
        return int(match[1]), self._file.read(length)


def threads_of(pid: int) -> dict[str, int]:
    """Thread id by name, as libvirt reads them."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[(task / "comm").read_text().rstrip("\n")] = int(task.name)
        except OSError:  # it ended
            continue
    return found


def read_terminal(fd: int, text: bytes) -> None:
    seen = b""
    deadline = time.monotonic() + LIMIT_S
    while text not in seen:
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([fd], [], [], 0.1)[0]:
            seen += os.read(fd, 4096)


@pytest.fixture
def emulator(tmp_path: Path) -> Path:
    """What the domain's <emulator> is: a symlink of the name that libvirt asks for its version."""
    program = Path(sys.executable).with_name("trivmm")
    assert program.exists(), "the console script of the installed package"
    link = tmp_path / "cloud-hypervisor"
    link.symlink_to(program)
    return link


def test_the_version_comes_first(emulator: Path) -> None:
    done = subprocess.run([emulator, "--version"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    match = re.match(r"cloud-hypervisor v([0-9]+)\.([0-9]+)(?:\.([0-9]+))?\n", done.stdout)
    assert match
    assert int(match[1]) >= 54
    assert (done.stdout.splitlines()[1].split()[0], done.stderr) == ("trivmm", "")


@pytest.mark.parametrize("chunked", [False, True], ids=["empty upload", "chunked upload"])
def test_a_domains_life(emulator: Path, tmp_path: Path, chunked: bool) -> None:
    path, fifo, image = tmp_path / "dom-socket", tmp_path / "dom-event-monitor-fifo", tmp_path / "d.img"
    image.write_bytes(bytes(1 << 20))
    os.mkfifo(fifo, 0o600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        path.chmod(0o664)
        before = path.stat()
        log = (tmp_path / "dom.log").open("wb")
        process = subprocess.Popen(
            [emulator, "--api-socket", f"fd={listener.fileno()}", "--event-monitor", f"path={fifo}"],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=0o002,
        )
        log.close()
    events = EventReader(fifo)
    try:
        curl = CurlHandle(path, chunked=chunked)
        drive(curl, events, process, image)
        # what came of a shutdown: libvirt ends the process, painfully if it must
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        curl.close()
        events.rest()
    finally:
        process.kill()
        process.wait()
        events.close()
    assert ((tmp_path / "dom.log").read_bytes(), path.stat().st_ino) == (b"", before.st_ino)
    assert path.stat().st_mode == before.st_mode
    assert sorted(os.listdir(tmp_path)) == sorted([emulator.name, image.name, path.name, fifo.name, "dom.log"])
    assert [event for event in events.seen if event[0] != "virtio-device"] == [
        ("vmm", "starting"),
        *[("vm", name) for name in ("booting", "booted", "pausing", "paused", "resuming", "resumed")],
        *[("vm", name) for name in ("rebooting", "rebooted", "shutdown", "deleted")],
        ("vmm", "shutdown"),
    ]


def drive(curl: CurlHandle, events: EventReader, process: subprocess.Popen[bytes], image: Path) -> None:
    events.until("vmm", "starting")
    config = {
        "console": {"mode": "Pty"},
        "serial": {"mode": "Pty"},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": MEMORY},
        "payload": {"kernel": str(probe_path()), "cmdline": probe_cmdline(cpus=2, report=200, mem=8, cycle="rng,blk")},
        "disks": [{"path": str(image)}],
    }
    assert curl.create(config) == 204
    assert curl.put("vm.boot") == 204
    events.until("vm", "booted")
    info = curl.get("vm.info")
    assert info["state"] == "Running"
    terminals = {name: info["config"][name]["file"] for name in ("serial", "console")}
    serial = os.open(terminals["serial"], os.O_RDWR | os.O_NOCTTY)
    console = os.open(terminals["console"], os.O_RDWR | os.O_NOCTTY)
    try:
        assert os.isatty(serial)
        assert os.isatty(console)
        read_terminal(serial, b"PROBE ready cpus=2")
        until(lambda: {"vcpu0", "vcpu1", "_disk0_q0"} <= threads_of(process.pid).keys(), "threads by name")
        vcpu = threads_of(process.pid)["vcpu1"]
        os.sched_setaffinity(vcpu, os.sched_getaffinity(process.pid))  # what a <vcpupin> comes to
        for verb, done, state in (("pause", "paused", "Paused"), ("resume", "resumed", "Running")):
            assert curl.put(f"vm.{verb}") == 204
            events.until("vm", done)
            assert curl.get("vm.info")["state"] == state
        assert curl.put("vm.reboot") == 204
        events.until("vm", "rebooted")
        again = curl.get("vm.info")["config"]
        assert {name: again[name]["file"] for name in terminals} == terminals
        read_terminal(serial, b"PROBE ready cpus=2")
        assert curl.put("vm.power-button") == 204
        assert curl.put("vm.shutdown") == 204
        events.until("vm", "shutdown")
        assert curl.get("vm.info")["state"] == "Created"
    finally:
        os.close(serial)
        os.close(console)


def test_a_domain_that_is_destroyed_while_it_runs(emulator: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle: code 0, the last events told, nothing left."""
    path = tmp_path / "dom-socket"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        command = [emulator, "--api-socket", f"fd={listener.fileno()}", "--event-monitor", f"path={fifo}"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
    events = EventReader(fifo)
    try:
        curl = CurlHandle(path, chunked=False)
        payload = {"kernel": str(probe_path()), "cmdline": probe_cmdline(cpus=1, report=200)}
        assert curl.create({"payload": payload, "memory": {"size": MEMORY}, "serial": {"mode": "Null"}}) == 204
        assert curl.put("vm.boot") == 204
        events.until("vm", "booted")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        events.rest()
        curl.close()
    finally:
        process.kill()
        process.wait()
        events.close()
    assert events.seen[-3:] == [("vm", "shutdown"), ("vm", "deleted"), ("vmm", "shutdown")]
