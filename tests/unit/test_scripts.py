"""Benchmarks and examples name what there is: nothing else runs them when something they use moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.skipif(not SCRIPTS, reason="no source tree around")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_its_imports_are_there(script: Path) -> None:
    """In a process of its own, and in its folder, as it is run."""
    code = f"import runpy, sys; sys.path.insert(0, '.'); runpy.run_path({script.name!r}, run_name='imported')"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


SHELL = sorted((ROOT / "examples").glob("*.sh")) + sorted((ROOT / "trivmm/image/files").glob("*"))


@pytest.mark.parametrize(
    "script", [path for path in SHELL if path.read_bytes().startswith(b"#!")], ids=lambda path: path.name
)
def test_a_shell_script_can_be_read(script: Path) -> None:
    shell = script.read_text().splitlines()[0].split("/")[-1].split()[-1]
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
