"""The house rules that tools can check: ruff, flake8-async (finds more than ruff's ASYNC rules), mypy --strict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ["trivmm", "tests", "benchmarks", "examples", "ffi"]

COMMANDS = {
    "ruff check": ["ruff", "check", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--no-cache", "--check", "."],
    "flake8-async": ["flake8_async", *CODE],
    "mypy": ["mypy", "--cache-dir", "CACHE", "--config-file", str(ROOT / "pyproject.toml"), "-p", "trivmm"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_clean(name: str, tmp_path: Path) -> None:
    words = [str(tmp_path) if word == "CACHE" else word for word in COMMANDS[name]]
    # mypy reads the installed package, so it must not run where the source tree shadows it
    where = tmp_path if name == "mypy" else ROOT
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words], cwd=where, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
