"""JSON bodies: what loads, what is refused and in which words, and that nothing of the contract was forgotten."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm.config import ConsoleConfig, PayloadConfig, VmConfig
from trivmm.control.bodies import ResizeData, SendMigrationData
from trivmm.control.contract import NOT_YET_KEYS, NOT_YET_ROUTES, REQUIRED_KEYS, NotYet, markdown_not_yet
from trivmm.control.schema import (
    ALIASES,
    CLASSES,
    NESTED,
    dump_config,
    load_config,
    load_receive,
    load_resize,
    load_send,
    parse_json,
)
from trivmm.control.unknown import MAX_KEY, MAX_KINDS, UnknownKeys
from trivmm.errors import ConfigError, NotSupported
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.kinds import sections
from trivmm.virtio.vsock.config import VsockConfig

DATA = Path(__file__).parent.parent / "data"
CONTRACT: dict[str, Any] = yaml.safe_load((DATA / "cloud-hypervisor.openapi.yaml").read_text())
STRUCTS: dict[str, dict[str, str]] = json.loads((DATA / "cloud-hypervisor-54.structs.json").read_text())["structs"]
BEYOND_THE_CONTRACT = {"NetConfig": {"link", "peer"}}  # keys that are ours
KERNEL = {"kernel": "/boot/vmlinux"}


def minimal(**more: Any) -> dict[str, Any]:
    return {"payload": KERNEL, **more}


def test_the_contract_itself_is_valid() -> None:
    from openapi_spec_validator import validate

    validate(json.loads(json.dumps(CONTRACT)))  # YAML reads its status codes as numbers


@pytest.mark.parametrize("name", sorted({*CLASSES, *NOT_YET_KEYS}))
def test_every_key_of_the_contract_is_known(name: str) -> None:
    theirs = CONTRACT["components"]["schemas"][name]
    ours = {field.name for cls in CLASSES.get(name, ()) for field in attrs.fields(cls)} - {"deadlines", "virtio"}
    ours |= set(sections()) if name == "VmConfig" else set()
    ours -= BEYOND_THE_CONTRACT.get(name, set())
    not_yet = set(NOT_YET_KEYS.get(name, ()))
    assert not ours & not_yet
    aliases = {alias for schema, alias in ALIASES if schema == name}
    assert ours | not_yet | aliases == set(theirs["properties"]) | set(STRUCTS[name])
    if name in CLASSES and name != "VmConfig":  # which the real one takes without a payload
        assert set(theirs.get("required", ())) <= set(REQUIRED_KEYS.get(name, ()))
        assert {key for key, kind in STRUCTS[name].items() if kind.endswith("!")} <= set(REQUIRED_KEYS.get(name, ()))
    for key, accepted in NOT_YET_KEYS.get(name, {}).items():
        said = theirs["properties"].get(key, {}).get("default")
        assert said is None or said == (accepted.default if isinstance(accepted, NotYet) else accepted), f"{name}.{key}"


def test_every_route_of_the_contract_is_known() -> None:
    from trivmm.control.routes import ROUTES

    theirs = {path.lstrip("/"): set(methods) for path, methods in CONTRACT["paths"].items()}
    assert not NOT_YET_ROUTES & set(ROUTES)
    assert set(theirs) - set(ROUTES) == NOT_YET_ROUTES
    for name in set(ROUTES) & set(theirs):
        assert {ROUTES[name].method.lower()} == theirs[name], name
    assert all(theirs[name] == {"put"} for name in NOT_YET_ROUTES)
    assert {name for name in ROUTES if name not in theirs} == {
        "events",
        "vm.cancel-migration",
        "vm.migration-progress",
        "vm.resolve-migration",
    }


def test_the_readme_names_what_does_not_work_yet() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- not-yet -->")[1].split("<!-- /not-yet -->")[0].strip()
    assert shown == markdown_not_yet(), "copy trivmm.control.contract.markdown_not_yet() into the README"
    assert all(f"`{name}`" in shown for name in NOT_YET_ROUTES)


def test_a_full_body() -> None:
    config = load_config(
        {
            "payload": {"kernel": "/k", "cmdline": "console=ttyS0", "initramfs": "/i"},
            "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "features": {"amx": False}},
            "memory": {"size": 1 << 30, "shared": True, "thp": True},
            "disks": [{"path": "/d", "readonly": True, "id": "_disk0", "serial": "abc", "direct": False}],
            "rng": {"src": "/dev/random", "iommu": False},
            "serial": {"mode": "File", "file": "/s"},
            "console": {"mode": "Socket", "socket": "/c", "id": "con", "pci_device_id": 7, "iommu": False},
            "net": None,
            "vsock": None,
            "platform": {"num_pci_segments": 1, "oem_strings": []},
        }
    )
    assert (config.payload.kernel, config.payload.cmdline, config.payload.initramfs) == ("/k", "console=ttyS0", "/i")
    assert (config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size) == (2, 4, 1 << 30)
    assert config.disks[0].readonly
    assert config.disks[0].serial == "abc"
    assert (config.serial.mode, config.serial.file) == ("File", "/s")
    assert config.console == ConsoleConfig("Socket", socket="/c", id="con", pci_device_id=7)
    assert load_config(json.loads(json.dumps(dump_config(config)))) == config


def test_defaults_are_filled_in() -> None:
    dumped = dump_config(load_config(minimal()))
    assert dumped["cpus"] == {
        "boot_vcpus": 1,
        "max_vcpus": 1,
        "kvm_hyperv": False,
        "max_phys_bits": 46,
        "nested": True,
        "features": {"amx": False},
        "core_scheduling": "Vm",
        "profile": "Host",
    }
    assert dumped["memory"]["size"] == 512 << 20
    assert dumped["rng"] == {"src": "/dev/urandom", "pci_segment": 0}
    assert dumped["serial"] == {"mode": "Null"}
    assert dumped["payload"] == KERNEL


@pytest.mark.parametrize("body", [{}, {"payload": None}, {"payload": {}}, {"payload": {"kernel": None}}])
def test_a_vm_may_be_created_without_a_payload(body: dict[str, Any]) -> None:
    """As there: it is the boot that fails."""
    config = load_config(body)
    assert config == VmConfig()
    assert "payload" not in dump_config(config)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "body = []: not an object"),
        ({"payload": []}, "payload = []: not an object"),
        ({"payload": {"igvm": "/f"}}, 'payload.igvm = "/f": not supported yet'),
        (
            {"payload": {"firmware": "/f", "kernel": "/k"}},
            'payload.firmware = "/f": there is a kernel too; give one of',
        ),
        ({"payload": {"kernel": 5}}, "payload.kernel = 5: wrong type; give text"),
        ({"payload": {"kernel": "a\0b"}}, 'payload.kernel = "a\\u0000b": wrong type'),
        ({"payload": {"kernel": "\ud800"}}, 'payload.kernel = "\\ud800": wrong type; give Unicode text'),
        (minimal(memory={"size": "1G"}), 'memory.size = "1G": wrong type; give an integer'),
        (minimal(memory={"size": True}), "memory.size = true: wrong type"),
        (minimal(memory={"size": 0}), "memory.size = 0: no memory"),
        (minimal(memory={"size": -1}), "memory.size = -1: wrong type"),
        (minimal(memory={"size": 1.5}), "memory.size = 1.5: wrong type"),
        (minimal(cpus={"boot_vcpus": 1}), "cpus.max_vcpus = null: missing"),
        (minimal(cpus={"boot_vcpus": 0, "max_vcpus": 1}), "cpus.boot_vcpus = 0: out of range"),
        (minimal(disks={}), "disks = {}: not a list"),
        (minimal(disks=[{"path": "a"}, {"path": "b", "readonly": 1}]), "disks[1].readonly = 1: wrong type"),
        (minimal(disks=[{"path": "a", "vhost_user": True}]), "disks[0].vhost_user = true: not supported yet"),
        (minimal(disks=[{"path": "a", "image_type": "Vhdx"}]), 'disks.image_type = "Vhdx": only raw and qcow2'),
        (minimal(disks=[{"path": "a", "image_type": "raw"}]), 'disks.image_type = "raw": no such type'),
        (minimal(disks=[{"path": "a", "image_type": None}]), "disks[0].image_type = null: wrong type"),
        (minimal(net=[{"tap": "t", "vhost_user": True}]), "net[0].vhost_user = true: not supported yet"),
        (minimal(net=[{"fds": [3, "4"]}]), "net[0].fds[1]"),
        (minimal(devices=[{"fd": 3, "x_exclude_mmap_bars": [1]}]), "devices = "),
        (minimal(rtc={}), "rtc = {}: not supported yet"),
        (minimal(pvmemcontrol={}), "pvmemcontrol = {}: not supported yet"),
        (minimal(gdb=True), "gdb = true: not supported yet; leave it out, or false"),
        (minimal(ivshmem={"path": "/i", "size": 1}), "ivshmem = "),
        (minimal(preserved_fds=[3]), "preserved_fds = [3]: "),
        (minimal(debug_console={"mode": "Off", "iobase": 1}), "debug_console.iobase = 1: not supported yet"),
        (minimal(debug_console={"mode": "Tty"}), 'debug_console.mode = "Tty": not supported yet'),
        (minimal(debug_console=7), "debug_console = 7: not supported yet"),
        (minimal(platform={"iommufd_fd": 5}), "platform.iommufd_fd = 5: not supported yet; leave it out"),
        (minimal(platform={"tdx": 0}), "platform.tdx = 0: not supported yet; leave it out, or false"),
        ({"payload": {"kernel": "/k", "fw_cfg_config": {}}}, "payload.fw_cfg_config = {}: not supported yet"),
        (minimal(cpus={"boot_vcpus": 1, "max_vcpus": 1, "profile": "Skylake"}), 'cpus.profile = "Skylake": not'),
        (minimal(serial={"mode": 7}), "serial.mode = 7: wrong type"),
        (minimal(serial={"mode": "pty"}), 'serial.mode = "pty": no such mode; use Off, Null, Tty, Pty, File, Socket'),
        (minimal(serial={"mode": "x" * 60000}), 'serial.mode = "xxx'),
        (minimal(serial={"mode": "File"}), "serial.file = null: missing, and the mode is File; give a path"),
        (minimal(console={"mode": "Socket", "file": "/f"}), "console.socket = null: missing"),
        (minimal(console={"mode": "Tty", "iommu": True}), "console.iommu = true: not supported yet"),
        (minimal(console={"mode": "Tty", "id": "a\nb"}), 'console.id = "a\\nb": not a name'),
        (minimal(cpus={"boot_vcpus": 1, "max_vcpus": 1, "features": {"amx": True}}), "cpus.features.amx = true"),
    ],
)
def test_refusals_are_one_line_and_name_the_path(body: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(body)
    text = str(caught.value)
    assert text.startswith(said)
    assert caught.value.__cause__ is None  # what Python did meanwhile would stand in the API's answer
    assert "\n" not in text
    assert "; " in text


def test_what_is_not_there_yet_has_its_own_class() -> None:
    with pytest.raises(NotSupported):
        load_config(minimal(tpm={"socket": "/s"}))


def test_send_and_receive() -> None:
    data = load_send({"destination_url": "unix:/x", "downtime_ms": 50, "connections": 1, "local": False})
    assert data == SendMigrationData("unix:/x", SendOptions(50, None, TimeoutStrategy.CANCEL))
    assert load_receive({"receiver_url": "tcp:0.0.0.0:1", "memory_mode": "Precopy"}).receiver_url == "tcp:0.0.0.0:1"
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "destination_url"),
        ({"destination_url": "unix:/x", "downtime_ms": 0}, "downtime_ms = 0"),
        ({"destination_url": "unix:/x", "timeout_strategy": "cancel"}, 'timeout_strategy = "cancel"'),
        ({"destination_url": "unix:/x", "connections": 4}, "connections = 4: not supported yet; leave it out, or 1"),
        ({"destination_url": "unix:/x", "local": True}, "local = true: not supported yet; leave it out, or false"),
        ({"destination_url": "unix:/x", "preserve_source": True}, "preserve_source = true: not supported yet"),
        ({"destination_url": "unix:/x", "tls_dir": "/t"}, 'tls_dir = "/t": not supported yet'),
        ({"destination_url": "unix:/x", "memory_mode": "Postcopy"}, "memory_mode"),
    ]
    for body, said in bad:
        with pytest.raises(ConfigError, match=said):
            load_send(body)


def test_what_a_receiver_can_not_take() -> None:
    for key, value in [
        ("vfio_fds", [{"id": "v", "fd": 3}]),
        ("iommufd_fd", 3),
        ("net_fds", [{"id": "n", "num_fds": 1}]),
        ("zone_updates", [{"id": "m0", "host_numa_node": 1}]),
        ("memory_mode", "Postcopy"),
    ]:
        load_receive({"receiver_url": "unix:/x", key: None})
        with pytest.raises(NotSupported, match=f"^{key} = "):
            load_receive({"receiver_url": "unix:/x", key: value})


def test_a_resize_body_may_be_empty() -> None:
    nothing = {"desired_vcpus": None, "desired_ram": None, "desired_balloon": None}
    assert load_resize({}) == load_resize(nothing) == ResizeData()
    assert load_resize({"desired_vcpus": 2, "desired_ram": 1 << 30}) == ResizeData(2, 1 << 30)
    with pytest.raises(ConfigError, match="desired_vcpus = true: wrong type"):
        load_resize({"desired_vcpus": True})


# --- unknown keys --------------------------------------------------------------------------------------------


def test_an_unknown_key_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownKeys()
    body = minimal(memroy={}, disks=[{"path": "a", "colour": 1}, {"path": "b", "colour": 2}], platform={"size": 1})
    for _ in range(2):
        assert load_config(body, unknown).disks[1].path == "b"
    load_send({"destination_url": "unix:/x", "urgent": True}, unknown)
    assert unknown.counts == {
        "VmConfig.memroy": 2,
        "DiskConfig.colour": 4,
        "PlatformConfig.size": 2,
        "SendMigrationData.urgent": 1,
    }
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    assert "did you mean memory?" in caplog.text
    assert "DiskConfig.colour in a request: ignored" in caplog.text


def test_without_a_collector_an_unknown_key_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    load_config(minimal(colour=1))
    assert "VmConfig.colour" in caplog.text


def test_made_up_keys_fill_neither_memory_nor_log(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownKeys()
    load_config(minimal(**{f"key{number}": 0 for number in range(MAX_KINDS + 1000)}), unknown)
    load_config(minimal(key0=0), unknown)
    assert unknown.counts["VmConfig.key0"] == 2
    assert unknown.counts["others"] == 1000
    assert len(unknown.counts) == MAX_KINDS + 1
    assert len(caplog.records) == MAX_KINDS + 1
    unknown = UnknownKeys()
    load_config(minimal(**{"x" * 100_000: 0, "line\nbreak \ud800": 0}), unknown)
    assert set(unknown.counts) == {"VmConfig." + "x" * MAX_KEY, "VmConfig.line\\nbreak \\ud800"}
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"payload": {"kernel": "/k"}', "Expecting ',' delimiter: line 1 column 29"),
        (b"NaN", "NaN is not JSON"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b"\xff", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        ("{}".encode("utf-8-sig"), "Unexpected UTF-8 BOM"),
        (b"1" * 5000, "a number is too long"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b"[" * 33 + b"]" * 33, "nested more than 32 deep"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested more than 32 deep"),
        (b'["[",' * 33 + b"1" + b"]" * 33, "nested more than 32 deep"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else None,
)
def test_what_is_not_json(body: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"not JSON \({problem}") as caught:
        parse_json(body)
    assert len(str(caught.value)) < 400
    assert caught.value.__cause__ is None  # it would stand in the API's answer
    assert not re.search("codec|sys[.]|recursion", str(caught.value))


def test_what_is_nested_as_deep_as_may_be() -> None:
    assert parse_json(b"[" * 32 + b'"[[["' + b"]" * 32) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
KEYS = sorted({key for schema in CLASSES for key in CONTRACT["components"]["schemas"][schema]["properties"]})


FULL = {
    **dump_config(
        VmConfig(PayloadConfig("/k", "c", "/i"), disks=["a", "b"], virtio=[VsockConfig(3, "/v"), BalloonConfig()])
    ),
    "platform": {"num_pci_segments": 1},
}
OBJECTS = {  # where an object stands in FULL → its schema
    (): "VmConfig",
    ("disks", 0): "DiskConfig",
    ("disks", 1): "DiskConfig",
    ("cpus", "features"): "CpuFeatures",
    ("debug_console",): "DebugConsoleConfig",
    ("platform",): "PlatformConfig",
    **{(key,): schema for key, schema in NESTED.items()},
}


def test_the_objects_of_a_body_are_all_of_them() -> None:
    def objects(value: Any, at: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        mine = {at} if isinstance(value, dict) else set()
        return mine.union(*(objects(item, (*at, key)) for key, item in inner))

    assert objects(FULL) == set(OBJECTS)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(sorted(OBJECTS, key=repr)), st.text(max_size=12), JSON), max_size=8))
def test_unknown_keys_at_any_depth_never_fail(extras: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    body, added = json.loads(json.dumps(FULL)), set()
    for at, key, item in extras:
        schema, place = OBJECTS[at], body
        for step in at:
            place = place[step]
        if key not in STRUCTS[schema] and key not in CONTRACT["components"]["schemas"][schema]["properties"]:
            place[key] = item
            added.add((at, key))
    unknown = UnknownKeys()
    assert load_config(body, unknown) == load_config(FULL, unknown)
    assert sum(unknown.counts.values()) == len(added)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON))
def test_any_json_is_loaded_or_refused_by_name(body: dict[str, Any]) -> None:
    for load in (load_config, load_send, load_receive, load_resize):
        said, made = "", None
        try:
            made = load(body)
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
        if isinstance(made, VmConfig):
            assert load_config(dump_config(made)) == made
