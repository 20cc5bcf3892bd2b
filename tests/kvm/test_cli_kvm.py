"""The command line with a real guest: its ends and their exit codes, the terminal, and moves by ch-remote's client."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.control import ch_remote, command_environment
from trivmm.testing.kernels import make_pvh

pytestmark = pytest.mark.kvm

LIMIT_S = 90
TRIVMM = [sys.executable, "-m", "trivmm"]


def guest_options(**words: object) -> list[str]:
    line = probe_cmdline(cpus=1, report=200, **words)
    return ["--kernel", str(probe_path()), "--cmdline", line, "--memory", "size=64M", "--cpus", "boot=1"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TRIVMM, *arguments, "--hypervisor", "kvm"],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Other processes tell us nothing but by their files and sockets: look until it is so, bounded."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if what():
            return
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def report_of(folder: Path) -> ProbeReport:
    path = folder / "out.txt"
    return parse_report(path.read_text(errors="replace")) if path.exists() else ProbeReport()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_running_guest(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "d.img").write_bytes(bytes(1 << 20))
    options = ["--disk", "path=d.img", "--serial", "file=out.txt", "--console", "off", "--api-socket", "path=a.sock"]
    process = start(tmp_path, *guest_options(cycle="rng,blk"), *options)
    try:
        until(lambda: report_of(tmp_path).rng_act, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (code, "")
    assert sorted(os.listdir(tmp_path)) == ["d.img", "out.txt"]


def test_the_guests_power_off_is_exit_code_0(tmp_path: Path) -> None:
    process = start(tmp_path, *guest_options(cycle="rng", once=3), "--serial", "tty")
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert "PROBE off" in out


def crashing_kernel() -> bytes:
    """A PVH ELF whose first instruction is ud2, with no IDT to take it: a triple fault."""
    return make_pvh(bytes.fromhex("0f0b"))


def test_a_crash_has_its_own_exit_code_and_a_diagnosis(tmp_path: Path) -> None:
    (tmp_path / "crash.elf").write_bytes(crashing_kernel())
    process = start(tmp_path, "--kernel", "crash.elf", "--memory", "size=64M", "--api-socket", "path=a.sock")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3
    assert "error: the guest crashed: vcpu0: triple fault" in err
    assert "rip=0x100000" in err
    assert "0f 0b" in err
    assert os.listdir(tmp_path) == ["crash.elf"]


def test_a_signal_while_a_crash_is_told_does_not_change_its_exit_code(tmp_path: Path) -> None:
    """The end takes ``drain``: the monitor's events go into a FIFO that is full."""
    (tmp_path / "crash.elf").write_bytes(crashing_kernel())
    fifo, log = tmp_path / "fifo", tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        while True:
            try:
                os.write(reader, b"\0")
            except BlockingIOError:
                break
        options = ["--deadlines", "drain=1", "--event-monitor", "path=fifo", "-v", "--log-file", "log"]
        process = start(tmp_path, "--kernel", "crash.elf", "--memory", "size=64M", *options)
        try:
            until(lambda: log.exists() and "vmm shutdown" in log.read_text(), process)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
            process.communicate()
    finally:
        os.close(reader)
    assert process.returncode == 3
    assert "error: the guest crashed: vcpu0: triple fault" in err


class Terminal:
    """A person at a terminal of their own, in which a VMM runs; ``script`` is a shell's that starts it as "$@"."""

    def __init__(self, folder: Path, *arguments: str, script: str = 'exec "$@"') -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            command = ["sh", "-c", script, "sh", *TRIVMM, *arguments, "--hypervisor", "kvm"]
            os.execve("/bin/sh", command, command_environment())
        self.before = termios.tcgetattr(self.fd)
        self.seen = b""
        self.deadline = time.monotonic() + LIMIT_S

    def look(self) -> bool:
        """Read what is there, for a while; False at the end, when the last process with this terminal is gone."""
        assert time.monotonic() < self.deadline, self.seen[-2000:]
        if select.select([self.fd], [], [], 0.1)[0]:
            try:
                self.seen += os.read(self.fd, 4096)
            except OSError:  # EIO
                return False
        return True

    def until(self, text: bytes) -> None:
        while text not in self.seen:
            assert self.look(), self.seen

    def type(self, data: bytes) -> None:
        assert os.write(self.fd, data) == len(data)

    def end(self) -> int:
        """Wait for its end; gives the exit code. The terminal is as it was."""
        while self.look():
            pass
        assert termios.tcgetattr(self.fd) == self.before
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


