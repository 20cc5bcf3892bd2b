"""cloud-init's seed: an ISO 9660, read back as the standard says, and by isoinfo and blkid where they are."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from trivmm.cli.cloud_init import parse_cloud_init
from trivmm.errors import ConfigError
from trivmm.image.iso9660 import iso9660, label_of
from trivmm.image.seed import make_seed

FILES = {"user-data": b"#cloud-config\nhostname: x\n", "meta-data": b"instance-id: a\n", "network-config": b"v" * 5000}


def _both(raw: bytes) -> int:
    """A number in both orders: they say the same."""
    half = len(raw) // 2
    little, big = int.from_bytes(raw[:half], "little"), int.from_bytes(raw[half:], "big")
    assert little == big
    return little


def read_iso(image: bytes) -> dict[str, bytes]:
    """By Rock Ridge name, as ECMA-119 and SUSP say; every place is looked at for being inside."""
    assert len(image) % 2048 == 0
    volume = image[16 * 2048 : 17 * 2048]
    assert volume[:7] == b"\1CD001\1"
    assert _both(volume[80:88]) * 2048 == len(image)
    assert _both(volume[128:132]) == 2048
    assert image[17 * 2048 : 17 * 2048 + 7] == b"\xffCD001\1"
    root = volume[156:190]
    at, size = _both(root[2:10]) * 2048, _both(root[10:18])
    (path_sector,) = struct.unpack_from("<I", volume, 140)
    (path_root,) = struct.unpack_from("<I", image, path_sector * 2048 + 2)
    assert path_root * 2048 == at
    found, end, order = {}, at + size, []
    while at < end and image[at]:
        record = image[at : at + image[at]]
        at += len(record)
        name = record[33 : 33 + record[32]]
        system = record[33 + record[32] + (1 - record[32] % 2) :]
        if name == b"\0":
            assert system.startswith(b"SP\7\1\xbe\xef\0")
        if name in (b"\0", b"\1"):
            assert record[25] == 2
            continue
        order.append(name)
        names = []
        while len(system) >= 4:
            if system[:2] == b"NM":
                names.append(system[5 : system[2]].decode())
            system = system[system[2] :]
        start, length = _both(record[2:10]) * 2048, _both(record[10:18])
        assert start + length <= len(image)
        found["".join(names)] = image[start : start + length]
    assert order == sorted(order)
    return found


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 2049])
def test_the_files_come_out(size: int) -> None:
    files = {**FILES, "vendor-data": b"z" * size}
    image = make_seed(files, 1_700_000_000)
    assert read_iso(image) == files
    assert label_of(image) == "CIDATA"
    assert len(image) == 1 << 20  # whoever looks for a file system finds no end before its own place
    assert make_seed(files, 1_700_000_000) == image


def test_without_meta_data_the_content_is_the_instance() -> None:
    first, again = (read_iso(make_seed({"user-data": b"a"}, time)) for time in (0, 5))
    other = read_iso(make_seed({"user-data": b"b"}, 0))
    assert first["meta-data"].startswith(b"instance-id: iid-")
    assert first == again
    assert first["meta-data"] != other["meta-data"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="one folder's sector"):
        iso9660("X", {f"file-{number}": b"" for number in range(30)}, 0)
    with pytest.raises(ConfigError, match="same name"):
        iso9660("X", {"a-b": b"", "a_b": b""}, 0)
    assert label_of(b"") is None
    assert label_of(bytes(17 * 2048)) is None


def test_other_programs_read_it(tmp_path: Path) -> None:
    tools = {"isoinfo": "genisoimage", "blkid": "util-linux"}
    if missing := [package for tool, package in tools.items() if shutil.which(tool, path="/usr/bin:/usr/sbin") is None]:
        pytest.skip(f"apt-get install {' '.join(missing)}")
    image = tmp_path / "seed"
    image.write_bytes(make_seed(FILES, 0))

    def say(*command: str) -> bytes:
        environment = {"PATH": "/usr/bin:/usr/sbin"}
        return subprocess.run(command, capture_output=True, check=True, timeout=60, env=environment).stdout

    for name, data in FILES.items():
        assert say("isoinfo", "-R", "-x", f"/{name}", "-i", str(image)) == data
    assert b"Rock Ridge" in say("isoinfo", "-d", "-i", str(image))
    told = say("blkid", "-p", "-o", "export", str(image)).decode().splitlines()
    assert {"LABEL=CIDATA", "TYPE=iso9660"} <= set(told)


# --- the option -----------------------------------------------------------------------------------------------------


def _user_data(folder: Path) -> Path:
    path = folder / "user-data"
    path.write_bytes(FILES["user-data"])
    return path


def test_the_option_is_a_read_only_disk_beside_its_user_data(tmp_path: Path) -> None:
    user = _user_data(tmp_path)
    (tmp_path / "net").write_bytes(b"version: 2\n")
    asked = parse_cloud_init(f"user-data={user},network-config={tmp_path}/net")
    assert asked.disk() == {"path": f"{user}.seed", "readonly": True, "image_type": "Raw", "id": "cloud-init"}
    assert not Path(asked.path).exists()
    asked.write()
    seed = Path(asked.path)
    assert read_iso(seed.read_bytes())["network-config"] == b"version: 2\n"
    before = seed.stat().st_ino
    asked.write()
    assert seed.stat().st_ino == before  # the same again: it may be in use, or its folder be read-only
    user.write_bytes(b"#!/bin/sh\n")
    asked.write()
    assert seed.stat().st_ino != before
    assert read_iso(seed.read_bytes())["user-data"] == b"#!/bin/sh\n"


def test_only_a_seed_is_replaced(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with pytest.raises(ConfigError, match="something else than a seed"):
        parse_cloud_init(f"user-data={_user_data(tmp_path)},path={disk}").write()
    assert disk.read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no user-data"),
        ("meta-data=x", "no user-data"),
        ("user-data=", "no path"),
        ("user-data=a,path=", "no path"),
        ("userdata=a", "did you mean user-data"),
        ("a.yaml", "give user-data=a.yaml"),
        ("user-data=a,user-data=b", "given twice"),
    ],
)
def test_a_mistake_is_one_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_cloud_init(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    asked = parse_cloud_init(f"user-data={_user_data(tmp_path)},meta-data={tmp_path}/none")
    with pytest.raises(ConfigError, match=r"--cloud-init meta-data = .*none.*: No such file"):
        asked.write()
    assert not Path(asked.path).exists()
