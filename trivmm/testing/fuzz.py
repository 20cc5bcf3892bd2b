"""``python -m trivmm.testing.fuzz [NAME…]``: C harnesses of hostile input, under AddressSanitizer and UBSan.

A harness is ``ffi/fuzz/NAME.c`` in a source tree: a program of numbered cases (``ffi/fuzz/fuzz.h``). Its head says
which files of ``ffi/`` it is linked with (``links:``) and how many cases a ``short:`` and a ``full:`` run have. What
was built is kept in the user's cache under the hash of what it was built from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import trio

import trivmm
from trivmm.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, say_error
from trivmm.cli.parser import Parser, UsageError
from trivmm.errors import ConfigError, one_line
from trivmm.syntax import parse_integer
from trivmm.testing.sanitized import run_tests

__all__ = ["FLAGS", "Finding", "Harness", "build", "compiler", "find", "main", "run", "sources"]

FLAGS: Final = shlex.split(
    "-std=gnu11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all "
    "-Wall -Wextra -Wno-unused-parameter"
)
# A report is told by an abort, so that the harness can say which case it was.
SANITIZERS: Final = {"ASAN_OPTIONS": "abort_on_error=1", "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1"}
BUILD_LIMIT_S: Final = 120.0
RUN_LIMIT_S: Final = 3600.0  # of one harness, unless --limit says otherwise
REPORT_LINES: Final = 80  # of what a sanitizer says
LINE_BYTES: Final = 4096
SHORT: Final = 1000  # cases, where a harness does not say
FULL: Final = 100_000

ABOUT: Final = """\
Runs C harnesses of hostile input (ffi/fuzz/NAME.c, all of them unless named) under AddressSanitizer and UBSan.

