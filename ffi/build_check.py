"""What a build needs of the host, looked for before it starts: one line instead of a screen of a compiler's errors.

Standard library only; ``setup.py`` asks it when a command that compiles is about to run.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig

BUILDING = {"build", "build_py", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
LIMIT_S = 60
# What the C includes, by what is missing where one is not found: (header, name, Debian's package, Fedora's).
HEADERS = (
    ("stdio.h", "the C library's headers", "libc6-dev", "glibc-devel"),
    ("linux/kvm.h", "the kernel's headers for programs (linux/kvm.h)", "linux-libc-dev", "kernel-headers"),
    ("Python.h", "Python's headers (Python.h)", "python3-dev", "python3-devel"),
)


def compiler() -> list[str]:
    """The command that compiles C, as setuptools takes it."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc")


def includes() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude")))


def missing() -> str | None:
    """One line that says what the build lacks and how to get it; None when it lacks nothing."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    command = compiler()
    if shutil.which(command[0]) is None:
        return _line(f"a C compiler ({command[0]})", "gcc libc6-dev python3-dev", "gcc python3-devel")
    for header, what, debian, fedora in HEADERS:
        flags = [f"-I{folder}" for folder in includes()]
        done = subprocess.run(
            [*command, "-E", "-x", "c", *flags, "-"],
            input=f"#include <{header}>\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
        if done.returncode:
            return _line(what, debian, fedora)
    return None


def _line(what: str, debian: str, fedora: str) -> str:
    return f"{what} not found; install it (Debian: apt install {debian}; Fedora: dnf install {fedora}), then try again"


def check(arguments: list[str]) -> None:
    """:raises SystemExit: with that line, when ``arguments`` are going to compile and can't."""
    said = missing() if BUILDING & set(arguments) else None
    if said is not None:
        raise SystemExit(f"error: cannot build trivmm: {said}")
