"""The house rules that tools can check: ruff, flake8-async (finds more than ruff's ASYNC rules), mypy --strict, the
floors of docs/architecture.md (import-linter, the ``layers`` in pyproject.toml), and how long a file may be."""

from __future__ import annotations

import os
import re
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


MAX_LINES = 400  # what a reader holds in mind; a longer file is two files, or says in its head why it isn't
REASON = re.compile(r"Over 400 lines: (\w+\W+){3,}")
HEADS = {".py": re.compile(r'\A"""(.*?)"""', re.DOTALL)}
COMMENT = re.compile(r"\A(?:#include[^\n]*\n|\s)*/\*(.*?)\*/", re.DOTALL)


def says_why(name: str, text: str) -> bool:
    """In its docstring, or in the comment at its top, which a C file may have after its includes."""
    head = HEADS.get(Path(name).suffix, COMMENT).search(text)
    return head is not None and REASON.search(" ".join(head[1].replace(" * ", " ").split())) is not None


def test_no_file_is_long_without_a_reason() -> None:
    suffixes = {".py", ".c", ".h", ".S", ".cdef"}
    files = [path for name in ("trivmm", "ffi") for path in sorted((ROOT / name).rglob("*")) if path.suffix in suffixes]
    assert len(files) > 150
    long = {}
    for path in files:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_LINES and not says_why(path.name, text):
            long[str(path.relative_to(ROOT))] = text.count("\n")
    assert not long, f"more than {MAX_LINES} lines, and no 'Over {MAX_LINES} lines: why' in the head: {long}"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.py", '"""A table.\n\nOver 400 lines: one row for\neach of them."""\n', True),
        ("a.py", '"""A table.\n\nOver 400 lines: yes."""\n', False),
        ("a.py", '"""A table."""\n# Over 400 lines: one row for each of them.\n', False),
        ("a.c", '#include "a.h"\n\n/* A table.\n * Over 400 lines: one row for\n * each. */\n', True),
        ("a.h", "/* A table. */\n", False),
    ],
)
def test_a_reason_is_found_where_a_reader_finds_it(name: str, text: str, says: bool) -> None:
    assert says_why(name, text) is says
