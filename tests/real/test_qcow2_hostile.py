"""qcow2 images that lie: each is an error in one line when it is opened, or an I/O error to the guest, and no file but
the image is written. They are laid out here, byte by byte; no tool would make them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from trivmm.errors import ConfigError, NotSupported
from trivmm.testing.images import ImageDriver, qemu_img, why_no_qemu_img

CLUSTER = 65536
COPIED = 1 << 63
REFTABLE, BLOCK, L1, L2, DATA = (each * CLUSTER for each in range(1, 6))
SIZE = 4 << 20


@attrs.define
class Layout:
    """An image of six clusters: header, refcount table, its block, L1, an L2 table, and one cluster of data, which is
    the disk's first. Fields are changed before it is written."""

    fields: dict[int, tuple[str, int]] = attrs.field(factory=dict)  # of the header, by offset: width and value
    extra: bytes = b""  # after the header of 104 bytes
    l1: list[int] = attrs.field(factory=lambda: [L2 | COPIED])
    l2: list[int] = attrs.field(factory=lambda: [DATA | COPIED])
    reftable: list[int] = attrs.field(factory=lambda: [BLOCK])
    counts: list[int] = attrs.field(factory=lambda: [1] * 6)
    clusters: int = 6  # what is left of the file

    def write(self, path: Path) -> Path:
        header = bytearray(
            struct.pack(
                ">4sIQIIQIIQQIIQQQQII",
                *(b"QFI\xfb", 3, 0, 0, 16, SIZE, 0, len(self.l1), L1, REFTABLE, 1, 0, 0, 0, 0, 0, 4, 104),
            )
        )
        for offset, (width, value) in self.fields.items():
            struct.pack_into(">" + width, header, offset, value)
        parts = [
            bytes(header) + self.extra,
            struct.pack(f">{len(self.reftable)}Q", *self.reftable),
            struct.pack(f">{len(self.counts)}H", *self.counts),
            struct.pack(f">{len(self.l1)}Q", *self.l1),
            struct.pack(f">{len(self.l2)}Q", *self.l2),
            b"\xda" * CLUSTER,
        ]
        path.write_bytes(b"".join(part.ljust(CLUSTER, b"\0") for part in parts)[: self.clusters * CLUSTER])
        return path


