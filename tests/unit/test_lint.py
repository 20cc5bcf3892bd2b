"""The house rules that tools can check: ruff, flake8-async (finds more than ruff's ASYNC rules), mypy --strict, and
the floors of docs/architecture.md (import-linter, the ``layers`` in pyproject.toml)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trivmm

ROOT = Path(__file__).parents[2]
CODE = [
    str(path) for name in ("trivmm", "tests", "benchmarks", "examples", "ffi") for path in ROOT.glob(f"{name}/**/*.py")
]
FLAKE8_ASYNC = [
    # 111: a receiver's questions outlive it on purpose, so its nursery is outside. 124: a protocol's methods are
    # async, awaiting or not. 127: httpx is what users have. 9xx (optional rules): checkpoints are where they matter.
    "--disable=ASYNC111,ASYNC124,ASYNC127,ASYNC900,ASYNC910,ASYNC911,ASYNC912,ASYNC913",
    "--startable-in-context-manager=run,host,first,hold,_send,_serve,_machine_task",
]

COMMANDS = {
    "ruff check": ["ruff", "check", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--no-cache", "--check", "."],
    "flake8-async": ["flake8_async", *FLAKE8_ASYNC, *CODE],
    "mypy": ["mypy", "--cache-dir", "CACHE", "--config-file", str(ROOT / "pyproject.toml"), "-p", "trivmm"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "flake8-async" else ()) for name in COMMANDS]
)
def test_clean(name: str, tmp_path: Path) -> None:
    words = [str(tmp_path) if word == "CACHE" else word for word in COMMANDS[name]]
    # mypy reads the installed package, so it must not run where the source tree shadows it. It can't follow the import
    # hook of an editable install, which is the source tree.
    where = tmp_path if name == "mypy" else ROOT
    editable = Path(trivmm.__file__).parents[1] == ROOT
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words],
        cwd=where,
        env={**os.environ, "MYPYPATH": str(ROOT)} if editable else None,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_runs_up(tmp_path: Path) -> None:
    """``TYPE_CHECKING`` imports count, and there is no list of exceptions."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
