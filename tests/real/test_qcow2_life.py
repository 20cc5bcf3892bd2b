"""A qcow2 image over its life: opened after a crash, marked while it changes, handed from side to side, out of room."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trivmm.errors import ConfigError, MigrationError
from trivmm.testing.images import ImageDriver, check, content, create, qemu_img, why_no_qemu_img

pytestmark = pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img())

SECTOR = 512
MIB = 1 << 20


def test_dirty_images_are_mended_when_they_are_opened(tmp_path: Path) -> None:
    """QEMU, killed with lazy refcounts: clusters are used that no refcount says are."""
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "lazy_refcounts=on")
    told = "write -P 7 0 2M", "flush", "abort"
    arguments = [each for command in told for each in ("-c", command)]
    subprocess.run(["qemu-io", *arguments, path], capture_output=True, timeout=60, check=False)
    assert qemu_img("check", path, accept=(2,)).stdout
    with ImageDriver(path, readonly=True) as driver:  # nobody writes to it, and what it maps is right
        assert driver.read(0, 2 * MIB) == b"\7" * (2 * MIB)
    with ImageDriver(path) as driver:
        assert driver.image.counters()["qcow2_mended"] >= 32
        assert driver.read(0, 2 * MIB) == b"\7" * (2 * MIB)
        driver.write(3 * MIB, b"\1" * MIB)
        driver.image.flush()
    check(path)


def test_a_mark_that_says_dirty_goes_with_the_flush_after_the_last_change(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB)

    def marked() -> bool:
        return bool(path.read_bytes()[79] & 1)

    with ImageDriver(path) as driver:
        driver.read(0, MIB)
        assert not marked()
        driver.write(0, b"\1" * SECTOR)
        assert marked()
        driver.flush()
        driver.flush()
        assert not marked()
        driver.write(0, b"\2" * SECTOR)  # in place: nothing that could be half done
        assert not marked()
        driver.write(MIB, b"\2" * SECTOR)
        assert marked()
        driver.image.flush()  # as before a migration
        assert not marked()
    check(path)


def test_a_side_that_is_not_locked_writes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    with ImageDriver(path) as one:
        one.write(0, b"\1" * SECTOR)
        before = path.read_bytes()
        assert before[79] & 1  # its user is at work
        with ImageDriver(path, lock=False) as other:
            other.image.refresh()
            assert other.size == MIB
            with pytest.raises(ConfigError, match="in use by another VM"):
                other.image.take_lock()
        assert path.read_bytes() == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond 1 MiB: as a full disk, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, heard)


def test_a_write_that_finds_no_room_is_an_error_and_no_more(tmp_path: Path, small_files: None) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB)
    data = bytearray(4 * MIB)
    with ImageDriver(path) as driver:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        failed = written = 0
        for at in range(0, 4 * MIB, 65536):
            try:
                driver.write(at, b"\5" * 4096)
            except OSError as error:
                failed += error.errno == errno.EFBIG
            else:
                data[at : at + 4096] = b"\5" * 4096
                written += 1
        assert failed
        assert written
        assert failed + written == 64
        assert driver.read(0, 4 * MIB) == data
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        driver.write(0, b"\6" * MIB)  # room again
        data[:MIB] = b"\6" * MIB
        driver.image.flush()
    check(path)
    assert content(path) == data


def test_what_was_lost_at_a_flush_is_said_at_every_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trivmm.virtio.block import qcow2

    path = create(tmp_path / "disk.qcow2", MIB)

    class Failing:
        def __getattr__(self, name: str) -> object:
            return (lambda *_: -1) if name == "tv_qcow2_settle" else getattr(real, name)

    real = qcow2.lib
    with ImageDriver(path) as driver:
        monkeypatch.setattr(qcow2, "lib", Failing())
        with pytest.raises(MigrationError, match="can't be flushed"):
            driver.image.flush()
        monkeypatch.setattr(qcow2, "lib", real)
        with pytest.raises(MigrationError, match="can't be flushed"):
            driver.image.flush()


FAILING_SYNC = """#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
unsigned long calls;
int fdatasync(int fd)
{
    if (++calls == strtoul(getenv("FAIL_AT"), 0, 10)) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}
"""
WRITER = """import ctypes, random, sys
from trivmm.testing.images import ImageDriver
piece = random.Random(1).randbytes(1 << 20)
failed = 0
with ImageDriver(sys.argv[1]) as driver:
    for at in range(int(sys.argv[2])):
        for tries in range(3):
            try:
                driver.write(at << 20, piece)
                break
            except OSError:
                failed += 1
        else:
            raise SystemExit("it does not heal")
    syncs = ctypes.c_ulong.in_dll(ctypes.CDLL(None), "calls").value
    for _ in range(3):
        try:
            driver.flush()
        except OSError:
            failed += 1
print(failed, syncs)
"""


@pytest.fixture(scope="session")
def failing_sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preload")
    (folder / "sync.c").write_text(FAILING_SYNC)
    command = ["gcc", "-shared", "-fPIC", "-o", folder / "sync.so", folder / "sync.c"]
    subprocess.run(command, check=True, timeout=60)
    return folder / "sync.so"


def written_while_a_sync_fails(failing_sync: Path, path: Path, mib: int, fail_at: int) -> tuple[int, int]:
    """(calls that failed, syncs before the three flushes at the end)"""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, path, str(mib)],
        env={**os.environ, "LD_PRELOAD": str(failing_sync), "FAIL_AT": str(fail_at)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    failed, syncs = map(int, done.stdout.split())
    return failed, syncs


def is_marked(path: Path) -> bool:
    return bool(path.read_bytes()[79] & 1)


def test_whichever_sync_fails_the_tables_stay_right(tmp_path: Path, failing_sync: Path) -> None:
    """Its refcount table grows three times meanwhile; an image that is marked is mended by whoever opens it next."""
    mib, data = 20, random.Random(1).randbytes(MIB) * 20
    make = lambda at: create(tmp_path / f"{at}.qcow2", mib * MIB, "cluster_size=512")  # noqa: E731
    _, syncs = written_while_a_sync_fails(failing_sync, make(0), mib, 0)
    assert syncs > 10
    for fail_at in (*range(1, syncs, 8), syncs, syncs + 1):
        path = make(fail_at)
        failed, _ = written_while_a_sync_fails(failing_sync, path, mib, fail_at)
        assert failed >= 1
        if fail_at > syncs:
            assert is_marked(path), "what is durable is not known any more, whatever later flushes say"
        ImageDriver(path).close()
        qemu_img("check", path, accept=(0, 3))  # 3: clusters are leaked, and nothing else
        assert content(path) == data
        path.unlink()


def test_a_cluster_that_hundreds_share_is_mended_to_all_of_them(tmp_path: Path) -> None:
    """QEMU packs compressed clusters: some 800 of this kind lie in one cluster of the image."""
    plain, path = tmp_path / "plain", tmp_path / "disk.qcow2"
    plain.write_bytes(b"".join(bytes([1 + at % 255]) * 65536 for at in range(1500)))
    qemu_img("convert", "-c", "-O", "qcow2", plain, path)
    image = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    counts = struct.unpack_from(">32768H", image, block)
    shared = [cluster for cluster, count in enumerate(counts) if count > 255]
    assert shared
    for wrong in (3, 255, 300):
        for cluster in shared:
            struct.pack_into(">H", image, block + 2 * cluster, wrong)
        image[79] |= 1  # it was not closed
        path.write_bytes(image)
        ImageDriver(path).close()
        mended = path.read_bytes()
        assert struct.unpack_from(">32768H", mended, block) == counts
        check(path)
