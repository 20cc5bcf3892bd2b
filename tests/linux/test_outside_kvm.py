"""Memtest86+ under /dev/kvm; where guest ring 0 is emulated, its x87 instructions are finished by the VMM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm.hypervisor.kvm.system import KvmHypervisor

from .memtest import memtest_starts

pytestmark = [pytest.mark.slow, pytest.mark.kvm]

LIMIT_S = 300


async def test_memtest86_starts_at_its_64_bit_entry(package: Callable[[str], Path]) -> None:
    with trio.fail_after(LIMIT_S):
        await memtest_starts(package("memtest86+"), KvmHypervisor())
