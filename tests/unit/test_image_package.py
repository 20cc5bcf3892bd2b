"""Debian packages from strangers: what is in an honest one comes out, and one that lies is refused in one line."""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm.errors import ConfigError
from trivmm.image.package import deb as deb_module
from trivmm.image.package.deb import read_deb
from trivmm.image.package.modinfo import Module, read_module
from trivmm.image.package.modules import Modules
from trivmm.image.package.packed import Damaged, Stream, open_packed
from trivmm.image.package.tar import read_tar
from trivmm.testing import debs

LONG = "/".join(["folder" * 10] * 3) + "/file"


def _all(path: Path) -> dict[str, bytes]:
    return dict(read_deb(path, lambda name: True))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_an_honest_package_gives_its_files(tmp_path: Path, suffix: str, kind: int) -> None:
    files = {"a": b"1" * 513, LONG: b"2" * 100_000, "empty": b"", "last": b"x"}
    package = debs.deb(tmp_path / "p.deb", debs.tar(files, kind), suffix)
    assert _all(package) == files
    assert dict(read_deb(package, lambda name: name == "last")) == {"last": b"x"}


def _with_entry(change: dict[str, Any], data: bytes = b"") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("boot/vmlinuz-1")
        info.size = len(data)
        for name, value in change.items():
            setattr(info, name, value)
        archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_with_entry({"name": "../../etc/passwd"}, b"x"), "leaves the package"),
        (_with_entry({"name": "/etc/passwd"}, b"x"), "leaves the package"),
        (_with_entry({"name": "a/../../b"}, b"x"), "leaves the package"),
        (_with_entry({"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}), "a link"),
        (_with_entry({"type": tarfile.LNKTYPE, "linkname": "/etc/shadow"}), "a link"),
        (_with_entry({"type": tarfile.CHRTYPE}), "a link, a device"),
        (_with_entry({"type": b"S"}), "a kind of entry"),
        (_with_entry({}, b"x")[:1024] + _with_entry({}, b"y"), "twice"),
        (_with_entry({}, b"x" * 600)[:1000], "ends too early"),
        (_with_entry({}, b"x")[:100] + b"1" + _with_entry({}, b"x")[101:], "not a tar archive"),
        (_with_entry({"name": "n" * 70_000}, b"x"), "too long"),
        (_with_entry({"name": b"\xff\xfe".decode(errors="surrogateescape")}, b"x"), "not UTF-8"),
    ],
)
def test_a_tar_that_lies_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    package = debs.deb(tmp_path / "p.deb", content)
    with pytest.raises(ConfigError, match=why) as caught:
        _all(package)
    assert str(package) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not a Debian package"),
        (b"PK\3\4", "not a Debian package"),
        (b"!<arch>\n", "holds no files"),
        (b"!<arch>\n" + b"x" * 60, "damaged"),
        (debs.ar(("debian-binary", b"2.0\n")), "holds no files"),
        (debs.ar(*[(f"m{number}", b"") for number in range(30)], ("data.tar", b"")), "holds no files"),
        (debs.ar(("data.tar.lz4", b"x")), "not known"),
        (debs.ar(("data.tar.xz", b"not xz")), "can't be unpacked"),
        (debs.ar(("data.tar.gz", b"not gz")), "can't be unpacked"),
        (debs.ar(("data.tar.zst", b"not zstd")), "can't be unpacked"),
        (debs.ar(("data.tar.xz", lzma.compress(debs.tar({"a": b"b"}))[:-40])), "can't be unpacked|too early"),
        (debs.ar(("x", b""))[:-12] + b"-5        `\n", "damaged"),
    ],
)
def test_an_archive_that_is_none_is_refused(tmp_path: Path, raw: bytes, why: str) -> None:
    package = tmp_path / "p.deb"
    package.write_bytes(raw)
    with pytest.raises(ConfigError, match=why):
        _all(package)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = debs.deb(tmp_path / "p.deb", debs.tar({"bomb": bytes(3 << 20)}), ".xz")
    assert package.stat().st_size < 4096
    monkeypatch.setattr(deb_module, "MAX_FILE", 1 << 20)
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        _all(package)
    assert dict(read_deb(package, lambda name: False)) == {}
    monkeypatch.setattr(deb_module, "MAX_UNPACKED", 2 << 20)
    with pytest.raises(ConfigError, match="more than there may be"):
        dict(read_deb(package, lambda name: False))


