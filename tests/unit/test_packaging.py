"""What a build needs and what is shipped, read from the files that say it. ``real/test_packages.py`` builds, slowly."""

from __future__ import annotations

import importlib.util
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trivmm.hypervisor.select import SOFT_REQUIREMENT

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOUND_BY_SETUPTOOLS = {"README.md", "trivmm"}


def manifest() -> tuple[set[str], set[str]]:
    """(grafted folders, included files) of MANIFEST.in."""
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    return (
        {folder for verb, *folders in rules if verb == "graft" for folder in folders},
        {name for verb, *names in rules if verb == "include" for name in names},
    )


def test_the_sdist_has_the_whole_tree() -> None:
    grafted, included = manifest()
    for entry in ROOT.iterdir():
        if any(fnmatch(entry.name, pattern) for pattern in (".*", "__pycache__", "build", "dist", "*.egg-info")):
            continue
        if entry.is_dir() and (any(entry.glob("**/*.py")) or any(entry.glob("**/*.md"))):
            assert entry.name in grafted | FOUND_BY_SETUPTOOLS
        if entry.suffix == ".md" or entry.name == "LICENSE":
            assert entry.name in included | FOUND_BY_SETUPTOOLS
    assert {"tests", "docs", "examples", "ffi"} <= grafted


def test_every_package_is_listed() -> None:
    there = {".".join(init.parent.relative_to(ROOT).parts) for init in ROOT.glob("trivmm/**/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


def test_the_remedy_installs_what_the_soft_extra_has() -> None:
    assert PROJECT["project"]["optional-dependencies"]["soft"] == [SOFT_REQUIREMENT]


# --- what a build needs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_check", ROOT / "ffi" / "build_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler_without(folder: Path, header: str) -> str:
    """A compiler that finds every header but one."""
    fake = folder / "fake cc"
    fake.write_text(f"#!/bin/sh\n! grep -q '<{header}>'\n")
    fake.chmod(0o755)
    return f"'{fake}' --some-flag"


@pytest.mark.parametrize(
    ("header", "what", "package"),
    [
        ("stdio.h", "the C library's headers not found", "libc6-dev"),
        ("linux/kvm.h", "the kernel's headers", "linux-libc-dev"),
        ("Python.h", "Python's headers (Python.h) not found", "python3-dev"),
    ],
)
def test_a_missing_header_is_one_line(
    build_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, what: str, package: str
) -> None:
    monkeypatch.setenv("CC", compiler_without(tmp_path, header))
    with pytest.raises(SystemExit) as caught:
        build_check.check(["bdist_wheel", "--dist-dir", "x"])
    said = str(caught.value)  # which Python prints, and exits with 1
    assert said.startswith(f"error: cannot build trivmm: {what}")
    assert f"apt install {package};" in said
    assert "\n" not in said
    build_check.check(["egg_info"])  # needs no compiler
    build_check.check(["sdist"])


def test_no_compiler_is_one_line(build_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    for command in ("build", "editable_wheel"):
        with pytest.raises(SystemExit, match=r"a C compiler \(no-such-compiler\) not found; .*apt install gcc"):
            build_check.check([command])


def test_a_host_with_everything_builds(
    build_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler_without(tmp_path, "nothing.h"))
    build_check.check(["bdist_wheel"])


def test_another_machine_is_refused_by_name(build_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_check.platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit, match="needs Linux on x86-64, this is linux on aarch64"):
        build_check.check(["bdist_wheel"])
