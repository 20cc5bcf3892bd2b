"""``python -m trivmm.testing.torture`` with the probe guest, which checks its memory and disk: a few trials."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trivmm.testing.control import command_environment

pytestmark = pytest.mark.kvm

COMMAND = [sys.executable, "-P", "-m", "trivmm.testing.torture", "--hypervisor", "kvm", "--json"]


def test_a_few_trials_break_no_promise() -> None:
    words = [
        "--trials",
        "3",
        "--seed",
        "1",
        "--kinds",
        "move,kill-destination,close",
        "--points",
        "PAGES,ROUND_END,STATE",
    ]
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=120, env=command_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["kinds"]["all"]
    assert (told["trials"], told["one copy"], told["guest errors"], told["left over"]) == (3, 3, 0, 0)
