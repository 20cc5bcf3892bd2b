"""SMBIOS as a reader of its own parses it (DSP0134 sections 5.2.1 and 6.1.2), and what a mistake in it is told."""

from __future__ import annotations

import json
import struct
import uuid
from typing import Any

import attrs
import pytest

from trivmm.boot.firmware import firmware_items
from trivmm.boot.smbios import smbios, smbios_image
from trivmm.cli.options import PLATFORM
from trivmm.config import PlatformConfig, VmConfig
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError, NotSupported
from trivmm.memory import layout
from trivmm.state.setup import config_from_setup, config_to_setup
from trivmm.syntax import parse_object

UUID = "01234567-89ab-cdef-0123-456789abcdef"
FULL = PlatformConfig(
    system_manufacturer="Maker",
    system_product_name="Product",
    system_version="1.2",
    system_serial_number="sn",
    system_uuid=UUID,
    system_sku_number="sku",
    system_family="family",
    chassis_asset_tag="tag",
    oem_strings=("first", "zwölf, drei"),
)


def parsed(image: bytes) -> dict[int, tuple[bytes, list[str]]]:
    """(formatted area, texts) by type, of what lies from the entry point on."""
    assert image[:4] == b"_SM_"
    assert image[16:21] == b"_DMI_"
    assert image[5] == 31
    assert sum(image[:31]) % 256 == sum(image[16:31]) % 256 == 0
    largest, length, address, count = (
        *struct.unpack_from("<H", image, 8),
        *struct.unpack_from("<HIH", image, 22),
    )
    at = address - layout.SMBIOS_START
    assert len(image) == at + length
    found, sizes = {}, []
    for handle in range(count):
        begin = at
        kind, size, its = struct.unpack_from("<BBH", image, at)
        assert its == handle
        formatted = image[at : at + size]
        at += size
        texts = []
        while image[at]:
            end = image.index(0, at)
            texts.append(image[at:end].decode())
            at = end + 1
        at += 1 if texts else 2
        assert image[at - 1] == 0
        found[kind] = formatted, texts
        sizes.append(at - begin)
    assert at == len(image)
    assert max(sizes) == largest
    return found


def test_every_text_is_where_its_number_says() -> None:
    found = parsed(smbios_image(FULL))
    assert list(found) == [0, 1, 3, 11, 127]
    formatted, texts = found[1]
    assert len(formatted) == 27
    named = [texts[formatted[at] - 1] for at in (4, 5, 6, 7, 25, 26)]
    assert named == ["Maker", "Product", "1.2", "sn", "sku", "family"]
    assert uuid.UUID(bytes_le=formatted[8:24]) == uuid.UUID(UUID)
    formatted, texts = found[3]
    assert len(formatted) == 22
    assert (texts[formatted[4] - 1], texts[formatted[8] - 1]) == ("Maker", "tag")
    assert found[11] == (b"\x0b\x05\x03\x00\x02", ["first", "zwölf, drei"])
    assert found[0][0][0x13] & 1 << 4  # a virtual machine


def test_without_a_word_it_is_ours_and_has_no_uuid() -> None:
    found = parsed(smbios_image(PlatformConfig()))
    assert list(found) == [0, 1, 3, 127]
    formatted, texts = found[1]
    assert texts == ["TriVMM", "trivmm"]
    assert formatted[6:8] == b"\0\0"
    assert formatted[8:24] == bytes(16)


def test_firmware_finds_the_same_in_its_files() -> None:
    entry, tables = smbios(FULL)
    assert {entry, tables} <= set(firmware_items(((0, 2 << 20),), 1, FULL).values())


def test_the_largest_fits_below_1_mib() -> None:
    largest = PlatformConfig(oem_strings=["x" * 238] * 255, system_version="y" * 400)
    assert layout.SMBIOS_START + len(smbios_image(largest)) <= layout.HIGH_RAM_START


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"system_uuid": "no"}, "platform.system_uuid"),
        ({"system_version": ""}, "platform.system_version"),
        ({"system_version": "a\0b"}, "platform.system_version"),
        ({"system_version": "a\nb"}, "platform.system_version"),
        ({"system_version": "\ud800"}, "platform.system_version"),
        ({"system_version": 3}, "platform.system_version"),
        ({"oem_strings": ["a", ""]}, "platform.oem_strings[1]"),
        ({"oem_strings": ["a"] * 256}, "platform.oem_strings"),
        ({"oem_strings": ["a" * 62000]}, "platform"),
        ({"oem_strings": "text"}, "platform.oem_strings"),
        ({"oem_strings": [1]}, "platform.oem_strings"),
    ],
)
def test_a_mistake_names_its_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlatformConfig(**given)
    assert caught.value.field == field


def test_the_contract_s_older_names_and_the_option_say_the_same() -> None:
    body = {"payload": {"kernel": "k"}, "platform": {"serial_number": "sn", "uuid": UUID, "oem_strings": ["a", "b,c"]}}
    config = load_config(body)
    assert config.platform == PlatformConfig(system_serial_number="sn", system_uuid=UUID, oem_strings=("a", "b,c"))
    option = parse_object("--platform", f'uuid={UUID},serial_number=sn,oem_strings=[a,"b,c"]', PLATFORM, "uuid")
    assert load_config({"payload": {"kernel": "k"}, "platform": option}) == config
    assert load_config(json.loads(json.dumps(dump_config(config)))) == config
    assert config_from_setup(config_to_setup(config, {}), {}) == attrs.evolve(config)
    assert "platform" not in dump_config(VmConfig())
    assert load_config({"payload": {"kernel": "k"}, "platform": None}).platform == PlatformConfig()


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(NotSupported) as caught:
        load_config({"payload": {"kernel": "k"}, "platform": {"num_pci_segments": 2}})
    assert caught.value.field == "platform.num_pci_segments"
    with pytest.raises(ConfigError, match="given too"):
        load_config({"payload": {"kernel": "k"}, "platform": {"uuid": UUID, "system_uuid": UUID}})
