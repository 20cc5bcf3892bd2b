"""The command line with a real guest: its ends and their exit codes, the terminal, and moves by ch-remote's client."""

from __future__ import annotations

import json
import os
import pty
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
    gpa, code = 1 << 20, bytes.fromhex("0f0b")
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", gpa)
    start_at = 64 + 2 * 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, gpa, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, start_at, gpa, gpa, len(code), 4096, 4096)
    header += struct.pack("<IIQQQQQQ", 4, 4, start_at + len(code), 0, 0, len(note), len(note), 4)
    return header + code + note


def test_a_crash_has_its_own_exit_code_and_a_diagnosis(tmp_path: Path) -> None:
    (tmp_path / "crash.elf").write_bytes(crashing_kernel())
    process = start(tmp_path, "--kernel", "crash.elf", "--memory", "size=64M", "--api-socket", "path=a.sock")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 3
    assert "error: the guest crashed: vcpu0: triple fault" in err
    assert "rip=0x100000" in err
    assert "0f 0b" in err
    assert os.listdir(tmp_path) == ["crash.elf"]


def test_the_terminal_is_raw_for_the_guest_and_restored(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = [*TRIVMM, *guest_options(), "--serial", "tty", "--hypervisor", "kvm"]
        os.execve(sys.executable, command, command_environment())
    before, out, typed = termios.tcgetattr(terminal), b"", False
    deadline = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    out += os.read(terminal, 4096)
                except OSError:  # EIO: the last process with this terminal is gone
                    break
            if b"PROBE t=" in out and not typed:
                assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO)
                os.write(terminal, b"q")
                typed = True
        assert termios.tcgetattr(terminal) == before
        assert b"PROBE off" in out
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


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
