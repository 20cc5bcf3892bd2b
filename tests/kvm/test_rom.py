"""A firmware image of one page: it starts at the reset vector, can't write its ROM, and can write its shadow."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import trio

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.road import open_road

LIMIT_S = 60
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")
BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]
CODE, DATA, VECTOR = 0xF00, 0xF80, 0xFF0
WRITES = "2e c6 06 80 ff 55  2e a0 80 ff  ba f8 03  ee"  # movb $'U', %cs:0xff80; mov %cs:0xff80, %al; out %al
SHADOW = "b8 00 f0  8e d8  c6 06 80 ff 56  a0 80 ff  ba f8 03  ee"  # the same at f000:ff80, with 'V'
WAITS = "ba fd 03  ec  a8 01  74 fb"  # until COM1 has input
AGAIN = "2e a0 80 ff  ba f8 03  ee"  # what the ROM holds now
OFF = "ba 00 06  b0 34  ee  f4"
JUMP = "e9 0d ff"


def config_of(folder: Path, *code: str) -> VmConfig:
    image = bytearray(b"\xf4" * 4096)
    body = bytes.fromhex(" ".join(code))
    image[CODE : CODE + len(body)], image[DATA] = body, ord("R")
    image[VECTOR : VECTOR + 3] = bytes.fromhex(JUMP)
    (folder / "bios").write_bytes(image)
    return VmConfig(
        PayloadConfig(firmware=str(folder / "bios")), memory=MemoryConfig(16 << 20), serial=SerialConfig("Null")
    )


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_what_is_written_to_rom_is_dropped_and_counted(tmp_path: Path, back_end: str) -> None:
    with trio.fail_after(LIMIT_S):
        config = config_of(tmp_path, WRITES, WRITES, SHADOW, WAITS, OFF)
        async with open_vm(config, hypervisor=choose_hypervisor(back_end)) as vm:
            await vm.boot()
            await vm.wait_for_console("RRV")
            assert vm.counters()["__bus"]["rom_writes"] == 2
            vm.console_input(b"!")
            assert (await vm.wait()).kind == "poweroff"


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_rom_travels_and_the_file_there_is_for_the_next_boot(tmp_path: Path, back_end: str) -> None:
    """A host that was updated meanwhile has another image; the guest runs on with the one that it began with."""
    with trio.fail_after(LIMIT_S):
        config = config_of(tmp_path, SHADOW, WAITS, AGAIN, OFF)
        async with open_road(config, hypervisor=choose_hypervisor(back_end)) as road:
            await road.vm.wait_for_console("V")
            (tmp_path / "bios").write_bytes((tmp_path / "bios").read_bytes()[:DATA] + bytes(4096 - DATA - 16) * 2)
            await road.move(f"unix:{tmp_path}/m.sock")
            road.vm.console_input(b"!")
            assert (await road.vm.wait()).kind == "poweroff"
            assert road.vm.console_tail == b"R"
