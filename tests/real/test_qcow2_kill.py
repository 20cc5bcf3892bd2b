"""A process that writes a qcow2 image, killed at any instant: what it had answered is there, and QEMU finds nothing
wrong but, at worst, leaked clusters, which the next opening gives back."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from trivmm.testing.images import ImageDriver, content, qemu_img, why_no_qemu_img

pytestmark = pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img())

SIZE = 16 << 20
BLOCK = 4096
KILLS = 2
LIMIT_S = 60

# Writes blocks that say where they are and when they were written, and notes each before it begins and when it is done.
WRITER = """
import os, random, struct, sys
from trivmm.testing.images import ImageDriver
path, noted, seed, size, block = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
chance = random.Random(seed)
note = os.open(noted, os.O_WRONLY | os.O_APPEND)
driver = ImageDriver(path, image_type="Qcow2")
print("ready", flush=True)
number = seed << 32
while True:
    number += 1
    at = chance.randrange(size // block) * block
    os.write(note, struct.pack("<QQQ", at, number, 0))
    if chance.random() < 0.1:
        driver.discard(at & ~0xffff, 65536)
    else:
        driver.write(at, struct.pack("<QQ", at, number) * (block // 16))
        os.write(note, struct.pack("<QQQ", at, number, 1))
    if chance.random() < 0.02:
        driver.flush()
"""


def kill_one(path: Path, noted: Path, seed: int, after: int) -> None:
    """Once it has noted so much."""
    command = [sys.executable, "-c", WRITER, path, noted, str(seed), str(SIZE), str(BLOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            while noted.stat().st_size < 24 * after:
                assert child.poll() is None
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(LIMIT_S)


def judge(noted: bytes, before: bytes, now: bytes) -> None:
    """Each block is what was written there last and answered; where something was begun and not answered (discards are
    not), its 64 KiB may be anything. What nobody touched is as it was."""
    answered: dict[int, int] = {}
    open_: set[int] = set()
    for at, number, done in struct.iter_unpack("<QQQ", noted):
        if done:
            answered[at] = number
            open_.discard(number)
        else:
            open_.add(number)
    vague = {at // 65536 for at, number, _ in struct.iter_unpack("<QQQ", noted) if number in open_}
    for at in range(0, SIZE, BLOCK):
        if at // 65536 in vague:
            continue
        is_to_be = before[at : at + BLOCK]
        if at in answered:
            is_to_be = struct.pack("<QQ", at, answered[at]) * (BLOCK // 16)
        assert now[at : at + BLOCK] == is_to_be, at


@pytest.mark.parametrize("kind", ["compat=1.1", "compat=0.10", "compat=1.1,cluster_size=4096", "backed"])
def test_what_was_answered_is_there_after_a_kill(tmp_path: Path, kind: str) -> None:
    path, noted = tmp_path / "disk.qcow2", tmp_path / "noted"
    if kind == "backed":
        (tmp_path / "base.img").write_bytes(b"\xba" * SIZE)
        qemu_img("convert", "-c", "-O", "qcow2", tmp_path / "base.img", tmp_path / "base.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    else:
        qemu_img("create", "-q", "-f", "qcow2", "-o", kind, path, str(SIZE))
    read = content(path)
    for seed in range(KILLS):
        noted.write_bytes(b"")
        kill_one(path, noted, seed + 1, 50 + 150 * seed)
        found = json.loads(qemu_img("check", "--output=json", path, accept=(0, 3)).stdout)
        assert found.get("corruptions", 0) == found["check-errors"] == 0
        assert found.get("leaks", 0) <= 20  # of the one step that was cut
        before, read = read, content(path)
        judge(noted.read_bytes(), before, read)
        with ImageDriver(path, image_type="Qcow2") as driver:
            assert driver.read(0, SIZE) == read
            driver.image.flush()
        assert "No errors were found" in qemu_img("check", path).stdout


def test_a_leak_is_given_back_at_the_next_opening(tmp_path: Path) -> None:
    """The instant between two writes, made by hand: clusters that are counted, and nothing refers to them."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    with ImageDriver(path) as driver:
        driver.write(0, random.Random(1).randbytes(1 << 20))  # and no flush: the image is marked
    file = os.open(path, os.O_RDWR)
    table = struct.unpack(">Q", os.pread(file, 8, 40))[0]
    l2 = struct.unpack(">Q", os.pread(file, 8, table))[0] & 0xFFFFFFFFFFFE00
    os.pwrite(file, bytes(8 * 4), l2)
    os.close(file)
    assert json.loads(qemu_img("check", "--output=json", path, accept=(3,)).stdout)["leaks"] == 4
    with ImageDriver(path) as driver:
        assert driver.image.counters()["qcow2_mended"] == 4
        driver.image.flush()
    assert "No errors were found" in qemu_img("check", path).stdout
