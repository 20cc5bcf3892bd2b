"""``trivmm demo`` that is told to end, or killed, at every stage of its start: what is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trivmm.testing.control import command_environment
from trivmm.testing.processes import until

LIMIT_S = 30


def children_of(pid: int) -> list[int]:
    return [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]


def commands_of(pids: list[int]) -> list[bytes]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return [command for command in found if command]  # one that nobody waits for has none


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that goes on until something happens to it, with its files in ``folder``."""
    command = [sys.executable, "-m", "trivmm", "demo", "--hypervisor", "soft", "--memory", "64M", "--moves", "1000"]
    environment = {**command_environment(), "TMPDIR": str(folder)}
    out = subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def served(folder: Path) -> list[Path]:
    return list(folder.glob("trivmm-demo-*/?.sock"))


STAGES: dict[str, Callable[[Path, subprocess.Popen[str]], object]] = {
    "its folder is there": lambda folder, process: list(folder.glob("trivmm-demo-*")),
    "one process starts": lambda folder, process: children_of(process.pid),
    "both processes serve": lambda folder, process: len(served(folder)) == 2,
    "the guest has begun": lambda folder, process: list(folder.glob("trivmm-demo-*/serial.txt")),
}


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("its folder is there", signal.SIGTERM, 143),
        ("one process starts", signal.SIGINT, 130),
        ("both processes serve", signal.SIGTERM, 143),
        ("the guest has begun", signal.SIGINT, 130),
    ],
)
def test_a_demo_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, stage: str, number: signal.Signals, code: int
) -> None:
    with demo(tmp_path) as process:
        until(lambda: STAGES[stage](tmp_path, process), f"never: {stage}")
        children = children_of(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, said) == (code, "")
    assert commands_of(children) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stage", ["one process starts", "both processes serve"])
def test_the_processes_of_a_demo_that_is_killed_end_by_themselves(tmp_path: Path, stage: str) -> None:
    with demo(tmp_path) as process:
        until(lambda: STAGES[stage](tmp_path, process), f"never: {stage}")
        children = children_of(process.pid)
        assert children
        process.kill()
        process.wait(LIMIT_S)
        until(lambda: not commands_of(children), "they live on")
        assert served(tmp_path) == []
