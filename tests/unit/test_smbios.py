"""The SMBIOS tables as a guest walks them (DSP0134), and what a user may have in them."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from trivmm.boot.smbios import smbios_tables
from trivmm.cli.options import PLATFORM
from trivmm.config import MAX_SMBIOS, PlatformConfig
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError, NotSupported
from trivmm.memory import layout
from trivmm.syntax import parse_object

IDENTITY = "00112233-4455-6677-8899-aabbccddeeff"


def walk(platform: PlatformConfig) -> list[tuple[int, bytes, list[str]]]:
    """(type, formatted area, strings) of each structure; everything that a guest checks is."""
    image = smbios_tables(platform)
    assert image[:5] == b"_SM3_"
    assert image[6] == 24
    assert not sum(image[:24]) & 0xFF
    size, gpa = struct.unpack_from("<IQ", image, 12)
    at = gpa - layout.SMBIOS_START
    assert at >= 24
    assert not gpa % 16
    assert at + size == len(image)
    found, handles = [], []
    while at < len(image):
        kind, length, handle = struct.unpack_from("<BBH", image, at)
        end = image.index(b"\0\0", at + length)
        texts = image[at + length : end].split(b"\0") if end > at + length else []
        found.append((kind, image[at : at + length], [text.decode() for text in texts]))
        handles.append(handle)
        at = end + 2
    assert len(set(handles)) == len(handles)
    return found


def test_a_machine_of_which_nothing_is_said() -> None:
    bios, system, end = walk(PlatformConfig())
    assert (bios[0], bios[1][0x13] & 1 << 4) == (0, 1 << 4)  # a virtual machine
    assert len(bios[1]) == 0x14
    assert (system[0], len(system[1]), system[2]) == (1, 0x1B, ["TriVMM", "trivmm"])
    assert system[1][4:8] == bytes((1, 2, 0, 0))
    assert system[1][8:24] == bytes(16)
    assert (end[0], len(end[1]), end[2]) == (127, 4, [])


def test_everything_that_can_be_said() -> None:
    said = PlatformConfig(
        system_serial_number="serial",
        system_uuid=IDENTITY,
        oem_strings=("one", "zwei=ü"),
        system_manufacturer="maker",
        system_product_name="product",
        system_version="version",
        system_family="family",
        system_sku_number="sku",
        chassis_asset_tag="tag",
    )
    _, system, chassis, oem, _ = walk(said)
    assert system[2] == ["maker", "product", "version", "serial", "sku", "family"]
    assert system[1][4:8] == bytes((1, 2, 3, 4))
    assert system[1][8:24] == bytes.fromhex("33221100 5544 7766 8899aabbccddeeff")
    assert system[1][24:] == bytes((2, 5, 6))
    assert (chassis[0], len(chassis[1])) == (3, 0x16)
    assert chassis[2][chassis[1][8] - 1] == "tag"
    assert (oem[0], oem[1][4], oem[2]) == (11, 2, ["one", "zwei=ü"])


def test_the_newer_name_wins() -> None:
    both = PlatformConfig(serial_number="old", system_serial_number="new", uuid=IDENTITY)
    assert (both.serial, both.identity) == ("new", IDENTITY)
    assert PlatformConfig(serial_number="old").serial == "old"


def test_the_longest_that_fits_ends_below_high_ram() -> None:
    longest = PlatformConfig(oem_strings=("x" * (MAX_SMBIOS - 254), *"y" * 254))
    assert layout.SMBIOS_START + len(smbios_tables(longest)) <= layout.HIGH_RAM_START
    assert walk(longest)[2][1][4] == 255


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"uuid": "no"}, "platform.uuid"),
        ({"system_uuid": IDENTITY + "0"}, "platform.system_uuid"),
        ({"serial_number": ""}, "platform.serial_number"),
        ({"serial_number": "a\0b"}, "platform.serial_number"),
        ({"oem_strings": ["good", "two\nlines"]}, "platform.oem_strings[1]"),
        ({"oem_strings": ["x"] * 256}, "platform.oem_strings"),
        ({"oem_strings": ["x" * (MAX_SMBIOS + 1)]}, "platform"),
        ({"serial_number": "\ud800"}, "platform.serial_number"),
    ],
)
def test_what_can_not_be_said(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PlatformConfig(**given)
    assert refused.value.field == field


def option(text: str) -> Any:
    return load_config({"payload": {"kernel": "/k"}, "platform": parse_object("--platform", text, PLATFORM, "uuid")})


def test_the_option_and_the_json() -> None:
    config = option(f'serial_number=a b,uuid={IDENTITY},oem_strings=[one,two=2,"a,b"]')
    assert config.platform.oem_strings == ("one", "two=2", "a,b")
    dumped = dump_config(config)
    assert dumped["platform"]["serial_number"] == "a b"
    assert dumped["platform"]["num_pci_segments"] == 1
    assert load_config(json.loads(json.dumps(dumped))) == config
    assert "platform" not in dump_config(load_config({"payload": {"kernel": "/k"}}))
    assert load_config({"platform": None}).platform == PlatformConfig()


@pytest.mark.parametrize("text", ["num_pci_segments=2", "iommufd=on", "tdx=on", "iommu_segments=[1]"])
def test_what_is_not_there_yet_is_refused_by_name(text: str) -> None:
    with pytest.raises(NotSupported, match=r"^platform\." + text.partition("=")[0]):
        option(text)
