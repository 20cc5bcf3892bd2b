"""Memtest86+ as a guest, by its 64-bit entry, on whatever runs it."""

from __future__ import annotations

from pathlib import Path

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.hypervisor.base import Hypervisor


async def memtest_starts(package: Path, hypervisor: Hypervisor) -> None:
    """Up to the screen on which a pass is counted; ``package``: its own, unpacked."""
    kernel = package / "boot/memtest86+x64.bin"
    config = VmConfig(
        PayloadConfig(kernel, "console=ttyS0,115200"), memory=MemoryConfig(8 << 20), serial=SerialConfig("Null")
    )
    async with open_vm(config, hypervisor=hypervisor) as vm:
        await vm.boot()
        await vm.wait_for_console("Memtest86+ v")
        await vm.wait_for_console("Pass")