Exit code 1: a finding. A case depends on the seed and its number alone: --seed S --first N --count 1 is that one."""


@attrs.frozen
class Harness:
    """``links``: files of ``ffi/`` and linker flags. ``short`` and ``full``: cases of a run."""

    path: Path
    links: tuple[str, ...]
    short: int
    full: int

    @property
    def name(self) -> str:
        return self.path.stem


@attrs.frozen
class Finding:
    """``cases``: how many were asked for. ``report``: None when nothing was found; else what was, many lines."""

    harness: str
    seed: int
    cases: int
    seconds: float
    summary: str
    report: str | None = None

    def line(self) -> str:
        speed = self.cases / max(self.seconds, 1e-9)
        how = f"{self.cases} cases of seed {self.seed} in {self.seconds:.1f} s, {speed:,.0f}/s"
        return f"{self.harness}: FINDING, {how}" if self.report else f"{self.harness}: {self.summary} ({how})"


def sources() -> Path:
    """The folder ``ffi/`` of the source tree: of the one that this package lies in, or stands in the current folder.

    :raises ConfigError: there is none."""
    places = [Path(trivmm.__file__).resolve().parents[1] / "ffi", Path.cwd() / "ffi"]
    for folder in places:
        if (folder / "fuzz").is_dir():
            return folder
    raise ConfigError("ffi/fuzz", str(places[-1]), "not there", "run this at the root of a source tree")


def _said(text: str, key: str) -> list[str]:
    return " ".join(re.findall(rf"^ \* {key}: (.+)$", text, re.MULTILINE)).split()


def find(ffi: Path, names: Sequence[str] = ()) -> list[Harness]:
    """Those of that name, or all. :raises ConfigError: there is no such harness."""
    there = {path.stem: path for path in sorted((ffi / "fuzz").glob("*.c"))}
    for name in names:
        if name not in there:
            raise ConfigError("harness", name, "unknown", f"give {', '.join(there)}")
    harnesses = []
    for name in names or there:
        text = there[name].read_text(encoding="utf-8")
        short, full = (_said(text, key) or [str(default)] for key, default in (("short", SHORT), ("full", FULL)))
        harnesses.append(Harness(there[name], tuple(_said(text, "links")), int(short[0]), int(full[0])))
    return harnesses


def compiler() -> list[str]:
    """The command that compiles C with both sanitizers. :raises ConfigError: here is none that can."""
    command = shlex.split(os.environ.get("CC", "gcc"))
    with tempfile.TemporaryDirectory(prefix="trivmm-fuzz-") as folder:
        try:
            done = subprocess.run(
                [*command, *FLAGS, "-x", "c", "-", "-o", f"{folder}/probe"],
                input="int main(void) { return 0; }\n",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_LIMIT_S,
            )
        except OSError as error:
            raise ConfigError("compiler", command[0], error.strerror or str(error), "install gcc") from error
    if done.returncode:
        remedy = "install gcc's libasan and libubsan (Debian has them with gcc; Fedora: dnf install libasan libubsan)"
        raise ConfigError("compiler", command[0], "can't link -fsanitize=address,undefined", remedy)
    return command


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivmm" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(harness: Harness, command: Sequence[str]) -> Path:
    """Gives the program, built unless it is there. :raises ConfigError: it does not build."""
    ffi = harness.path.parents[1]
    files = [harness.path, *(ffi / link for link in harness.links if not link.startswith("-"))]
    digest = hashlib.sha256(repr((list(command), FLAGS, harness.links)).encode())
    for path in [*files, *sorted(ffi.glob("*.h")), *sorted(harness.path.parent.glob("*.h"))]:
        if not path.is_file():
            raise ConfigError(f"{harness.path.name}: links", path.name, "not there", "name files of ffi/")
        digest.update(path.read_bytes())
    built = _cache() / f"{harness.name}-{digest.hexdigest()[:16]}"
    if built.exists():
        return built
    flags = [link for link in harness.links if link.startswith("-")]
    with tempfile.TemporaryDirectory(prefix=".building-", dir=built.parent) as folder:
        made = Path(folder) / harness.name
        done = subprocess.run(
            [*command, *FLAGS, f"-I{ffi}", f"-I{harness.path.parent}", *map(str, files), "-o", str(made), *flags],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_LIMIT_S,
        )
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line or "undefined" in line), "")
            raise ConfigError("harness", harness.name, f"does not build: {said}", "mend it")
        for old in built.parent.glob(f"{harness.name}-*"):
            old.unlink(missing_ok=True)
        made.rename(built)
    return built


async def run(
    program: Path, harness: Harness, count: int, seed: int, first: int, limit_s: float, told: Callable[[int], None]
) -> Finding:
    """Run ``count`` cases. ``told(cases so far)`` about once a second. A run that is not over after ``limit_s`` is a
    finding too: of code that has no end, or of a limit that is too short."""
    began = time.monotonic()
    lines: list[str] = []
    report: list[str] = []
    process = await trio.lowlevel.open_process(
        [str(program), str(count), str(seed), str(first)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **SANITIZERS},
    )

    def note(line: str) -> None:
        if re.fullmatch(r"at \d+", line):
            told(int(line[3:]))
        else:
            lines[:] = [line]  # the last one is the summary

    def keep(line: str) -> None:
        if len(report) < REPORT_LINES or line.startswith("finding:"):
            report.append(line)

    try:
        with trio.move_on_after(limit_s) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, process.stdout, note)
                nursery.start_soon(_read, process.stderr, keep)
            await process.wait()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()  # it was killed
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)
    if scope.cancelled_caught:
        report.append(f"not over after {limit_s:g} s: raise --limit, or lower --count")
    failed = scope.cancelled_caught or process.returncode != 0
    if failed:
        report.append(f"exit code {process.returncode}")
    spent = time.monotonic() - began
    return Finding(
        harness.name, seed, count, spent, one_line(lines[0] if lines else ""), "\n".join(report) if failed else None
    )


async def _read(stream: Any, line: Callable[[str], None]) -> None:
    """Lines of at most LINE_BYTES, to the end."""
    rest = b""
    async for piece in stream:
        *whole, rest = (rest + piece).split(b"\n")
        for each in whole:
            line(each[:LINE_BYTES].decode(errors="replace"))
        rest = rest[:LINE_BYTES]
    if rest:
        line(rest.decode(errors="replace"))


@attrs.frozen
class Options:
    harnesses: tuple[Harness, ...]
    count: int | None
    full: bool
    seed: int
    first: int
    limit_s: float
    tests: bool
    as_json: bool


def parse(arguments: Sequence[str]) -> Options:
    """:raises UsageError: / :raises ConfigError: one line each."""
    parser = Parser("python -m trivmm.testing.fuzz", ABOUT)
    parser.add_argument("names", nargs="*", metavar="NAME", help="harnesses (all)")
    parser.add_argument("--count", metavar="N", help="cases of each (what a harness calls short)")
    parser.add_argument("--full", action="store_true", help="as many as a harness calls full")
    parser.add_argument("--seed", metavar="S", help="a number; the same one makes the same cases (a new one)")
    parser.add_argument("--first", default="0", metavar="N", help="the first case's number (0)")
    parser.add_argument("--limit", default=f"{RUN_LIMIT_S:g}", metavar="SECONDS", help="for one harness")
    parser.add_argument("--tests", action="store_true", help="the Python tests of ffi/ too, on an extension built so")
    parser.add_argument("--json", action="store_true", help="the results as JSON; so it is where no terminal is")
    given: argparse.Namespace = parser.parse(arguments)
    count = None if given.count is None else parse_integer("--count", given.count)
    if count is not None and count < 1:
        raise ConfigError("--count", count, "out of range", "give 1 or more")
    limit_s = float(parse_integer("--limit", given.limit))
    if limit_s < 1 or not math.isfinite(limit_s):
        raise ConfigError("--limit", given.limit, "not a time", "give seconds, at least 1")
    return Options(
        harnesses=tuple(find(sources(), given.names)),
        count=count,
        full=given.full,
        seed=secrets.randbelow(1 << 31) if given.seed is None else parse_integer("--seed", given.seed),
        first=parse_integer("--first", given.first),
        limit_s=limit_s,
        tests=given.tests,
        as_json=given.json or not sys.stdout.isatty(),
    )


async def fuzz(options: Options, programs: Sequence[Path]) -> list[Finding]:
    """One harness after the other."""
    found = []
    for harness, program in zip(options.harnesses, programs, strict=True):
        count = options.count or (harness.full if options.full else harness.short)
        with _bar(harness.name, count, draw=not options.as_json) as told:
            one = await run(program, harness, count, options.seed, options.first, options.limit_s, told)
        found.append(one)
        if not options.as_json:
            print(one.line(), *([one.report] if one.report else []), sep="\n", flush=True)
    return found


class _bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, name: str, count: int, *, draw: bool) -> None:
        self._progress: Any = None
        if draw:
            from rich.progress import Progress

            self._progress = Progress(transient=True)
            self._task = self._progress.add_task(name, total=count)

    def __enter__(self) -> Callable[[int], None]:
        if self._progress is not None:
            self._progress.start()
        return self._told

    def _told(self, cases: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=cases)

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def main(arguments: Sequence[str]) -> int:
    """Gives the exit code: 0 when nothing was found, 1 for a finding, 2 when a harness can't be run here."""
    try:
        options = parse(arguments)
        command = compiler()
        found = trio.run(fuzz, options, [build(harness, command) for harness in options.harnesses])
        failed = options.tests and run_tests(sources().parent, _cache(), command) != 0
    except (UsageError, ConfigError) as error:
        say_error(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    ok = not failed and all(each.report is None for each in found)
    if options.as_json:
        print(json.dumps({"ok": ok, "harnesses": [attrs.asdict(each) for each in found]}, indent=2))
    return 0 if ok else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
