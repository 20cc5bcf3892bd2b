"""The probe guest on devices that nobody here wrote: QEMU's, as an independent judge of its drivers.

QEMU's debug-exit port takes the place of our power-off port, so the guest ends the process by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path

QEMU = shutil.which("qemu-system-x86_64")
LIMIT_S = 180  # firmware and TCG on a busy host
POWERED_OFF = 0x34 << 1 | 1  # what debug-exit makes of the guest's byte

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")

ACCELERATORS = [
    "tcg",
    pytest.param("kvm", marks=pytest.mark.kvm),
]


def on_qemu(folder: Path, accelerator: str, cpus: int, **options: object) -> ProbeReport:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened")
    disk, serial = folder / "disk.img", folder / "serial.txt"
    disk.write_bytes(bytes(1 << 20))
    cmdline = probe_cmdline(cpus=cpus, report=200, mem=8, cycle="rng,blk", **options)
    command = [str(QEMU), "-machine", f"pc,accel={accelerator},acpi=off", "-m", "64", "-smp", str(cpus)]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{serial}"]
    command += ["-kernel", str(probe_path()), "-append", cmdline]
    command += ["-drive", f"file={disk},if=none,id=d,format=raw", "-device", "virtio-blk-pci,drive=d,disable-legacy=on"]
    command += ["-device", "virtio-rng-pci,disable-legacy=on", "-device", "isa-debug-exit,iobase=0x600,iosize=1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False)
    said = serial.read_text(errors="replace") if serial.exists() else ""
    assert done.returncode == POWERED_OFF, done.stderr.decode(errors="replace") + said
    return parse_report(said)


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize(
    ("cpus", "options"),
    [(1, {}), (1, {"window": 1, "event_idx": 1, "indirect": 1}), (2, {"window": 1, "race": 1})],
    ids=["plain", "all-features", "race"],
)
def test_devices_cycle(tmp_path: Path, accelerator: str, cpus: int, options: dict[str, int]) -> None:
    report = on_qemu(tmp_path, accelerator, cpus, rate=300, once=100, **options)
    assert (report.problems, report.errors, report.stuck, report.needs_reset) == ((), 0, 0, 0)
    assert report.cpus == cpus
    assert report.rng_act + report.blk_act >= 100
    assert report.blk_ios > 0
    assert report.rng_ios > 0 or "race" in options


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_guest_sees_what_is_spoiled(tmp_path: Path, accelerator: str) -> None:
    report = on_qemu(tmp_path, accelerator, 1, corrupt=1, once=1)
    assert {problem.split()[0] for problem in report.problems} == {"LOST", "STALE"}
