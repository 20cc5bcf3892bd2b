"""``--event-monitor`` and the event streams of real processes: nobody is waited for, and the last event always comes.

``trivmm fake`` is the VMM: everything but the CPU is the real one's.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final

import pytest

from trivmm.events import CAPACITY
from trivmm.testing.control import command_environment
from trivmm.testing.plugin import FakeVmm

LIMIT_S: Final = 60
VM: Final = {"payload": {"kernel": "none is looked for"}, "memory": {"size": 32 << 20}}
PIPE_BYTES: Final = 4096  # the least that Linux gives a FIFO
BOOTED: Final = [("vmm", "starting"), ("vm", "booting"), ("vm", "booted")]
ENDED: Final = [("vm", "shutdown"), ("vm", "deleted"), ("vmm", "shutdown")]
Start = Callable[..., FakeVmm]


def boot(fake: FakeVmm) -> None:
    assert fake.call("PUT", "vm.create", VM) == (204, None)
    assert fake.call("PUT", "vm.boot") == (204, None)


def parsed(text: bytes) -> list[dict[str, Any]]:
    """Objects with an empty line after each."""
    assert text.endswith(b"}\n\n")
    return [json.loads(piece) for piece in text.decode().split("\n\n") if piece]


def names(events: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["source"], event["event"]) for event in events]


def read_to_end(fd: int) -> bytes:
    os.set_blocking(fd, True)
    found = b""
    while piece := os.read(fd, 65536):
        found += piece
    return found


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "events"
    os.mkfifo(path)
    return path


def test_a_fifo_without_a_reader_is_not_waited_for_and_its_first_reader_finds_everything(
    fake_vmm: Start, fifo: Path
) -> None:
    fake = fake_vmm(options=["--event-monitor", f"path={fifo}"])
    boot(fake)
    assert fake.call("PUT", "vm.pause") == (204, None)
    reader = os.open(fifo, os.O_RDONLY)
    try:
        assert fake.call("PUT", "vm.resume") == (204, None)
        fake.process.send_signal(signal.SIGTERM)
        seen = names(parsed(read_to_end(reader)))
    finally:
        os.close(reader)
    assert fake.process.wait(LIMIT_S) == 0
    verbs = [("vm", name) for name in ("pausing", "paused", "resuming", "resumed")]
    assert seen == [*BOOTED, *verbs, *ENDED]


def test_a_reader_that_goes_away_is_no_end_and_the_next_one_goes_on(fake_vmm: Start, fifo: Path) -> None:
    fake = fake_vmm(options=["--event-monitor", f"path={fifo}"])
    first = os.open(fifo, os.O_RDONLY)
    boot(fake)
    start = b""
    while not (start.endswith(b"\n\n") and names(parsed(start)) == BOOTED):
        start += os.read(first, 4096)
    os.close(first)
    assert fake.call("PUT", "vm.resize", {}) == (204, None)
    second = os.open(fifo, os.O_RDONLY)
    try:
        fake.process.send_signal(signal.SIGTERM)
        rest = names(parsed(read_to_end(second)))
    finally:
        os.close(second)
    assert rest == [("vm", "resizing"), ("vm", "resized"), *ENDED]
    assert fake.process.wait(LIMIT_S) == 0


def test_a_reader_that_stops_holds_nobody_up_and_is_told_what_it_missed(fake_vmm: Start, fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        fake = fake_vmm(options=["--event-monitor", f"path={fifo}"])
        boot(fake)
        resizes = CAPACITY // 2 + 100  # two events each: more than the bus keeps and the FIFO holds
        for _ in range(resizes):
            assert fake.call("PUT", "vm.resize", {}) == (204, None)
        fake.process.send_signal(signal.SIGTERM)
        events = parsed(read_to_end(reader))
    finally:
        os.close(reader)
    assert fake.process.wait(LIMIT_S) == 0
    dropped = [int(event["properties"]["count"]) for event in events if event["event"] == "events-dropped"]
    assert sum(dropped) > 0
    assert len(events) - len(dropped) + sum(dropped) == len(BOOTED) + 2 * resizes + len(ENDED)
    assert names(events)[:3] == BOOTED
    assert names(events)[-1] == ENDED[-1]


def test_a_reader_that_never_goes_on_does_not_keep_the_process(fake_vmm: Start, fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        fake = fake_vmm(options=["--event-monitor", f"path={fifo}", "--deadlines", "drain=0.2"])
        boot(fake)
        for _ in range(PIPE_BYTES // 100):
            assert fake.call("PUT", "vm.resize", {}) == (204, None)
        fake.process.send_signal(signal.SIGTERM)
        assert fake.process.wait(LIMIT_S) == 0
    finally:
        os.close(reader)


def by_signal(number: signal.Signals) -> Callable[[FakeVmm], None]:
    return lambda fake: fake.process.send_signal(number)


ENDS: Final = {
    "SIGTERM": (by_signal(signal.SIGTERM), 0),
    "SIGHUP": (by_signal(signal.SIGHUP), 0),
    "SIGINT": (by_signal(signal.SIGINT), 130),
    "vmm.shutdown": (lambda fake: fake.call("PUT", "vmm.shutdown"), 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_file_has_everything_whatever_ended_the_process(fake_vmm: Start, tmp_path: Path, end: str) -> None:
    file, (ends, code) = tmp_path / "events.json", ENDS[end]
    file.write_text("of a run before " * 1000)
    fake = fake_vmm(options=["--event-monitor", f"path={file}"])
    boot(fake)
    ends(fake)
    assert fake.process.wait(LIMIT_S) == code
    events = parsed(file.read_bytes())
    assert names(events) == [*BOOTED, *ENDED]
    assert all(set(event) == {"timestamp", "source", "event", "properties"} for event in events)
    times = [event["timestamp"]["secs"] + event["timestamp"]["nanos"] / 1e9 for event in events]
    assert times == sorted(times)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_an_inherited_descriptor(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "pipe":
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
        else:
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            reading, writing = ours.fileno(), theirs.detach()
        path = tmp_path / "api.sock"
        command = [sys.executable, "-m", "trivmm", "fake", "--api-socket", f"path={path}"]
        process = subprocess.Popen(
            [*command, "--event-monitor", f"fd={writing}"],
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            env=command_environment(),
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.close(writing)
        first = b""
        while not first.endswith(b"}\n\n"):
            piece = os.read(reading, 4096)
            assert piece, "the VMM did not start"
            first += piece
        assert names(parsed(first)) == BOOTED[:1]
        boot(FakeVmm(path, process))  # serves before it tells that it starts
        process.send_signal(signal.SIGTERM)
        assert names(parsed(read_to_end(reading))) == [*BOOTED[1:], *ENDED]
        assert process.wait(LIMIT_S) == 0


# --- server-sent events --------------------------------------------------------------------------------------------


class Lines:
    """Lines of a stream, read in a thread; None is its end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._stream:
                self._lines.put(line)
        finally:
            self._lines.put(None)

    def after_nudging(self, fake: FakeVmm) -> None:
        """Until the stream has begun: an event that comes through shows it."""
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            assert fake.call("PUT", "vm.resize", {}) == (204, None)
            try:
                assert self._lines.get(timeout=0.1) is not None
            except queue.Empty:
                continue
            return
        raise AssertionError("no event came")

    def __iter__(self) -> Iterator[bytes]:
        while (line := self._lines.get(timeout=LIMIT_S)) is not None:
            yield line

    def close(self) -> None:
        self._thread.join(LIMIT_S)
        self._stream.close()