NOTICE = b"the guest has this terminal; Ctrl-A x ends the VMM"


@pytest.mark.parametrize("options", [["--serial", "tty"], []], ids=["said", "default"])
def test_the_terminal_is_raw_for_the_guest_and_restored(tmp_path: Path, options: list[str]) -> None:
    with Terminal(tmp_path, *guest_options(), *options) as terminal:
        terminal.until(b"PROBE t=")
        assert not termios.tcgetattr(terminal.fd)[3] & (termios.ICANON | termios.ECHO)
        terminal.type(b"q")
        assert terminal.end() == 0
        assert b"PROBE off" in terminal.seen
        assert terminal.seen.count(NOTICE) == 1


def test_a_session_at_a_terminal(tmp_path: Path) -> None:
    """What is typed is the guest's, Ctrl-C, Ctrl-Z and Ctrl-\\ too; the escape leaves; the terminal is as it was."""
    with Terminal(tmp_path, *guest_options(keys=1), "--serial", "tty") as terminal:
        terminal.until(b"PROBE t=")
        for typed, shown in ((b"hello", b"hello"), (b"\x03", b"^C"), (b"\x1a\x1c", b"^Z^\\"), (b"\x01\x01", b"^A")):
            seen = len(terminal.seen)
            terminal.type(typed)
            while b"".join(re.findall(rb"TYPED (.*?)\r?\n", terminal.seen[seen:])) != shown:
                assert terminal.look(), terminal.seen
        terminal.type(b"\x01x")
        assert terminal.end() == 0
        assert b"Traceback" not in terminal.seen


def test_ctrl_a_x_leaves(tmp_path: Path) -> None:
    with Terminal(tmp_path, *guest_options(), "--serial", "tty", "--api-socket", "path=a.sock") as terminal:
        terminal.until(b"PROBE t=")
        terminal.type(b"\x01")
        terminal.type(b"x")
        assert terminal.end() == 0
        assert b"PROBE off" not in terminal.seen
        assert os.listdir(tmp_path) == []


def test_ctrl_a_x_leaves_a_guest_that_reads_nothing(tmp_path: Path) -> None:
    """Its 4 KiB are full, and more waits in the terminal before the two keys. (It looks for one key a report.)"""
    with Terminal(tmp_path, *guest_options(), "--deadlines", "typing=0.1") as terminal:
        terminal.until(b"PROBE t=")
        for _ in range(8):
            terminal.type(b"z" * 1024)
        terminal.type(b"\x01x")
        assert terminal.end() == 0
        assert b"what is typed is dropped until it does" in terminal.seen


def test_in_the_background_it_shows_what_the_guest_says_and_is_not_stopped(tmp_path: Path) -> None:
    """A terminal stops a background job that reads it or makes it raw."""
    options = guest_options(cycle="rng", once=3)
    with Terminal(tmp_path, *options, script='set -m; "$@" & wait $!; echo "ended with $?"') as terminal:
        assert terminal.end() == 0
        assert b"PROBE off" in terminal.seen
        assert b"ended with 0" in terminal.seen
        assert NOTICE not in terminal.seen


def test_a_virtio_console_on_the_terminal(tmp_path: Path) -> None:
    """It is typed on, Ctrl-A too, and follows the terminal's size; the serial port is elsewhere."""
    options = [*guest_options(echo=1), "--console", "tty,id=con0", "--serial", "file=out.txt"]
    with Terminal(tmp_path, *options) as terminal:
        terminal.until(NOTICE)
        terminal.type(b"typed \x01\x01 and \x01b\r")
        terminal.until(b"typed \x01 and \x01b\r")
        for columns, rows in ((101, 37), (90, 30)):
            fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))
            while (report_of(tmp_path).cols, report_of(tmp_path).rows) != (columns, rows):
                assert terminal.look()
        terminal.type(b"\x01x")
        assert terminal.end() == 0
        assert report_of(tmp_path).problems == ()


