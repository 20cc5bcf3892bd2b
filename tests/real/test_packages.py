"""The packages as a stranger gets them: an sdist, a wheel built from it, and what that wheel does in a clean venv.

Needs a package index, for setuptools and the dependencies.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_S = 600
LEFT_BEHIND = ("*.so", "*.elf", "*.o", "__pycache__", ".*", "build", "dist", "*.egg-info")


def run(*command: str | Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**environment, **more},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def made(*command: str | Path, folder: Path) -> str:
    done = run(*command, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def python(folder: Path) -> Path:
    """A venv with what builds an sdist and nothing else."""
    made(sys.executable, "-m", "venv", "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", "setuptools>=77", "cffi>=1.17", folder=folder)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def sdist(folder: Path, python: Path) -> Path:
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    made(python, "-c", code, folder=tree)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(folder: Path, python: Path, sdist: Path) -> Path:
    made(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder / "wheels", sdist, folder=folder)
    (found,) = (folder / "wheels").iterdir()
    return found


def test_the_sdist_carries_the_whole_tree(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("trivmm", "ffi", "tests", "docs", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            left = any(part.match(pattern) for part in (inside, *inside.parents) for pattern in LEFT_BEHIND)
            if path.is_file() and not left:
                assert str(inside) in names
    assert not [name for name in names if name.endswith((".so", ".elf", ".pyc"))]


def test_the_wheel_is_for_every_python(wheel: Path) -> None:
    assert wheel.name.endswith("-cp311-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == ["trivmm/_native.abi3.so"]
    assert "trivmm/guest/probe.elf" in names
    assert not [name for name in names if name.startswith(("tests", "ffi", "docs"))]


def test_it_works_in_a_clean_venv_and_so_does_its_remedy(folder: Path, python: Path, wheel: Path) -> None:
    made(python, "-m", "pip", "install", "-q", wheel, folder=folder)
    assert "_native.abi3.so" in made(python, "-c", "import trivmm._native as n; print(n.__file__)", folder=folder)
    trivmm = python.parent / "trivmm"
    report = json.loads(run(trivmm, "doctor", "--json", folder=folder).stdout)
    (row,) = [row for row in report["rows"] if row["what"].startswith("unicorn")]
    assert not row["present"]
    made("sh", "-c", row["remedy"], folder=folder)
    assert json.loads(made(trivmm, "doctor", "--json", folder=folder))["soft"]


def test_a_build_without_a_compiler_ends_in_one_line(folder: Path, python: Path, sdist: Path) -> None:
    done = run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder / "none", sdist, folder=folder, CC="no-such-cc")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "error: cannot build trivmm: a C compiler (no-such-cc) not found; install it" in said
    assert "running bdist_wheel" not in said, "it began to build"