def test_the_layout_itself_is_right(tmp_path: Path) -> None:
    path = Layout().write(tmp_path / "disk.qcow2")
    with ImageDriver(path) as driver:
        assert driver.size == SIZE
        assert driver.read(0, SIZE) == (b"\xda" * CLUSTER).ljust(SIZE, b"\0")
        driver.write(CLUSTER // 2, b"\1" * CLUSTER)
        driver.image.flush()
    if not why_no_qemu_img():
        qemu_img("check", path)


HEADERS = {
    "version": ({4: ("I", 4)}, "version is 4: neither 2 nor 3"),
    "cluster_bits, too few": ({20: ("I", 8)}, "cluster_bits is 8: out of range, 9 to 21"),
    "cluster_bits, absurd": ({20: ("I", 0xFFFFFFFF)}, "cluster_bits is 0xffffffff: out of range"),
    "size, absurd": ({24: ("Q", (1 << 64) - 1)}, "size is 0xffffffffffffffff: larger than any disk"),
    "size beyond L1": ({24: ("Q", 1 << 40)}, "l1_size is 1: too few entries for a disk of this size"),
    "encryption": ({32: ("I", 2)}, "crypt_method is 2: an encrypted image, not supported yet"),
    "l1_size that overflows": ({36: ("I", 0xFFFFFFFF)}, "l1_size is 0xffffffff: more than 4194304 entries"),
    "l1_size past the end": ({36: ("I", 1 << 20)}, "l1_table_offset is 0x30000: it goes past the end of the file"),
    "L1 in the header": ({40: ("Q", 0)}, "l1_table_offset is 0: it lies on the header"),
    "L1 askew": ({40: ("Q", L1 + 512)}, "l1_table_offset is 0x30200: not at the beginning of a cluster"),
    "L1 far away": ({40: ("Q", 1 << 63)}, "l1_table_offset is 0x8000000000000000: not at the beginning"),
    "L1 on the refcount table": ({40: ("Q", REFTABLE)}, "lies on another table"),
    "no refcount table": ({56: ("I", 0)}, "refcount_table_clusters is 0: out of range, 1 to 128"),
    "refcount table, too large": ({56: ("I", 0x10001)}, "refcount_table_clusters is 0x10001: out of range"),
    "refcount table past the end": ({48: ("Q", 1 << 40)}, "refcount_table_offset is 0x10000000000: it goes past"),
    "external data": ({72: ("Q", 4)}, "incompatible_features is 4: an external data file, not supported yet"),
    "extended L2": (
        {72: ("Q", 16)},
        r"incompatible_features is 16: extended L2 entries \(subclusters\), not supported yet",
    ),
    "unknown feature": ({72: ("Q", 1 << 40)}, "incompatible_features is 0x10000000000: a feature that is not known"),
    "bitmaps": ({88: ("Q", 1)}, "autoclear_features is 1: bitmaps that writes would make wrong, not supported yet"),
    "corrupt": ({72: ("Q", 2)}, "incompatible_features is 2: somebody found it corrupt"),
    "refcount_order": ({96: ("I", 7)}, "refcount_order is 7: out of range, 0 to 6"),
    "header_length": ({100: ("I", 0xFFFFFFF8)}, "header_length is 0xfffffff8: out of range"),
    "header_length, odd": ({100: ("I", 107)}, "header_length is 107: out of range, or no multiple of 8"),
    "compression without its bit": ({100: ("I", 112)}, "compression_type is 1: contradicts the feature bit"),
    "backing name, too long": ({8: ("Q", 512), 16: ("I", 1024)}, "backing_file_size is 1024: more than 1023 bytes"),
    "backing name outside": (
        {8: ("Q", CLUSTER - 4), 16: ("I", 8)},
        "backing_file_offset is 65532: the name lies outside",
    ),
    "backing name of zeros": ({8: ("Q", 512), 16: ("I", 8)}, "backing_file is 512: the name has a zero byte in it"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_by_field_and_value(tmp_path: Path, name: str) -> None:
    fields, said = HEADERS[name]
    path = Layout(fields=fields, extra=b"\1").write(tmp_path / "disk.qcow2")
    before, open_before = path.read_bytes(), os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=f"qcow2: .*{said}") as caught:
        ImageDriver(path)
    assert str(caught.value).startswith(f'disks.path = "{path}": qcow2: ')
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, NotSupported) == ("not supported yet" in said)
    assert path.read_bytes() == before
    assert os.listdir("/proc/self/fd") == open_before


TABLES = {
    "L2 on the header": (Layout(l1=[COPIED | 1 << 9]), "l1_table is 512: entry 0 is not the beginning of a cluster"),
    "L2 on the L1 table": (Layout(l1=[L1 | COPIED]), "l1_table is 0x30000: entry 0 lies on another table"),
    "L2 past the end": (Layout(l1=[1 << 40 | COPIED]), "l1_table is 0x10000000000: entry 0 goes past the end"),
    "L2 askew": (Layout(l1=[L2 + 4096 | COPIED]), "l1_table is 0x41000: entry 0 is not the beginning of a cluster"),
    "reserved bits": (Layout(l1=[L2 | 1 << 60]), "l1_table is 0x1000000000000000: reserved bits are set in entry 0"),
    "one L2 twice": (Layout(l1=[L2 | COPIED] * 2), "l1_table is 0x40000: entry 1 lies on another table"),
    "block past the end": (Layout(reftable=[1 << 41]), "refcount_table is 0x20000000000: entry 0 goes past the end"),
    "block askew": (Layout(reftable=[BLOCK + 1]), "refcount_table is 1: reserved bits are set in entry 0"),
    "block on the L2 table": (Layout(reftable=[L2]), "refcount_table is 0x40000: entry 0 lies on another table"),
    "one block twice": (Layout(reftable=[BLOCK] * 2), "refcount_table is 0x20000: entry 1 lies on another table"),
    "block on its own table": (Layout(reftable=[REFTABLE]), "refcount_table is 0x10000: entry 0 lies on another table"),
    "truncated in L1": (Layout(clusters=3), "l1_table_offset is 0x30000: it goes past the end of the file"),
    "truncated before L2": (Layout(clusters=4), "l1_table is 0x40000: entry 0 goes past the end of the file"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_overlap_or_point_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    layout, said = TABLES[name]
    path = layout.write(tmp_path / "disk.qcow2")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"qcow2: {said}.*qemu-img check"):
        ImageDriver(path)
    assert path.read_bytes() == before


def squeezed(at: int, sectors: int) -> int:
    return 1 << 62 | sectors << 54 | at


ENTRIES = {
    "the header": COPIED,
    "an L2 table": L2 | COPIED,
    "the refcount block": BLOCK | COPIED,
    "the L1 table": L1 | COPIED,
    "past the end": 1 << 40 | COPIED,
    "askew": DATA + 512 | COPIED,
    "reserved bits": DATA | 1 << 57,
    "compressed, of the header": squeezed(16, 0),
    "compressed, past the end": squeezed(1 << 40, 3),
    "compressed, of nonsense": squeezed(DATA, 127),
    "compressed, on and on": squeezed(DATA + CLUSTER - 1, 255),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_lies_is_an_io_error_and_its_neighbours_are_fine(tmp_path: Path, name: str) -> None:
    path = Layout(l2=[ENTRIES[name], DATA | COPIED], counts=[1] * 6).write(tmp_path / "disk.qcow2")
    with ImageDriver(path) as driver:
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                driver.read(512, 1024)
            with pytest.raises(OSError, match="Input/output error"):
                driver.write(512, b"\1" * 1024)
        assert driver.image.counters()["qcow2_spoilt"] >= 4
        assert driver.read(CLUSTER, CLUSTER) == b"\xda" * CLUSTER
        driver.flush()
        driver.flush()
        assert path.read_bytes() == before  # not one of its tables was written
        driver.write(CLUSTER, b"\2" * CLUSTER)
        driver.write(2 * CLUSTER, b"\3" * CLUSTER)
        assert driver.read(CLUSTER, 2 * CLUSTER) == b"\2" * CLUSTER + b"\3" * CLUSTER


def test_a_table_that_counts_itself_as_free_is_not_overwritten(tmp_path: Path) -> None:
    path = Layout(counts=[0] * 6).write(tmp_path / "disk.qcow2")
    with ImageDriver(path) as driver:
        failed = 0
        for number in range(1, 8):
            try:
                driver.write(number * CLUSTER, b"\1" * CLUSTER)
            except OSError:
                failed += 1
        assert failed == 5  # once for each table that it was offered
        assert driver.read(7 * CLUSTER, CLUSTER) == b"\1" * CLUSTER
        assert driver.image.counters()["qcow2_spoilt"] == 5
    ImageDriver(path).close()  # its tables are still there


def test_a_disk_of_whatever_size_takes_no_memory_for_what_is_not_there(tmp_path: Path) -> None:
    """2 PiB, with an L1 table of 32 MiB of holes."""
    path = tmp_path / "disk.qcow2"
    Layout(fields={24: ("Q", 1 << 51), 36: ("I", 1 << 22), 40: ("Q", 8 * CLUSTER)}).write(path)
    os.truncate(path, 8 * CLUSTER + (32 << 20))
    with ImageDriver(path) as driver:
        last = driver.size - 512
        assert driver.read(last, 512) == bytes(512)
        driver.write(last, b"\7" * 512)
        assert driver.read(last, 512) == b"\7" * 512
        driver.zero(1 << 40, 4 << 30, unmap=True)  # nothing is there, so nothing is done
    assert path.stat().st_blocks * 512 < 2 << 20


def test_a_file_that_ends_within_a_cluster_of_data_reads_as_zeros_there(tmp_path: Path) -> None:
    path = Layout().write(tmp_path / "disk.qcow2")
    os.truncate(path, DATA + 4096)
    with ImageDriver(path) as driver:
        assert driver.read(0, CLUSTER) == (b"\xda" * 4096).ljust(CLUSTER, b"\0")


def test_an_image_that_is_dirty_and_can_t_be_mended_is_refused(tmp_path: Path) -> None:
    path = Layout(fields={72: ("Q", 1)}, l2=[DATA | COPIED, L2 | COPIED]).write(tmp_path / "disk.qcow2")
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=r"was not closed, and can't be mended here: its tables contradict .*qemu-img"
    ):
        ImageDriver(path)
    assert path.read_bytes() == before
    with ImageDriver(path, readonly=True) as driver:
        assert driver.read(0, 512) == b"\xda" * 512


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed (Debian: apt install gcc)")
@pytest.mark.parametrize(("library", "compression"), [("libz.so.1", 0), ("libzstd.so.1", 1)])
def test_a_library_that_is_missing_is_named(tmp_path: Path, library: str, compression: int) -> None:
    source = tmp_path / "missing.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <dlfcn.h>\n#include <string.h>\n"
        "void *dlopen(const char *name, int flags) {\n"
        f'    if (name && !strcmp(name, "{library}")) return 0;\n'
        '    return ((void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen"))(name, flags);\n}\n'
    )
    made = tmp_path / "missing.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True, timeout=60)
    layout = Layout(fields={100: ("I", 112), 72: ("Q", 8 if compression else 0)}, extra=bytes([compression]))
    path = layout.write(tmp_path / "disk.qcow2")
    ImageDriver(path).close()
    program = (
        "import sys\nfrom trivmm.errors import ConfigError\nfrom trivmm.testing.images import ImageDriver\n"
        "try:\n    ImageDriver(sys.argv[1])\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={**os.environ, "LD_PRELOAD": str(made)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"qcow2: compression_type is {compression}: this system has no {library}, which that needs" in done.stdout
    assert "apt install" in done.stdout


# --- backing files ----------------------------------------------------------------------------------------------------


def backed(path: Path, name: str, said: str | None = "raw", *, image_type: str = "Qcow2") -> Path:
    """An image of nothing but its backing file's name."""
    extension = b"" if said is None else struct.pack(">II", 0xE2792ACA, len(said)) + said.encode().ljust(8, b"\0")
    extra = extension.ljust(408, b"\0") + os.fsencode(name)
    fields = {8: ("Q", 512), 16: ("I", len(os.fsencode(name)))}
    return Layout(fields=fields, extra=extra, l2=[]).write(path)


def refuse(path: Path, said: str, **more: object) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=said) as caught:
        ImageDriver(path, **{"image_type": "Qcow2", **more})
    assert "\n" not in str(caught.value)
    assert os.listdir("/proc/self/fd") == before


def read(path: Path, **more: object) -> bytes:
    with ImageDriver(path, **{"image_type": "Qcow2", **more}) as driver:
        return driver.read(0, 4096)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.raw"
    path.write_bytes(b"\x5e" * 8192)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    (made / "bases").mkdir(parents=True)
    (made / "bases" / "base.raw").write_bytes(b"\xba" * 8192)
    return made


def test_a_backing_file_lies_beneath_the_image_s_folder(folder: Path, secret: Path) -> None:
    for name in ("bases/base.raw", "./bases/base.raw", "bases/../bases/base.raw", f"{folder}/bases/base.raw"):
        assert read(backed(folder / "top.qcow2", name)) == b"\xba" * 4096
    (folder / "bases" / "link.raw").symlink_to("base.raw")
    assert read(backed(folder / "top.qcow2", "bases/link.raw")) == b"\xba" * 4096
    (folder / "bases" / "out.raw").symlink_to(secret)
    (folder / "outside").symlink_to(secret.parent)
    for name in ("../secret.raw", str(secret), "bases/../../secret.raw", "bases/out.raw", "outside/secret.raw"):
        path = backed(folder / "top.qcow2", name)
        refuse(path, "lies outside .*give backing_files=on")
        assert read(path, backing_files=True) == b"\x5e" * 4096  # who asks for it gets it


def test_a_chain_is_relative_to_each_of_its_images(folder: Path) -> None:
    backed(folder / "bases" / "middle.qcow2", "base.raw")
    assert read(backed(folder / "top.qcow2", "bases/middle.qcow2", "qcow2")) == b"\xba" * 4096


def test_a_format_that_was_guessed_opens_no_other_file(folder: Path) -> None:
    path = backed(folder / "top.qcow2", "bases/base.raw")
    refuse(path, "not opened for an image whose format was guessed; give image_type=qcow2", image_type="Unknown")
    with ImageDriver(path, image_type="Raw") as driver:
        assert driver.read(0, 4) == b"QFI\xfb"


@pytest.mark.parametrize(
    ("name", "said", "problem"),
    [
        ("bases/base.raw", None, "does not say which format its backing file has; say it"),
        ("bases/base.raw", "vmdk", "backing file's format is 'vmdk', and only raw and qcow2"),
        ("bases/base.raw", "qcow2", "magic is 0: not a qcow2 image"),
        ("nothing.raw", "raw", "nothing.raw.*can't be opened .*No such file"),
        ("bases", "raw", "a directory"),
        (".", "raw", "a directory"),
        ("json:{}", "raw", "can't be opened"),
        ("nbd://host/x", "raw", "can't be opened"),
        ("/proc/self/fd/0", "raw", "outside"),
        ("top.qcow2", "qcow2", "names itself as its backing file"),
        ("a\nb\x1b[31m", "raw", "can't be opened"),
    ],
)
def test_backing_files_that_are_refused(folder: Path, name: str, said: str | None, problem: str) -> None:
    refuse(backed(folder / "top.qcow2", name, said), problem)


def test_a_chain_that_loops_or_is_too_deep_is_refused(folder: Path) -> None:
    backed(folder / "one.qcow2", "two.qcow2", "qcow2")
    backed(folder / "two.qcow2", "one.qcow2", "qcow2")
    refuse(folder / "one.qcow2", "is its own backing file, by detours")
    for number in range(11):
        backed(
            folder / f"{number}.qcow2",
            f"{number + 1}.qcow2" if number < 10 else "bases/base.raw",
            "qcow2" if number < 10 else "raw",
        )
    assert read(folder / "1.qcow2") == b"\xba" * 4096
    refuse(folder / "0.qcow2", "more than 10 backing files behind it")


def test_backing_files_are_shared_and_nobody_writes_to_them(folder: Path) -> None:
    base = folder / "bases" / "base.raw"
    one, two = (backed(folder / f"{name}.qcow2", "bases/base.raw") for name in ("one", "two"))
    with ImageDriver(one, image_type="Qcow2") as first, ImageDriver(two, image_type="Qcow2") as second:
        first.write(0, b"\1" * 4096)
        second.write(0, b"\2" * 4096)
        assert first.read(0, 8192) == b"\1" * 4096 + b"\xba" * 4096
        assert second.read(0, 8192) == b"\2" * 4096 + b"\xba" * 4096
        with pytest.raises(ConfigError, match="in use by another VM"):
            ImageDriver(base)
        ImageDriver(base, readonly=True).close()
    assert base.read_bytes() == b"\xba" * 8192


def test_an_image_that_is_not_of_the_format_said_is_one_line(tmp_path: Path, secret: Path) -> None:
    refuse(secret, "no qcow2 image but a raw one; give the image_type that it has")
    secret.write_bytes(b"vhdxfile".ljust(4096, b"\0"))
    refuse(secret, "no qcow2 image but a VHDX image")
