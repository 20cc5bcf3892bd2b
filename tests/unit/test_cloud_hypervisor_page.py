"""docs/cloud-hypervisor.md names what the code names: events, fields of the progress, exit codes, the version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import trivmm
from trivmm import cli
from trivmm.cli.parser import version_text
from trivmm.control.progress import progress_body
from trivmm.migration.progress import Downtime, MigrationProgress, Phase, Round

PAGE: Final = (Path(__file__).parents[2] / "docs" / "cloud-hypervisor.md").read_text(encoding="utf-8")
SOURCE: Final = Path(trivmm.__file__).parent
TELLING: Final = {  # how an event's name stands in the source → (its source, what stands before the name)
    r'_tell\("([a-z-]+)"': ("vm", ""),
    r'emit\("vm", "([a-z-]+)"': ("vm", ""),
    r'emit\("guest", "([a-z-]+)"': ("guest", ""),
    r'tell_of_receiving\("([a-z-]+)"': ("vm", "migration-receive-"),
    r'emit\("vmm", "([a-z-]+)"': ("vmm", ""),
    r'Event\("vmm", "([a-z-]+)"': ("vmm", ""),
    r'on_event\("([a-z-]+)"': ("virtio-device", ""),
}


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_event_is_named_with_its_source() -> None:
    told: set[tuple[str, str]] = set()
    for path in SOURCE.glob("**/*.py"):
        if "testing" not in path.parts:
            text = path.read_text()
            told |= {
                (source, f"{before}{name}")
                for pattern, (source, before) in TELLING.items()
                for name in re.findall(pattern, text)
            }
    assert len(told) > 20
    named = [(row[0], name) for row in rows(section("Events")) for name in re.findall("`([a-z-]+)`", row[1])]
    assert sorted(named) == sorted(told)


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {*value}.union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_every_field_of_the_progress_is_named() -> None:
    part = Downtime(1.0, 2.0, 3.0, 4.0)
    fields: set[str] = set()
    for phase in Phase:
        said = progress_body(
            MigrationProgress(
                session="0f",
                transport="unix",
                began_s=1.0,
                phase=phase,
                elapsed_s=2.0,
                memory_bytes=1 << 20,
                round=1,
                bytes_sent=4096,
                pages=1,
                zero_pages=0,
                remaining_pages=2,
                rate=1.0,
                dirty_rate=1.0,
                throttle_percent=0,
                attempts=1,
                downtime_limit_ms=300.0,
                estimated_downtime=part,
                actual_downtime=part,
                rounds=(Round(1, 0.0, 1.0, 4096, 1, 0, True),),
                reason=None,
            )
        )
        fields |= keys(said)
        assert f"`{said['phase']}`" in section("vm.migration-progress")
    text = section("vm.migration-progress")
    assert [name for name in sorted(fields) if f"`{name}`" not in text and f'"{name}"' not in text] == []
    first_column = {name for row in rows(text) for name in re.findall("`([a-z0-9_]+)`", row[0])}
    assert first_column <= fields


def test_the_exit_codes_are_the_command_lines() -> None:
    codes = [0, cli.EXIT_FAILED, cli.EXIT_USAGE, cli.EXIT_CRASH, cli.EXIT_INTERRUPTED]
    table = rows(section("Exit codes and signals"))
    assert table[0] == ["command", *map(str, codes)]
    commands = {word for row in table[2:] for word in re.findall(r"trivmm ([a-z]+)", row[0])}
    assert commands == {"run", "remote", "doctor", "demo", "fake"}


def test_the_version_that_management_software_reads() -> None:
    first, second = version_text("/opt/trivmm/cloud-hypervisor").splitlines()
    assert f"--version     # {first}, and trivmm's own version on a second line" in PAGE
    assert second == version_text("trivmm") == f"trivmm v{trivmm.__version__}"
