"""Every harness of ffi/fuzz under the sanitizers, shortly; and that the runner sees what it is for.

The thorough run is ``python -m trivmm.testing.fuzz --full``.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from trivmm.errors import ConfigError
from trivmm.testing.fuzz import Finding, build, compiler, find, run
from trivmm.testing.sanitized import run_tests

FFI = Path(__file__).parents[2] / "ffi"
LIMIT_S = 120.0  # for what takes a second or two


@pytest.fixture(scope="session")
def gcc() -> list[str]:
    try:
        return compiler()
    except ConfigError as error:
        pytest.skip(str(error))


async def fuzz(folder: Path, name: str, gcc: list[str], limit_s: float = LIMIT_S) -> Finding:
    (harness,) = find(folder, [name])
    return await run(build(harness, gcc), harness, harness.short, 1, 0, limit_s, lambda cases: None)


@pytest.mark.parametrize("name", [each.name for each in find(FFI)])
async def test_a_short_run_finds_nothing(name: str, gcc: list[str]) -> None:
    found = await fuzz(FFI, name, gcc)
    assert found.report is None, found.report
    assert found.summary, "a harness says what it met with"


PLANTED = """\
/* A harness with a bug.
 *
 * links:{links}
 * short: 50
 */
#include "fuzz.h"

static void one(struct fuzz *fuzz)
{{
    volatile uint8_t *volatile bytes = malloc(8);
    volatile uint32_t at = fuzz->number == 40 ? 1 : 0;
    {bug}
    free((void *)bytes);
}}

int main(int argc, char **argv)
{{
    return fuzz_main(argc, argv, one, NULL);
}}
"""


def plant(folder: Path, bug: str, links: str = "") -> Path:
    """A tree that has this harness only, on our own ``fuzz.h``. Gives its ``ffi``."""
    fuzz = folder / "ffi" / "fuzz"
    fuzz.mkdir(parents=True)
    (fuzz / "fuzz.h").write_text((FFI / "fuzz" / "fuzz.h").read_text())
    (fuzz / "planted.c").write_text(PLANTED.format(bug=bug, links=links))
    return fuzz.parent


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("bug", "says"),
    [
        ("if (at) bytes[8] = 1;", "heap-buffer-overflow"),
        ("if (at) free((void *)bytes);", "double-free"),
        ("if (at) bytes = NULL;", "LeakSanitizer"),
        ("if (at) bytes[0] = (uint8_t)(1u << 31 << at), bytes[1] = (uint8_t)(at << (31 + at));", "shift exponent"),
        ("FUZZ_CHECK(!at);", "!at"),
        ("if (at) *(volatile int *)8 = 1;", "SEGV"),
    ],
)
async def test_a_bug_is_a_finding(tmp_path: Path, gcc: list[str], bug: str, says: str) -> None:
    found = await fuzz(plant(tmp_path, bug), "planted", gcc)
    assert found.report is not None
    assert says in found.report
    if says != "LeakSanitizer":  # which looks at the end
        assert "in case 40 of seed 1" in found.report


@pytest.mark.usefixtures("own_cache")
async def test_what_does_not_end_is_a_finding(tmp_path: Path, gcc: list[str]) -> None:
    found = await fuzz(plant(tmp_path, "while (at) continue;"), "planted", gcc, limit_s=1.0)
    assert found.report is not None
    assert "not over after 1 s" in found.report


@pytest.mark.usefixtures("own_cache")
async def test_what_was_built_is_built_once(tmp_path: Path, gcc: list[str]) -> None:
    folder = plant(tmp_path, ";")
    (harness,) = find(folder)
    first = build(harness, gcc)
    assert build(harness, gcc) == first
    harness.path.write_text(harness.path.read_text() + "\n/* another */\n")
    assert build(harness, gcc) != first
    assert not first.exists(), "the cache does not grow"


@pytest.mark.usefixtures("own_cache")
def test_mistakes_are_one_line(tmp_path: Path, gcc: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nothing.*unknown; give"):
        find(FFI, ["nothing"])
    (harness,) = find(plant(tmp_path, "no C;", links=" "))
    with pytest.raises(ConfigError, match=r"does not build: .*error") as caught:
        build(harness, gcc)
    assert "\n" not in str(caught.value)
    (harness,) = find(plant(tmp_path / "second", ";", links=" none.c"))
    with pytest.raises(ConfigError, match=r"links = \"none\.c\": not there"):
        build(harness, gcc)


def test_a_compiler_that_cannot_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ConfigError, match="can't link -fsanitize"):
        compiler()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match="No such file"):
        compiler()


COMMAND = [sys.executable, "-m", "trivmm.testing.fuzz"]


@pytest.mark.usefixtures("gcc")
def test_the_command_tells_json_where_no_terminal_is() -> None:
    done = subprocess.run([*COMMAND, "rings", "--count", "500", "--seed", "7"], capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert [(each["harness"], each["cases"], each["seed"]) for each in said["harnesses"]] == [("rings", 500, 7)]
    wrong = subprocess.run([*COMMAND, "ring"], capture_output=True, text=True, timeout=LIMIT_S)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


@pytest.mark.usefixtures("gcc")
def test_the_command_tells_a_line_on_a_terminal() -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen([*COMMAND, "rings", "--count", "500", "--seed", "7"], stdout=its, stderr=its)
    os.close(its)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # its other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=LIMIT_S) == 0
    assert b"rings: 500 cases, no finding" in said


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_the_extension_runs_under_the_sanitizers_and_they_see_its_bugs(tmp_path: Path, gcc: list[str]) -> None:
    """One that is planted from Python: a log that is shorter than it is said to be."""
    root, cache = FFI.parent, tmp_path / "cache"
    cache.mkdir()
    assert run_tests(root, cache, gcc, ["tests/unit/test_virtio_ring.py"]) == 0
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "from trivmm._native import ffi, lib\n"
        "def test_it():\n"
        "    bytes_ = ffi.new('uint8_t[]', 8)\n"
        "    lib.tv_dirty_take(ffi.cast('uint64_t *', bytes_), ffi.new('uint64_t[]', 64), 64)\n"
    )
    assert run_tests(root, cache, gcc, [str(planted)]) != 0
