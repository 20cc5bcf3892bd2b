"""A guest on a qcow2 disk: its driver writes and reads back while it moves to and fro, and while its VMM is killed;
QEMU finds nothing wrong with the image that is left.

The probe guest says itself when a sector is not what it wrote. Each side of a move has the image open while the other
one writes, so one that believed an old table would give it another cluster's content, or spoil the image."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.guest import parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.base import Hypervisor
from trivmm.testing.images import ImageDriver, qemu_img, why_no_qemu_img
from trivmm.testing.road import open_road

pytestmark = pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img())

LIMIT_S = 120
SECTORS = 2048
MOVES = 2
REQUESTS = 60  # between two moves


def open_soft() -> Hypervisor:
    from trivmm.hypervisor.soft import SoftHypervisor

    if importlib.util.find_spec("unicorn") is None:
        pytest.skip("the soft extra is not installed")
    return SoftHypervisor()


def open_kvm() -> Hypervisor:
    from trivmm.hypervisor.kvm.system import KvmHypervisor

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    return KvmHypervisor()


def overlay(folder: Path) -> Path:
    """On a compressed image; clusters of 4 KiB, so that there is much to allocate."""
    (folder / "base.raw").write_bytes(bytes(range(256)) * 4 * SECTORS)
    qemu_img("convert", "-c", "-O", "qcow2", folder / "base.raw", folder / "base.qcow2")
    made = folder / "disk.qcow2"
    behind = ("-b", "base.qcow2", "-F", "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", *behind, made)
    return made


def guest(folder: Path) -> tuple[str, str]:
    """Kernel and command line."""
    return str(probe_path()), probe_cmdline(cpus=1, report=100, mem=4, rate=100, cycle="blk", sectors=SECTORS)


@pytest.mark.parametrize(
    "hypervisor", [pytest.param(open_soft, marks=pytest.mark.soft), pytest.param(open_kvm, marks=pytest.mark.kvm)]
)
async def test_both_sides_of_each_move_write(tmp_path: Path, hypervisor: Callable[[], Hypervisor]) -> None:
    disk, serial = overlay(tmp_path), tmp_path / "serial.txt"
    config = VmConfig(
        PayloadConfig(*guest(tmp_path)),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk), image_type="Qcow2", num_queues=2),),
        serial=SerialConfig("File", str(serial)),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )
    allocated = []
    with trio.fail_after(LIMIT_S):
        async with open_road(config, hypervisor=hypervisor()) as road:
            for number in range(MOVES + 1):
                wanted = parse_report(serial.read_text(errors="replace")).blk_ios + REQUESTS
                while parse_report(serial.read_text(errors="replace")).blk_ios < wanted:
                    await road.vm.console_output()
                allocated.append(road.vm.counters()["_disk0"]["qcow2_allocated"])
                if number < MOVES:
                    await road.move(f"unix:{tmp_path}/m{number}.sock")
    assert all(allocated)
    report = parse_report(serial.read_text(errors="replace"))
    assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
    assert "No errors were found" in qemu_img("check", disk).stdout


@pytest.mark.kvm
def test_a_vmm_that_is_killed_in_mid_write_leaves_an_image_that_is_right(tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    disk = overlay(tmp_path)
    kernel, cmdline = guest(tmp_path)
    command = [sys.executable, "-m", "trivmm", "--kernel", kernel, "--cmdline", cmdline, "--memory", "size=64M"]
    command += ["--disk", f"path={disk},image_type=qcow2", "--serial", "tty", "--console", "off"]
    for number in range(2):
        said = ""
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said += line
                    if parse_report(said).blk_ios >= REQUESTS * (number + 1):
                        break
            finally:
                process.kill()
        report = parse_report(said)
        assert (report.problems, report.errors) == ((), 0)
        assert report.blk_ios >= REQUESTS
        assert "ERROR" not in qemu_img("check", disk, accept=(0, 3)).stdout
        with ImageDriver(disk, image_type="Qcow2") as driver:  # gives back what a kill between two writes has leaked
            content = driver.read(0, driver.size)
            driver.image.flush()
        assert "No errors were found" in qemu_img("check", disk).stdout
        raw = tmp_path / "all.raw"
        qemu_img("convert", "-O", "raw", disk, raw)
        assert raw.read_bytes() == content
