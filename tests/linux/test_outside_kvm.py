"""Memtest86+ under /dev/kvm; where guest ring 0 is emulated, its x87 instructions are finished by the VMM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.hypervisor.kvm.system import KvmHypervisor

pytestmark = [pytest.mark.slow, pytest.mark.kvm]

LIMIT_S = 300


async def test_memtest86_starts_at_its_64_bit_entry(package: Callable[[str], Path]) -> None:
    kernel = package("memtest86+") / "boot/memtest86+x64.bin"
    config = VmConfig(
        PayloadConfig(str(kernel), "console=ttyS0,115200"), memory=MemoryConfig(8 << 20), serial=SerialConfig("Null")
    )
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=KvmHypervisor()) as vm:
            await vm.boot()
            await vm.wait_for_console("Memtest86+ v")
            await vm.wait_for_console("Pass")
