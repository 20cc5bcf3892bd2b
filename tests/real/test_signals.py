"""Processes that are told to end: what their exit code, their clients, their events and their peer then say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trivmm.config import MemoryConfig, PayloadConfig, VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import CommitRefused, PastCommit
from trivmm.machine.machine import Machine
from trivmm.migration.link.halves import Connection, FrameSender
from trivmm.migration.link.transports import Dialer
from trivmm.migration.source.sender import socket_dialer
from trivmm.migration.wire.frame import HEADER_BYTES, MessageType, parse_header
from trivmm.testing.control import command_environment
from trivmm.testing.fake import fake_hypervisor
from trivmm.testing.plugin import FakeVmm
from trivmm.testing.processes import Receiving, booted, listens, phase, receiving, until
from trivmm.vm import VmState, open_vm
from trivmm.vmm import open_vmm

LIMIT_S = 30
PIPE_BYTES = 1 << 16
WHAT = ("COMMIT has come", "COMMIT was sent")
Start = Callable[..., FakeVmm]


def log_of(fake: FakeVmm) -> str:
    return fake.socket.with_suffix(".log").read_text(errors="replace")


@attrs.define(eq=False)
class Move:
    """A migration between two processes whose source hears no answer to its COMMIT until ``go_on``."""

    source: FakeVmm
    target: FakeVmm
    events: Path
    watcher: subprocess.Popen[str]
    there: Receiving

    def go_on(self) -> None:
        self.source.fail()

    def told(self) -> list[dict[str, Any]]:
        """The source's events."""
        decoder, text, found = json.JSONDecoder(), self.events.read_text().lstrip(), []
        while text:
            event, end = decoder.raw_decode(text)
            found.append(event)
            text = text[end:].lstrip()
        return found

    def outcome(self) -> tuple[int, dict[str, Any], str]:
        """What ``trivmm remote send-migration`` came to: its exit code, its last line, its stderr."""
        out, said = self.watcher.communicate(timeout=LIMIT_S)
        return self.watcher.returncode, json.loads(out.splitlines()[-1]), said


