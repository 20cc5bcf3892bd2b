"""qcow2 images that QEMU made, written here: QEMU finds nothing wrong with them and reads the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from trivmm.errors import NotSupported
from trivmm.testing.images import ImageDriver, check, content, create, qemu_img, why_no_qemu_img

pytestmark = pytest.mark.skipif(bool(why_no_qemu_img()), reason=why_no_qemu_img())

SECTOR = 512
MIB = 1 << 20
STEPS = 150


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
    size = 20 * MIB
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=512")
    data = random.Random(1).randbytes(MIB) * 20
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


def test_automatic_features_that_are_not_known_are_not_claimed(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    with path.open("r+b") as file:
        file.seek(88)
        file.write(bytes([0, 0, 0, 0, 0, 0, 1, 0]))
    with ImageDriver(path, readonly=True) as driver:
        driver.read(0, MIB)
    assert path.read_bytes()[94] == 1
    ImageDriver(path).close()
    assert path.read_bytes()[88:96] == bytes(8)
    check(path)


def test_an_image_with_bitmaps_is_only_read(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    qemu_img("bitmap", "--add", path, "b0")
    with pytest.raises(NotSupported, match=r"bitmaps .*qemu-img bitmap --remove"):
        ImageDriver(path)
    ImageDriver(path, readonly=True).close()
    qemu_img("bitmap", "--remove", path, "b0")
    with ImageDriver(path) as driver:
        driver.write(0, b"\1" * MIB)
    check(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("extended_l2=on", "extended L2 entries"),
        ("data_file=data.raw", "an external data file"),
    ],
)
def test_what_qemu_makes_and_is_not_there_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    with pytest.raises(NotSupported, match=f"{said}.*not supported yet; .*qemu-img convert"):
        ImageDriver(path)
