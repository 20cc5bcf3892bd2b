"""qcow2 images that QEMU made, written here: QEMU finds nothing wrong with them and reads the same bytes."""

from __future__ import annotations

import errno
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from trivmm.errors import ConfigError, MigrationError
from trivmm.testing.images import ImageDriver, qemu_img, why_no_qemu_img

pytestmark = pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img())

SECTOR = 512
MIB = 1 << 20
STEPS = 250


def create(path: Path, size: int, options: str = "", backing: tuple[Path, str] | None = None) -> Path:
    extra = [] if backing is None else ["-b", backing[0].name, "-F", backing[1]]
    chosen = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *chosen, *extra, path, str(size))
    return path


def check(path: Path) -> None:
    said = qemu_img("check", path).stdout
    assert "No errors were found" in said


def content(path: Path) -> bytes:
    """What QEMU reads."""
    raw = path.with_suffix(".content")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def squeezable(seed: object, length: int) -> bytes:
    """Half of it is left when it is compressed; what can't be QEMU stores as it is."""
    return random.Random(repr(seed)).randbytes(length).translate(bytes(each & 15 for each in range(256)))


def make_base(folder: Path, kind: str, data: bytes) -> tuple[Path, str]:
    raw = folder / "base.raw"
    raw.write_bytes(data)
    if kind == "raw":
        return raw, "raw"
    made = folder / "base.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, made)
    return made, "qcow2"


