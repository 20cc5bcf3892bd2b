"""A guest that misuses BARs, MSI-X, queues, ports and its LAPIC on real KVM: only the guest suffers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trivmm.vm.triplefaults import LIMIT

HERE = Path(__file__).parent


@pytest.mark.kvm
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld")
def test_hostile_guest_only_crashes_itself(tmp_path: Path) -> None:
    made, kernel = tmp_path / "hostile.o", tmp_path / "hostile.elf"
    subprocess.run(["gcc", "-m32", "-c", HERE / "hostile.S", "-o", made], check=True, timeout=60)
    linker = ["ld", "-m", "elf_i386", "-T", HERE / "hostile.ld", "-e", "start", "--build-id=none"]
    subprocess.run([*linker, "-o", kernel, made], check=True, timeout=60, capture_output=True)
    disk, serial = tmp_path / "disk", tmp_path / "serial"
    disk.write_bytes(bytes(1 << 20))
    options = {"--kernel": kernel, "--memory": "size=64M", "--disk": f"path={disk}", "--serial": f"file={serial}"}
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "trivmm", "--hypervisor", "kvm", *words]
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert f"vcpu0: triple fault, {LIMIT} in a row" in ended.stderr
    assert "code: 0f 0b" in ended.stderr  # its UD2
    assert serial.read_bytes() == b"12:345" * LIMIT  # ':' is '0' + 10: status 0x4f, NEEDS_RESET among its bits
    assert disk.read_bytes() == bytes(1 << 20)