def test_one_terminal_has_one_reader(tmp_path: Path) -> None:
    with Terminal(tmp_path, *guest_options(), "--serial", "tty", "--console", "tty") as terminal:
        assert terminal.end() == 2
        said = b'error: --console = "tty": the serial port reads the terminal; give one of them another mode'
        assert terminal.seen.strip() == said
    process = start(tmp_path, *guest_options(cycle="rng", once=3, echo=1), "--serial", "tty", "--console", "tty")
    out, err = process.communicate(timeout=LIMIT_S)  # nobody reads: both may show what they say
    assert (process.returncode, err) == (0, "")
    assert "PROBE off" in out


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_there_and_back_by_ch_remotes_client(tmp_path: Path, transport: str) -> None:
    """Each source exits 0 when its VM has left, as Cloud Hypervisor's does; the guest lost nothing."""
    (tmp_path / "d.img").write_bytes(bytes(8 << 20))
    limits = ["--deadlines", "pause=10,quiesce=5,downtime=5"]

    def ask(number: int, method: str, command: str, **body: object) -> object:
        text = json.dumps(body) if body else None
        found = ch_remote(str(tmp_path / f"{number}.sock"), method, command, text)
        return json.loads(found) if found else None

    def url_of(number: int) -> str:
        return f"unix:{tmp_path}/move{number}.sock" if transport == "unix" else f"tcp:127.0.0.1:{_free_port()}"

    def serve(number: int, *options: str) -> subprocess.Popen[str]:
        process = start(tmp_path, "--api-socket", f"path={number}.sock", *limits, *options)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        until(lambda: _answers(lambda: ask(number, "GET", "vmm.ping")), process)
        return process

    with ExitStack() as stack:
        options = [*guest_options(cycle="rng,blk", rate=200), "--disk", "path=d.img", "--serial", "file=out.txt"]
        source = serve(0, *options)
        until(lambda: report_of(tmp_path).rng_act, source)
        for number in (1, 2):
            target = serve(number)
            url = url_of(number)
            failures: list[Exception] = []

            def receive(number: int = number, url: str = url, failures: list[Exception] = failures) -> None:
                try:
                    ask(number, "PUT", "vm.receive-migration", receiver_url=url)
                except Exception as error:
                    failures.append(error)

            receiving = threading.Thread(target=receive)
            receiving.start()
            until(lambda number=number: _in_the_middle(lambda: ask(number, "PUT", "vm.boot")), target)
            until(lambda url=url: _listens(url), target)
            ask(number - 1, "PUT", "vm.send-migration", destination_url=url, downtime_ms=5000)
            receiving.join(timeout=LIMIT_S)
            assert failures == []
            assert source.wait(timeout=LIMIT_S) == 0
            info = ask(number, "GET", "vm.info")
            assert isinstance(info, dict)
            assert info["state"] == "Running"
            before = report_of(tmp_path)
            until(lambda before=before: report_of(tmp_path).rng_act > before.rng_act, target)
            source = target
        report = report_of(tmp_path)
        assert (report.errors, report.stuck, report.problems) == (0, 0, ())
        ask(2, "PUT", "vmm.shutdown")
        assert source.wait(timeout=LIMIT_S) == 0
    assert sorted(os.listdir(tmp_path)) == ["d.img", "out.txt"]


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def _in_the_middle(call: Callable[[], object]) -> bool:
    """The receiver has taken the request: another is refused."""
    try:
        call()
    except Exception as error:
        return "in the middle" in str(error)
    return False


def _listens(url: str) -> bool:
    kind, _, where = url.partition(":")
    if kind == "unix":
        return Path(where).exists()
    port = int(where.rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
