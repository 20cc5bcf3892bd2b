"""The file system in memory and the archive that Linux unpacks."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trivmm.errors import ConfigError
from trivmm.image.cpio import cpio
from trivmm.image.extra import add_extra
from trivmm.image.output import replacing, source_date
from trivmm.image.tree import Tree


def unpack(archive: bytes) -> dict[str, tuple[int, bytes, int, tuple[int, int]]]:
    """By path: mode, content, time, device. Reads as Linux does, from the format's description."""
    found: dict[str, tuple[int, bytes, int, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        _, mode, uid, gid, _, time, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid) == (0, 0)
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        assert archive[at + 109 + name_size] == 0
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            assert archive[at:].strip(b"\0") == b""
            return found
        assert name not in found
        found[name] = (mode, archive[at : at + size], time, (major, minor))
        at = (at + size + 3) & ~3


def test_what_is_put_in_comes_out_in_order() -> None:
    tree = Tree()
    tree.file("/usr/bin/x", b"123", 0o755)
    tree.file("a-b", b"")
    tree.folder("a", 0o700)
    tree.file("a/c", b"old")
    tree.file("a/c", b"new")
    tree.link("bin/sh", "busybox")
    tree.character_device("dev/console", 5, 1)
    found = unpack(b"".join(cpio(tree, 7)))
    assert list(found) == ["a", "a/c", "a-b", "bin", "bin/sh", "dev", "dev/console", "usr", "usr/bin", "usr/bin/x"]
    assert found["usr/bin/x"] == (stat.S_IFREG | 0o755, b"123", 7, (0, 0))
    assert found["a"][0] == stat.S_IFDIR | 0o700
    assert found["a/c"][1] == b"new"
    assert found["bin/sh"][:2] == (stat.S_IFLNK | 0o777, b"busybox")
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", 7, (5, 1))


@pytest.mark.parametrize(
    "path", ["", "/", "..", "a/../b", "a//b", "a/./b", "a\nb", "a\0b", "x" * 256, "y/" * 2100 + "z"]
)
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        Tree().file(path, b"")


def test_nothing_lies_in_a_file_and_no_folder_is_replaced() -> None:
    tree = Tree()
    tree.link("bin", "usr/bin")
    with pytest.raises(ConfigError, match="no folder"):
        tree.file("bin/x", b"")
    tree.folder("etc")
    with pytest.raises(ConfigError, match="is a folder"):
        tree.file("etc", b"")


def test_a_users_folder_goes_in_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True, mode=0o750)
    (tmp_path / "in/deep/run").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "in/deep/run").chmod(0o4750)
    (tmp_path / "in/link").symlink_to("/nowhere")
    (tmp_path / "in/to-folder").symlink_to("deep")
    tree = Tree()
    add_extra(tree, f"{tmp_path}/in:/opt/mine/")
    found = unpack(b"".join(cpio(tree, 0)))
    assert found["opt/mine/deep/run"][:2] == (stat.S_IFREG | 0o750, b"#!/bin/sh\n")
    assert found["opt/mine/link"][1] == b"/nowhere"
    assert found["opt/mine/to-folder"][1] == b"deep"
    assert stat.S_IMODE(found["opt/mine/deep"][0]) == 0o750
    root = Tree()
    add_extra(root, f"{tmp_path}/in:/")
    assert {entry.path for entry in root} == {"deep", "deep/run", "link", "to-folder"}


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for given, why in (
        (f"{tmp_path}/fifo:/x", "not a regular file"),
        (f"{tmp_path}:/x", "not a regular file"),
        (f"{tmp_path}/none:/x", "No such file"),
        ("/etc/hostname", "not FILE:/PATH"),
        ("/etc/hostname:etc/x", "not FILE:/PATH"),
        (":/etc/x", "not FILE:/PATH"),
    ):
        with pytest.raises(ConfigError, match=why):
            add_extra(Tree(), given)


def test_an_output_is_whole_or_not_there(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_bytes(b"old")

    def fail() -> None:
        with replacing("--into", place) as partial:
            partial.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert place.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with replacing("--into", place) as partial:
        partial.write_bytes(b"new")
    assert place.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for bad in (tmp_path, place / "x", tmp_path / "none" / "x"):
        with pytest.raises(ConfigError), replacing("--into", bad):
            pass


def test_time_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert source_date() == 0
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert source_date() == 1_700_000_000
    for bad in ("", "-1", "1.5", "now", "4294967296", "\u0661"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", bad)
        with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH"):
            source_date()
