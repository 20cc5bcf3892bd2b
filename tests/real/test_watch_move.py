"""Watching a migration from outside: ``trivmm remote send-migration`` on and off a terminal, and the example script."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from trivmm.testing.control import command_environment
from trivmm.testing.plugin import FakeVmm
from trivmm.testing.processes import booted, phase, receiving, state, until

LIMIT_S = 30
EXAMPLE = Path(__file__).parents[2] / "examples" / "watch_move.py"
Start = Callable[..., FakeVmm]


def send(source: FakeVmm, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "trivmm", "remote", "--api-socket", str(source.socket), "send-migration", *arguments]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=command_environment(), check=False
    )


def test_off_a_terminal_it_is_lines_of_json(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=precopy:stall:300ms"))
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        done = run(send(source, f"destination_url={there.url},downtime_ms=2000"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["state"] == {"Finished": {}}
    assert {"PRECOPY", "DONE"} <= {line["phase"] for line in lines}


def test_a_failure_is_exit_code_1_with_its_reason_and_the_source_runs(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=switchover:lost"))
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        done = run(send(source, there.url))
    assert done.returncode == 1
    assert done.stderr.startswith("error: the migration failed: ")
    assert "as --fail asked" in done.stderr
    assert state(source) == "Running"


def test_what_is_not_accepted_is_told_at_once(fake_vmm: Start) -> None:
    done = run(send(fake_vmm(), "unix:/nowhere"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Error from API: Error dispatching the migration worker: ")


def test_ctrl_c_cancels_and_the_source_runs(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=precopy:stall:60s"))
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        process = subprocess.Popen(
            send(source, there.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=command_environment(),
        )
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["phase"] == "PRECOPY":
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert said.startswith("error: the migration cancelled")
    assert state(source) == "Running"


def test_detached_it_returns_at_once(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=precopy:stall:60s"))
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        done = run(send(source, "--detach", there.url))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert "Ongoing" in source.call("GET", "vm.migration-progress")[1]["state"]
        assert source.call("PUT", "vm.cancel-migration")[0] == 204


def test_on_a_terminal_a_line_is_drawn(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=precopy:stall:500ms"))
    ours, theirs = pty.openpty()
    try:
        with receiving(fake_vmm(), tmp_path / "m.sock") as there:
            process = subprocess.Popen(
                send(source, f"destination_url={there.url},downtime_ms=2000"),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                env=command_environment(),
            )
            assert process.wait(LIMIT_S) == 0
        drawn = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert "\r\x1b[Kprecopy" in drawn
    assert "MiB left" in drawn
    assert "activations" in drawn
    assert drawn.rstrip().splitlines()[-1].startswith("moved: ")


def test_the_example_prints_a_line_a_round(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm())
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        done = run([sys.executable, "-I", "-S", str(EXAMPLE), str(source.socket), there.url])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("round 1: ")
    assert done.stdout.splitlines()[-1].startswith("moved in ")


def test_the_example_tells_of_a_peer_that_dies(fake_vmm: Start, tmp_path: Path) -> None:
    source, target = booted(fake_vmm("send-migration=precopy:stall:5s")), fake_vmm()
    with receiving(target, tmp_path / "m.sock") as there:
        command = [sys.executable, "-I", "-S", str(EXAMPLE), str(source.socket), there.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        until(lambda: phase(source) == "PRECOPY", "it does not begin")
        target.process.kill()
        said, _ = process.communicate(timeout=90)
    assert there.status is None
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("failed: ")
    assert state(source) == "Running"
