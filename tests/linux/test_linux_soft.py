"""A distribution's Linux with its own drivers, on the soft CPU: boots, uses its devices, moves, powers off when told.

The kernel is fetched by apt at each run; nothing of it is in the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines

from .life import Life

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 900


@pytest.mark.parametrize("cpus", [1, 2])
async def test_linux_boots_uses_its_devices_and_moves(linux: Any, tmp_path: Path, cpus: int) -> None:
    patient = Deadlines(pause=10, downtime=2)  # an emulator that shares its CPUs with what copies its memory
    cmdline = "mitigations=off cryptomgr.notests"
    life = Life(linux, tmp_path, SoftHypervisor(), cpus, cmdline, deadlines=patient)
    with trio.fail_after(LIMIT_S):
        await life.live()
    print(life)