def test_a_decoder_takes_bounded_memory() -> None:
    """A header of a few bytes may ask for a window of 4 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(b"x" * 100, filters=filters))
    assert packed[15:17] == bytes((1, 16))  # LZMA2's properties: one byte, the dictionary's size
    packed[16] = 40  # 4 GiB - 1
    packed[20:24] = struct.pack("<I", zlib.crc32(packed[12:20]))
    with pytest.raises(Damaged, match="can't be unpacked: Memory usage limit"):
        open_packed(io.BytesIO(bytes(packed)), ".xz", 1 << 30).read(1)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), value=st.integers(0, 255), cut=st.integers(0, 4000))
def test_any_damage_is_told_or_harmless(tmp_path: Path, at: int, value: int, cut: int) -> None:
    raw = bytearray(debs.ar(("debian-binary", b"2.0\n"), ("data.tar", debs.tar({"a": b"1" * 600, LONG: b"2"}))))
    raw[at % len(raw)] = value
    package = tmp_path / "p.deb"
    package.write_bytes(raw[: len(raw) - cut])
    try:
        for name, data in read_deb(package, lambda name: True):
            assert not name.startswith("/")
            assert ".." not in name.split("/")
            assert len(data) <= len(raw)
    except ConfigError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_noise_is_no_tar(noise: bytes) -> None:
    try:
        for member in read_tar(Stream(iter([noise]), 1 << 20)):
            member.data(1 << 20)
    except Damaged:
        pass


# --- modules --------------------------------------------------------------------------------------------------------


def test_a_module_says_what_it_needs() -> None:
    data = debs.module(
        "depends=a-b,c", "softdep=pre: crc32c x post: y", "alias=pci:*", "alias=has space", "author=Jos\u00e9"
    )
    module = read_module("kernel/my-one.ko", data)
    assert module == Module("kernel/my-one.ko", ("a_b", "c"), ("crc32c", "x"), ("pci:*",))
    assert module.name == "my_one"


@settings(deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_module_is_refused_or_read(at: int, value: int, cut: int) -> None:
    data = bytearray(debs.module("depends=a"))
    data[at % len(data)] = value
    with contextlib.suppress(Damaged):
        read_module("kernel/x.ko", bytes(data[: len(data) - cut]))


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", debs.program(1), debs.module()[:100]])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        read_module("kernel/x.ko", data)


def _modules(**needs: str) -> Modules:
    loadable = {name: Module(f"kernel/{name}.ko", tuple(text.split()), (), ()) for name, text in needs.items()}
    return Modules(loadable, frozenset({"builtin"}))


def test_modules_come_after_what_they_need() -> None:
    modules = _modules(net="failover ring virtio", failover="", ring="virtio", virtio="builtin", other="ring")
    assert [each.name for each in modules.in_order(["net", "other"])] == ["failover", "virtio", "ring", "net", "other"]
    assert modules.dep(modules.in_order(["net"])) == (
        "kernel/failover.ko:\n"
        "kernel/net.ko: kernel/ring.ko kernel/virtio.ko kernel/failover.ko\n"
        "kernel/ring.ko: kernel/virtio.ko\n"
        "kernel/virtio.ko:\n"
    )
    assert modules.find(["oth-er".replace("-", ""), "builtin"]) == ["other"]
    with pytest.raises(ConfigError, match=r"no such module; did you mean failover\?"):
        modules.find(["failovr"])


def test_a_wish_is_loaded_before_if_it_is_there() -> None:
    wisher = Module("kernel/a.ko", (), ("crc32c", "gone"), ())
    intel = Module("kernel/crc32c-intel.ko", (), (), ("crc32c",))
    modules = Modules({"a": wisher, "crc32c_intel": intel}, frozenset())
    assert [each.name for each in modules.in_order(["a"])] == ["crc32c_intel", "a"]
    assert Modules.alias([wisher, intel]) == "alias crc32c crc32c_intel\n"


def test_modules_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(Damaged, match="needs itself"):
        _modules(a="b", b="c", c="a").in_order(["a"])
    with pytest.raises(Damaged, match="needs itself"):
        _modules(a="a").in_order(["a"])
    with pytest.raises(Damaged, match="needs gone, which is not there"):
        _modules(a="gone").in_order(["a"])
    deep = {f"m{number}": f"m{number + 1}" for number in range(5000)} | {"m5000": ""}
    assert len(_modules(**deep).in_order(["m0"])) == 5001
