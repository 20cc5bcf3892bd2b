"""The fixtures that users get, and the first test of docs/testing.md, as it stands there."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest
import trio

from trivmm import PauseTimeout, Vm, VmState
from trivmm.testing.scripted import Compute, Script, ScriptedVcpu, Step, Wedge

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


def script(cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
    yield Compute(3600)
    yield Wedge(10)


@pytest.fixture
def vm_scripts() -> tuple[Script, ...]:
    return (script,)


async def test_the_stages_of_a_life(vm: Vm, autojump_clock: trio.testing.MockClock) -> None:
    assert vm.state is VmState.CREATED
    await vm.boot()
    assert vm.state is VmState.RUNNING


async def test_the_script_is_the_fixtures(vm_booted: Vm, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(3601)
    with pytest.raises(PauseTimeout, match="vcpu0"):
        await vm_booted.pause()
    await trio.sleep(10)
    await vm_booted.pause()


async def test_a_migrated_vm_runs(vm_migrated: Vm) -> None:
    assert vm_migrated.state is VmState.RUNNING
    await vm_migrated.pause()


def test_the_docs_first_test_passes(tmp_path: Path) -> None:
    import subprocess
    import sys

    block = re.search(r"```python\n(import trio.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "test_first.py").write_text(block[1])
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
