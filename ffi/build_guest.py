"""Builds the probe guest (``trivmm/guest/probe.elf``) with the compiler that builds the FFI."""

import shlex
import subprocess
from pathlib import Path

from build_check import compiler
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

GUEST = Path(__file__).resolve().parent.parent / "trivmm" / "guest"
ELF = GUEST / "probe.elf"
# Freestanding, no SSE (ring 0 may be emulated), no red zone (interrupts on the same stack), not position-independent.
FLAGS = shlex.split(
    "-m64 -O2 -Wall -Wextra -std=gnu11 -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only "
    "-fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns "
    "-nostdlib -static -Wl,--build-id=none -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments"
)


def build_guest() -> Path:
    """Gives the path of the ELF; does nothing when it is newer than its sources."""
    sources = sorted([*GUEST.glob("*.S"), *GUEST.glob("*.c")])
    watched = [*sources, *GUEST.glob("*.h"), GUEST / "link.ld", Path(__file__)]
    if ELF.exists() and ELF.stat().st_mtime > max(each.stat().st_mtime for each in watched):
        return ELF
    command = [*compiler()[:1], *FLAGS, f"-Wl,-T,{GUEST / 'link.ld'}", "-o", str(ELF), *map(str, sources)]
    subprocess.run(command, check=True, timeout=300)
    return ELF


class BuildWithGuest(build_py):
    """``build_py`` that makes the ELF first, so that it is packaged as data."""

    def run(self) -> None:
        build_guest()
        super().run()


class BuildExtWithGuest(build_ext):
    """The same for ``setup.py build_ext --inplace``, which runs no ``build_py``."""

    def run(self) -> None:
        build_guest()
        super().run()


if __name__ == "__main__":
    print(build_guest())
