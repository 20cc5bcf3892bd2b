"""The configuration as Python callers give it: what is converted, and that a wrong type is refused in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.config import (
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from trivmm.errors import MAX_SHOWN, ConfigError, shown

CLASSES: tuple[type, ...] = (
    PayloadConfig,
    CpusConfig,
    MemoryConfig,
    DiskConfig,
    RngConfig,
    SerialConfig,
    ConsoleConfig,
    VmConfig,
)
ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.none() | st.text())
)


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"/b\xff"


def test_what_is_converted() -> None:
    disk = DiskConfig(Path("c.img"), readonly=True)
    config = VmConfig(
        PayloadConfig(Path("vmlinux"), initramfs=Path("initrd")),
        memory=MemoryConfig("512M"),
        disks=["a.img", Path("b.img"), disk],
        rng=RngConfig(Path("/dev/random")),
        serial=SerialConfig("File", Path("log")),
    )
    assert (config.payload.kernel, config.payload.initramfs, config.memory.size) == ("vmlinux", "initrd", 512 << 20)
    assert config.disks == (DiskConfig("a.img"), DiskConfig("b.img"), DiskConfig("c.img", readonly=True))
    assert (config.rng.src, config.serial.file) == ("/dev/random", "log")
    assert hash(config) == hash(
        VmConfig(**{name: getattr(config, name) for name in config.__slots__ if name[0] != "_"})
    )
    assert VmConfig(disks=iter(["a.img"])).disks == (DiskConfig("a.img"),)
    assert os.fsencode(DiskConfig(BytesPath()).path) == b"/b\xff"  # type: ignore[arg-type]
    assert [MemoryConfig(size).size >> 20 for size in ("4M", "1G", "4194304", 4 << 20)] == [4, 1024, 4, 4]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MemoryConfig("512X"), 'memory.size = "512X": not a size; give bytes, or a number with K, M, G or T'),
        (lambda: MemoryConfig("99999999T"), "memory.size = 109951161678088372224: wrong type; give an integer"),
        (lambda: MemoryConfig("1K"), "memory.size = 1024: not a multiple of 2 MiB; give 2097152"),
        (lambda: MemoryConfig(1.5), "memory.size = 1.5: wrong type; give an integer from 0 to 2^64-1"),
        (lambda: MemoryConfig(None), "memory.size = null: wrong type"),
        (lambda: MemoryConfig(shared=1), "memory.shared = 1: wrong type; give true or false"),
        (lambda: CpusConfig("2"), 'cpus.boot_vcpus = "2": wrong type; give an integer'),
        (lambda: CpusConfig(True), "cpus.boot_vcpus = true: wrong type"),
        (lambda: CpusConfig(1, "2"), 'cpus.max_vcpus = "2": wrong type'),
        (lambda: PayloadConfig(None), "payload.kernel = null: wrong type; give text"),
        (lambda: PayloadConfig("k", cmdline=["quiet"]), 'payload.cmdline = ["quiet"]: wrong type; give text'),
        (lambda: DiskConfig(3), "disks.path = 3: wrong type"),
        (lambda: DiskConfig("a\0b"), 'disks.path = "a\\u0000b": wrong type; give text of at most 65536'),
        (lambda: DiskConfig("a", pci_device_id="4"), 'disks.pci_device_id = "4": wrong type'),
        (lambda: RngConfig(id=5), "rng.id = 5: wrong type"),
        (lambda: SerialConfig(5), "serial.mode = 5: wrong type"),
        (lambda: ConsoleConfig(file=5), "console.file = 5: wrong type"),
        (lambda: VmConfig("vmlinux"), 'payload = "vmlinux": wrong type; give a PayloadConfig'),
        (lambda: VmConfig(cpus=2), "cpus = 2: wrong type; give a CpusConfig"),
        (lambda: VmConfig(deadlines=5), "deadlines = 5: wrong type; give a Deadlines"),
        (lambda: VmConfig(disks="a.img"), 'disks = "a.img": not a list; give a list of paths or of DiskConfig'),
        (lambda: VmConfig(disks=Path("a.img")), 'disks = "a.img": not a list'),
        (lambda: VmConfig(disks={"path": "a"}), 'disks = {"path": "a"}: not a list'),
        (lambda: VmConfig(disks=None), "disks = null: not a list"),
        (lambda: VmConfig(disks=DiskConfig("a")), "disks = "),
        (lambda: VmConfig(disks=["a", 3]), "disks[1] = 3: wrong type; give a DiskConfig, or the path of an image"),
        (lambda: VmConfig(disks=["a"] * 25), "disks = 25: too many disks"),
    ],
)
def test_mistakes_are_told_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(CLASSES), st.data())
def test_anything_is_a_configuration_or_a_config_error(cls: type, data: st.DataObject) -> None:
    fields = [field.name for field in attrs.fields(cls)]
    given_fields = data.draw(st.dictionaries(st.sampled_from(fields), ANYTHING))
    required = {field.name: "x" for field in attrs.fields(cls) if field.default is attrs.NOTHING}
    said, made = "", None
    try:
        made = cls(**{**required, **given_fields})
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert said or made == attrs.evolve(made)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ("it's é", '"it\'s é"'),
        ("two\nlines\u2028\x85\ud800", '"two\\nlines\\u2028\\u0085\\ud800"'),
        ([{"a": None}], '[{"a": null}]'),
        ((1, 2), "[1, 2]"),
        (b"\xff{", '"\\\\xff{"'),
        (Path("/x"), '"/x"'),
        ({(1, 2): 3}, "<dict>"),
        (DiskConfig, "\"<class 'trivmm.config.DiskConfig'>\""),
    ],
)
def test_values_in_messages_are_json(value: object, text: str) -> None:
    assert shown(value) == text
    assert str(ConfigError("field", value, "problem", "remedy")) == f"field = {text}: problem; remedy"


def test_values_in_messages_are_short() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in ("x" * 10_000, ["x"] * 10_000, "\n" * 300, loop, 10**4000):
        assert len(shown(value)) <= MAX_SHOWN + 1
        assert shown(value).isprintable()
    assert shown("x" * 250) == '"' + "x" * 250 + '"'
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * MAX_SHOWN + "…"
    assert shown(10**5000) == "<int>"
