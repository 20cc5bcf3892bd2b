"""A bzImage that has no PVH entry starts at its 64-bit one, with what Linux' boot protocol promises."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.kernels import with_own_entry

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld")
LIMIT_S = 60
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")
BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]


@pytest.fixture(scope="module")
def bzimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    made, raw = folder / "entry.o", folder / "entry.bin"
    subprocess.run(["gcc", "-c", Path(__file__).with_name("linux_entry.S"), "-o", made], check=True, timeout=60)
    linker = ["ld", "-Ttext", "0x200000", "-e", "start", "--oformat", "binary", "--build-id=none"]
    subprocess.run([*linker, "-o", raw, made], check=True, timeout=60)
    (folder / "vmlinuz").write_bytes(with_own_entry(raw.read_bytes(), preferred=2 << 20))
    return folder / "vmlinuz"


@pytest.mark.parametrize("back_end", BACK_ENDS)
async def test_the_kernel_finds_what_it_was_given(tmp_path: Path, bzimage: Path, back_end: str) -> None:
    (tmp_path / "initramfs").write_bytes(b"070701 and so on")
    config = VmConfig(
        PayloadConfig(str(bzimage), "console=ttyS0 panic=1", str(tmp_path / "initramfs")),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("Null"),
    )
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=choose_hypervisor(back_end)) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
            assert vm.console_tail == b"<console=ttyS0 panic=1><070701 and so on><RSD PTR ><31>"