@contextmanager
def committing(start: Start, folder: Path, *options: str, refused: bool = False) -> Iterator[Move]:
    """The block begins in phase COMMIT, which lasts until ``go_on``; ``refused``: the answer will be REFUSED."""
    events = folder / "events"
    limits = ["--deadlines", "commit=20,verdict_read=20", *options]
    faults = ["send-migration=commit:deaf:60s", *["send-migration=commit:refused"] * refused]
    source = booted(start(*faults, options=[*limits, "-v", "--event-monitor", f"path={events}"]))
    target = start(options=["--deadlines", "commit=20"])
    with receiving(target, folder / "m.sock") as there:
        command = [sys.executable, "-m", "trivmm", "remote", "--api-socket", str(source.socket), "send-migration"]
        watcher = subprocess.Popen(
            [*command, f"destination_url={there.url},downtime_ms=5000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=command_environment(),
        )
        try:
            until(lambda: phase(source) == "COMMIT", "no COMMIT")
            yield Move(source, target, events, watcher, there)
        finally:
            watcher.kill()
            watcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_source_told_to_end_after_commit_ends_with_the_verdict(
    fake_vmm: Start, tmp_path: Path, number: signal.Signals
) -> None:
    with committing(fake_vmm, tmp_path) as move:
        move.source.process.send_signal(number)
        until(lambda: f"{number.name}: ending" in log_of(move.source), "the signal was not heard")
        assert phase(move.source) == "COMMIT"
        move.go_on()
        code, last, said = move.outcome()
        assert (code, last["state"], said) == (0, {"Finished": {}}, "")
        assert move.source.process.wait(LIMIT_S) == 0
        assert [event["event"] for event in move.told() if "migration-f" in event["event"]] == ["migration-finished"]
    assert move.there.status == 204
    assert move.target.call("GET", "vm.info")[1]["state"] == "Running"


def test_a_source_told_to_end_whose_commit_is_refused_ends_by_the_signal(fake_vmm: Start, tmp_path: Path) -> None:
    with committing(fake_vmm, tmp_path, refused=True) as move:
        move.source.process.send_signal(signal.SIGINT)
        until(lambda: "SIGINT: ending" in log_of(move.source), "the signal was not heard")
        move.go_on()
        code, last, said = move.outcome()
        assert (code, list(last["state"])) == (1, ["Failed"])
        assert said.startswith("error: the migration failed: ")
        assert move.source.process.wait(LIMIT_S) == 130
        failed = next(event for event in move.told() if event["event"] == "migration-failed")
        assert failed["properties"]["outcome"] == "failed"
    assert move.there.status == 500


def test_waiting_for_a_verdict_is_no_hanging_end_and_doubt_is_exit_code_1(fake_vmm: Start, tmp_path: Path) -> None:
    """The verdict takes ``commit``, much longer than ``shutdown_grace``."""
    with committing(fake_vmm, tmp_path, "--deadlines", "commit=2,shutdown_grace=1") as move:
        move.source.process.terminate()
        code, last, _ = move.outcome()
        assert (code, last["phase"]) == (1, "IN_DOUBT")
        assert move.source.process.wait(LIMIT_S) == 1
        errors = [line for line in log_of(move.source).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert errors[0].startswith(f"error: the migration {last['session']} is in doubt, and the VM here ends: ")
    assert move.there.status == 204


def test_the_watchdog_names_the_migration_that_has_no_verdict(tmp_path: Path) -> None:
    program = """
import time
from trivmm.cli.run import Watchdog
from trivmm.deadlines import Deadlines
watchdog = Watchdog(Deadlines(commit=0.2, shutdown_grace=0.1))
watchdog.start()
with watchdog.waiting_for("the migration 1a2b to unix:/m.sock"):
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, env=command_environment()
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: deadline shutdown_grace (0.1 s) expired, 0.2 s of commit before it: "
        "the migration 1a2b to unix:/m.sock has no verdict; still there: MainThread"
    )


def test_after_commit_nothing_can_be_cancelled_and_the_answer_says_so(fake_vmm: Start, tmp_path: Path) -> None:
    with committing(fake_vmm, tmp_path) as move:
        status, said = move.source.call("PUT", "vm.cancel-migration")
        assert (status, said[:2]) == (500, ["Error from API", "The migration could not be cancelled"])
        assert said[2].startswith("cancel-migration: COMMIT was sent: nothing can be cancelled any more")
        move.go_on()
        assert move.outcome()[:2][1]["state"] == {"Finished": {}}
        assert move.source.process.wait(LIMIT_S) == 0
    assert move.there.status == 204


# --- a destination that is told to end in the moment of COMMIT ---------------------------------------------------


def stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_vmm_shutdown_waits_for_the_verdict_too(fake_vmm: Start, tmp_path: Path) -> None:
    with committing(fake_vmm, tmp_path) as move:
        assert move.source.call("PUT", "vmm.shutdown")[0] == 200
        until(lambda: "waiting for the verdict of the migration" in log_of(move.source), "it does not wait")
        status, said = move.source.call("PUT", "vm.receive-migration", {"receiver_url": f"unix:{tmp_path}/n.sock"})
        assert (status, said[2]) == (500, "receive-migration: the VMM is shutting down (vmm.shutdown)")
        move.go_on()
        assert move.outcome()[1]["state"] == {"Finished": {}}
        assert move.source.process.wait(LIMIT_S) == 0
    assert move.there.status == 204


@attrs.define(eq=False)
class BothAtOnce:
    """What goes out on a connection lets the peer's process see COMMIT and a signal in the same moment."""

    _sender: FrameSender
    _peer: subprocess.Popen[bytes]
    _number: signal.Signals

    async def send(self, data: bytes) -> None:
        if parse_header(data[:HEADER_BYTES]).type is not MessageType.COMMIT:
            return await self._sender.send(data)
        self._peer.send_signal(signal.SIGSTOP)
        until(lambda: stopped(self._peer), "it was not stopped")
        await self._sender.send(data)
        self._peer.send_signal(self._number)
        self._peer.send_signal(signal.SIGCONT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sender, name)


@attrs.frozen
class BothAtOnceDialer:
    _dialer: Dialer
    _peer: subprocess.Popen[bytes]
    _number: signal.Signals
    transport: str = "unix"

    async def dial(self) -> Connection:
        real = await self._dialer.dial()
        sender: Any = BothAtOnce(real.sender, self._peer, self._number)
        return attrs.evolve(real, sender=sender)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_destination_told_to_end_refuses_a_commit_that_comes_in_that_moment(
    fake_vmm: Start, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    config = VmConfig(PayloadConfig("scripted"), memory=MemoryConfig(16 << 20), deadlines=Deadlines(commit=20))

    def receive(target: FakeVmm, url: str, answers: list[int]) -> None:
        answers.append(target.call("PUT", "vm.receive-migration", {"receiver_url": url})[0])

    async with open_vm(config, hypervisor=fake_hypervisor()) as vm:
        await vm.boot()
        for trial in range(3):
            target = fake_vmm()
            path, answers = tmp_path / f"m{trial}.sock", list[int]()

            def dial(url: str, deadlines: Deadlines, target: FakeVmm = target) -> Dialer:
                return BothAtOnceDialer(socket_dialer(url, deadlines), target.process, number)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, receive, target, f"unix:{path}", answers)
                await trio.to_thread.run_sync(until, partial(listens, path), "it does not listen")
                with pytest.raises(
                    CommitRefused, match=r"shutting down|was cancelled"
                ):  # REFUSED, or an ABORT that crossed COMMIT
                    await vm.migrate_to(f"unix:{path}", downtime_ms=5000, dial=dial)
            assert vm.state is VmState.RUNNING
            assert answers == [500]
            assert await trio.to_thread.run_sync(target.process.wait, LIMIT_S) == code


async def test_neither_side_can_cancel_a_migration_past_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"unix:{tmp_path}/m.sock"
    config = VmConfig(PayloadConfig("scripted"), memory=MemoryConfig(16 << 20))
    said: list[str] = []
    take_locks = Machine.take_locks

    async def cancelled_meanwhile(self: Machine) -> None:
        for cancel in (vmm.cancel_migration, vm.cancel_migration):
            with pytest.raises(PastCommit) as caught:
                cancel()
            said.append(str(caught.value))
        await take_locks(self)

    monkeypatch.setattr(Machine, "take_locks", cancelled_meanwhile)
    with trio.fail_after(LIMIT_S):
        async with open_vmm(fake_hypervisor()) as vmm, open_vm(config, hypervisor=fake_hypervisor()) as vm:
            await vm.boot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vmm.receive_migration, url)
                await trio.to_thread.run_sync(until, partial(listens, tmp_path / "m.sock"), "it does not listen")
                await vm.migrate_to(url, downtime_ms=5000)
            assert vmm.vm.state is VmState.RUNNING
    assert said == [
        f"cancel-migration: {what}: nothing can be cancelled any more; wait for the verdict" for what in WHAT
    ]


# --- a process that ends already ------------------------------------------------------------------------------------


@contextmanager
def full_fifo(path: Path) -> Iterator[None]:
    """One that nobody reads and nothing more goes into: who writes its last events there takes ``drain``."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        for size in (PIPE_BYTES, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(fd, bytes(size))
        yield
    finally:
        os.close(fd)


def test_a_signal_does_not_change_an_exit_code_that_is_known(fake_vmm: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    with full_fifo(fifo):
        fake = fake_vmm(options=["--deadlines", "drain=1", "--event-monitor", f"path={fifo}"])
        assert fake.call("PUT", "vmm.shutdown")[0] == 200
        until(lambda: not fake.socket.exists(), "its end has not begun")
        fake.process.send_signal(signal.SIGINT)
        assert fake.process.wait(LIMIT_S) == 0


def test_a_signal_does_not_change_the_exit_code_of_a_mistake(tmp_path: Path) -> None:
    fifo, log = tmp_path / "fifo", tmp_path / "log"
    command = [sys.executable, "-m", "trivmm", "-vv", "--kernel", "missing", "--log-file", str(log)]
    command += ["--hypervisor", "soft", "--deadlines", "drain=1", "--event-monitor", f"path={fifo}"]
    with full_fifo(fifo):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=command_environment())
        try:
            until(lambda: log.exists() and "vmm shutdown" in log.read_text(), "its end has not begun")
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 2
        finally:
            process.kill()
            process.wait()


# --- Ctrl-C before anything has begun -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("trivmm.errors", ["--api-socket", "path=a.sock"]),
        ("attr._make", ["--api-socket", "path=a.sock"]),
        ("trio._core._run", ["--api-socket", "path=a.sock"]),
        ("trivmm.config", ["fake", "--api-socket", "path=a.sock"]),
        ("trivmm.cli.parser", ["demo"]),
        ("trio._core._run", ["demo"]),
        ("trivmm.errors", ["doctor"]),
    ],
)
def test_ctrl_c_while_python_imports_is_no_traceback(tmp_path: Path, module: str, arguments: list[str]) -> None:
    """``-X importtime`` tells of each module as its import ends: the signal comes in the middle of the next ones."""
    command = [sys.executable, "-X", "importtime", "-m", "trivmm", *arguments]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=command_environment(),
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                break
        else:
            pytest.fail(f"{module} is not imported")
        process.send_signal(signal.SIGINT)
        leash = threading.Timer(LIMIT_S, process.kill)
        leash.start()
        said = process.stderr.read()
        leash.cancel()
        assert process.wait(LIMIT_S) == 130
    finally:
        process.kill()
        process.communicate()
    assert [line for line in said.splitlines() if not line.startswith("import time:")] == []
    assert os.listdir(tmp_path) == []