class Model:
    """What must be in the disk, beside the disk."""

    def __init__(self, seed: int, driver: ImageDriver, data: bytearray) -> None:
        self.chance, self.driver, self.data = random.Random(seed), driver, data

    def somewhere(self) -> tuple[int, int]:
        size = len(self.data)
        at = self.chance.randrange(size // SECTOR) * SECTOR
        length = SECTOR * self.chance.choice([1, 8, self.chance.randrange(1, 200), self.chance.randrange(1, 2048)])
        return at, min(length, size - at)

    def step(self) -> None:
        at, length = self.somewhere()
        match self.chance.choice(["write"] * 5 + ["read", "read", "discard", "zero", "flush"]):
            case "write":
                self.data[at : at + length] = written = self.chance.randbytes(length)
                self.driver.write(at, written)
            case "read":
                assert self.driver.read(at, length) == self.data[at : at + length]
            case "discard":
                self.driver.discard(at, length)
                now = self.driver.read(at, length)
                for each in range(0, length, SECTOR):
                    before = self.data[at + each : at + each + SECTOR]
                    assert now[each : each + SECTOR] in (bytes(SECTOR), bytes(before))
                self.data[at : at + length] = now
            case "zero":
                self.driver.zero(at, length, unmap=self.chance.random() < 0.5)
                self.data[at : at + length] = bytes(length)
            case _:
                self.driver.flush()


# version, cluster size, further options, what is behind it
KINDS = [
    ("1.1", 65536, "", None),
    ("1.1", 65536, "", "raw"),
    ("1.1", 65536, "lazy_refcounts=on", "zlib"),
    ("1.1", 4096, "refcount_bits=1", "zstd"),
    ("1.1", 512, "refcount_bits=64", None),
    ("1.1", 512, "refcount_bits=2", "raw"),
    ("1.1", 2 * MIB, "refcount_bits=8", "zlib"),
    ("1.1", 65536, "preallocation=metadata", None),
    ("0.10", 65536, "", None),
    ("0.10", 512, "", "zlib"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(each) for each in kind if each))
def test_whatever_is_done_qemu_reads_the_same(tmp_path: Path, kind: tuple[str, int, str, str | None]) -> None:
    compat, cluster, options, behind = kind
    size = 6 * MIB + 3 * SECTOR
    data, base = bytearray(size), None
    if behind is not None:
        below = bytearray(squeezable(kind, 3 * MIB + SECTOR))  # shorter than the image
        below[MIB : 2 * MIB] = bytes(MIB)
        data[: len(below)] = below
        base = make_base(tmp_path, behind, bytes(below))
    path = create(tmp_path / "disk.qcow2", size, f"compat={compat},cluster_size={cluster},{options}".rstrip(","), base)
    for number in range(3):  # what the one left behind the next one finds
        with ImageDriver(path, image_type="Qcow2") as driver:
            assert driver.size == size
            assert driver.read(0, size) == data
            assert number or bool(driver.image.counters()["qcow2_inflated"]) == (behind in ("zlib", "zstd"))
            model = Model(number, driver, data)
            for _ in range(STEPS // 3):
                model.step()
            assert driver.read(0, size) == data
            assert driver.image.counters()["qcow2_spoilt"] == 0
    check(path)
    assert content(path) == data


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_an_image_of_compressed_clusters_is_read_and_written(tmp_path: Path, kind: str) -> None:
    """As a distribution's cloud image is one, without anything behind it."""
    data = bytearray(squeezable(kind, MIB // 2) * 4)
    path, _ = make_base(tmp_path, kind, bytes(data))
    with ImageDriver(path) as driver:
        assert driver.read(0, len(data)) == data
        assert driver.image.counters()["qcow2_inflated"] >= len(data) // 65536
        model = Model(1, driver, data)
        for _ in range(STEPS):
            model.step()
    check(path)
    assert content(path) == data


def test_clusters_that_were_given_up_are_used_again_after_a_flush(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 64 * MIB)
    with ImageDriver(path) as driver:
        for _ in range(8):
            driver.write(0, b"\xaa" * (8 * MIB))
            driver.discard(0, 8 * MIB)
            driver.flush()
        assert path.stat().st_size < 20 * MIB
        assert path.stat().st_blocks * 512 < 2 * MIB  # and what is free takes no room
    check(path)


def test_a_refcount_table_grows(tmp_path: Path) -> None:
    """One cluster of it covers 8 MiB where clusters have 512 bytes."""
    size = 40 * MIB
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=512")
    data = random.Random(1).randbytes(MIB) * 40
    with ImageDriver(path) as driver:
        for at in range(0, size, MIB):
            driver.write(at, data[at : at + MIB])
        assert driver.read(0, size) == data
    check(path)
    assert content(path) == data


def test_internal_snapshots_stay_as_they_were(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB)
    before = random.Random(1).randbytes(4 * MIB)
    with ImageDriver(path) as driver:
        driver.write(0, before)
    qemu_img("snapshot", "-c", "then", path)
    data = bytearray(before)
    with ImageDriver(path) as driver:
        model = Model(2, driver, data)
        for _ in range(STEPS):
            model.step()
    check(path)
    assert content(path) == data
    old = tmp_path / "old.raw"
    qemu_img("convert", "-l", "then", "-O", "raw", path, old)
    assert old.read_bytes() == before
    qemu_img("snapshot", "-d", "then", path)
    check(path)


async def test_queue_workers_side_by_side(tmp_path: Path) -> None:
    """Each has its own part of the disk, whose borders lie inside clusters; all share tables and allocations."""
    size, workers = 8 * MIB, 4
    base = make_base(tmp_path, "zlib", squeezable(9, size // 2))
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=4096", base)
    share = size // workers + 3 * SECTOR
    parts: list[tuple[int, bytearray]] = []
    with ImageDriver(path, image_type="Qcow2") as driver, trio.fail_after(120):
        whole = driver.read(0, size)

        def work(number: int) -> None:
            first = number * share
            part = bytearray(whole[first : first + share])
            parts.append((first, part))
            chance = random.Random(number)
            for _ in range(STEPS):
                at = chance.randrange(len(part) // SECTOR) * SECTOR
                length = min(SECTOR * chance.randrange(1, 64), len(part) - at)
                match chance.choice(["write", "write", "read", "zero", "discard", "flush"]):
                    case "write":
                        part[at : at + length] = written = chance.randbytes(length)
                        driver.write(first + at, written)
                    case "read":
                        assert driver.read(first + at, length) == part[at : at + length]
                    case "zero":
                        driver.zero(first + at, length, unmap=True)
                        part[at : at + length] = bytes(length)
                    case "discard":
                        driver.discard(first + at, length)
                        part[at : at + length] = driver.read(first + at, length)
                    case _:
                        driver.flush()

        async with trio.open_nursery() as nursery:
            for number in range(workers):
                nursery.start_soon(trio.to_thread.run_sync, work, number)
        for first, part in parts:
            assert driver.read(first, len(part)) == part
        assert driver.image.counters()["qcow2_spoilt"] == 0
    check(path)


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


def test_two_sides_take_turns(tmp_path: Path) -> None:
    """Each keeps its image open while the other one writes, as the two hosts of a migration do, to and fro."""
    size = 8 * MIB
    base = make_base(tmp_path, "zstd", squeezable(5, size // 2))
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=4096", base)
    with (
        ImageDriver(path, image_type="Qcow2") as one,
        ImageDriver(path, image_type="Qcow2", lock=False) as other,
    ):
        data = bytearray(one.read(0, size))
        here, there = one, other
        for turn in range(8):
            model = Model(turn, here, data)
            for _ in range(40):
                model.step()
            here.image.flush()
            here.image.release_lock()
            there.image.refresh()  # before it has the lock: a look, no more
            there.image.take_lock()
            there.image.refresh()
            assert there.read(0, size) == data
            here, there = there, here
        here.image.flush()
    check(path)
    assert content(path) == data


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
