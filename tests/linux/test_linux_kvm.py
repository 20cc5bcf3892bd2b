"""The same Linux under /dev/kvm; where guest ring 0 is emulated, with the command line of docs/slow-hosts.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines
from trivmm.hypervisor.kvm.ring0 import SLOW_HOST_OPTIONS, look_at_ring0
from trivmm.hypervisor.kvm.system import KvmHypervisor

from .life import Life

pytestmark = [pytest.mark.slow, pytest.mark.kvm]

LIMIT_S = 2400


async def test_linux_boots_uses_its_devices_and_moves(linux: Any, tmp_path: Path) -> None:
    ring0 = look_at_ring0()
    cmdline = " ".join(option for option, _ in SLOW_HOST_OPTIONS) if ring0.emulated else ""
    life = Life(linux, tmp_path, KvmHypervisor(), 1, cmdline, deadlines=Deadlines(downtime=10))
    with trio.fail_after(LIMIT_S):
        await life.live()
    print(life)
    assert ("assist_syscall" in life.counters) == ring0.syscall_lost