def after_resizing(events: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    return [name for name in names(events) if name[1] not in ("resizing", "resized")]


@pytest.mark.parametrize("end", ["SIGTERM", "vmm.shutdown"])
def test_remote_events_prints_a_line_each_up_to_the_last_one(fake_vmm: Start, end: str) -> None:
    fake = fake_vmm()
    boot(fake)
    command = [sys.executable, "-m", "trivmm", "remote", "--api-socket", str(fake.socket), "events"]
    remote = subprocess.Popen(command, stdout=subprocess.PIPE, env=command_environment())
    assert remote.stdout is not None
    lines = Lines(remote.stdout)
    try:
        lines.after_nudging(fake)
        assert fake.call("PUT", "vm.pause") == (204, None)
        ENDS[end][0](fake)
        seen = after_resizing(map(json.loads, lines))
        assert remote.wait(LIMIT_S) == 0
    finally:
        remote.kill()
        remote.wait()
        lines.close()
    assert seen == [("vm", "pausing"), ("vm", "paused"), *ENDED]
    assert fake.process.wait(LIMIT_S) == 0


def test_a_plain_client_reads_server_sent_events_up_to_the_last_one(fake_vmm: Start) -> None:
    fake = fake_vmm()
    boot(fake)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(fake.socket))
        sock.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
        stream = sock.makefile("rb")
        head = [stream.readline() for _ in range(6)]
        assert head[0] == b"HTTP/1.1 200 \r\n"
        assert b"Content-Type: text/event-stream\r\n" in head
        assert head[-1] == b"\r\n"
        lines = Lines(stream)
        try:
            lines.after_nudging(fake)
            assert fake.call("PUT", "vm.reboot") == (204, None)
            fake.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        finally:
            lines.close()
    assert {line.partition(b" ")[0] for line in rest} <= {b"data:", b"\n", b":"}
    events = [json.loads(line.removeprefix(b"data: ")) for line in rest if line.startswith(b"data: ")]
    assert after_resizing(events) == [("vm", "rebooting"), ("vm", "rebooted"), *ENDED]
    assert fake.process.wait(LIMIT_S) == 0
