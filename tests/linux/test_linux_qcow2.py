"""A distribution's Linux on qcow2 disks, with its own virtio-blk and ext4, on the soft CPU: it reads what QEMU reads,
QEMU reads what it wrote, and finds nothing wrong with the image, also after the VMM was killed.

The images are made from the files of the kernel's own package. ``TRIVMM_CLOUD_IMAGE=FILE`` takes a real one instead,
such as https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-nocloud-amd64.qcow2 (many minutes more)."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trivmm.testing.images import ImageDriver, qemu_img, why_no_qemu_img

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.soft,
    pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img()),
    pytest.mark.skipif(
        shutil.which("mke2fs") is None, reason="mke2fs is not installed (Debian: apt install e2fsprogs)"
    ),
]

LIMIT_S = 1800
CMDLINE = "console=ttyS0 mitigations=off panic=-1 cryptomgr.notests"
SIZE = "24M"


def make_image(folder: Path, files: Path, compression: str) -> Path:
    """As a distribution makes one: an ext4 of files, compressed, and an image of the user's own on top."""
    given = os.environ.get("TRIVMM_CLOUD_IMAGE")
    base = folder / "base.qcow2"
    if given:
        base.symlink_to(Path(given).resolve())
    else:
        raw = folder / "tree.img"
        command = ["mke2fs", "-q", "-t", "ext4", "-d", str(files), str(raw), SIZE]
        subprocess.run(command, check=True, timeout=LIMIT_S, capture_output=True)
        how = f"compression_type={compression}"
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", how, raw, base)
        raw.unlink()
    made = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", made)
    return made


def run_guest(linux_disk: Any, disk: Path, *words: str) -> Iterator[str]:
    """What it says, line by line; killed when nobody listens any more."""
    command = [sys.executable, "-m", "trivmm", "--hypervisor", "soft", "--kernel", str(linux_disk.kernel)]
    command += ["--initramfs", str(linux_disk.initramfs), "--cmdline", " ".join([CMDLINE, *words])]
    command += ["--memory", "size=256M", "--serial", "tty", "--console", "off"]
    command += ["--disk", f"path={disk},image_type=qcow2,backing_files=on"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                assert "GUEST problem" not in line
                yield line
        finally:
            process.kill()


def summed_up(disk: Path) -> str:
    """The whole disk as QEMU reads it, as the guest says it."""
    raw = disk.with_suffix(".raw")
    qemu_img("convert", "-O", "raw", disk, raw)
    total = 0xCBF29CE484222325
    with raw.open("rb") as file:
        while piece := file.read(1 << 20):
            for (word,) in struct.iter_unpack("<Q", piece):
                total = (total ^ word) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{raw.stat().st_size} bytes, {total:016x}"


def check(disk: Path) -> None:
    assert "No errors were found" in qemu_img("check", disk).stdout


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_linux_reads_what_qemu_reads_and_the_other_way_round(linux_disk: Any, tmp_path: Path, compression: str) -> None:
    disk = make_image(tmp_path, linux_disk.files, compression)
    before = summed_up(disk)
    said = "".join(run_guest(linux_disk, disk, "mode=use"))
    assert "GUEST done" in said
    assert re.findall(r"GUEST found (.*)", said) == [before]
    assert int(re.findall(r"GUEST copied (\d+)", said)[0]) >= 20
    check(disk)
    after = summed_up(disk)
    assert re.findall(r"GUEST left (.*)", said) == [after]
    assert after != before
    if not os.environ.get("TRIVMM_CLOUD_IMAGE"):
        subprocess.run(["e2fsck", "-fn", disk.with_suffix(".raw")], check=True, timeout=LIMIT_S, capture_output=True)


def test_what_linux_had_made_durable_is_there_after_the_vmm_was_killed(linux_disk: Any, tmp_path: Path) -> None:
    disk = make_image(tmp_path, linux_disk.files, "zlib")
    kept = 0
    for wanted in (40, 90):
        for line in run_guest(linux_disk, disk, "mode=write"):
            if found := re.match(r"GUEST kept (\d+)", line):
                kept = int(found[1])
                if kept >= wanted:
                    break
        said = qemu_img("check", disk, accept=(0, 3)).stdout
        assert "ERROR" not in said
        with ImageDriver(disk, image_type="Qcow2", backing_files=True) as driver:  # what the next start does
            driver.image.flush()
        check(disk)
    said = "".join(run_guest(linux_disk, disk, "mode=verify", f"kept={kept}"))
    assert f"GUEST whole {kept}" in said
    check(disk)
