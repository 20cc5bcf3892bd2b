"""JSON bodies: what loads, what is refused and in which words, and that nothing of the contract was forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm.config import ConsoleConfig, VmConfig
from trivmm.control.contract import NOT_YET_KEYS, NOT_YET_ROUTES, REQUIRED_KEYS
from trivmm.control.schema import CLASSES, dump_config, load_config, load_receive, load_send, parse_json
from trivmm.errors import ConfigError, NotSupported

CONTRACT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent.parent / "data" / "cloud-hypervisor.openapi.yaml").read_text()
)
KERNEL = {"kernel": "/boot/vmlinux"}


def minimal(**more: Any) -> dict[str, Any]:
    return {"payload": KERNEL, **more}


def test_the_contract_itself_is_valid() -> None:
    from openapi_spec_validator import validate

    validate(json.loads(json.dumps(CONTRACT)))  # YAML reads its status codes as numbers


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_key_of_the_contract_is_known(name: str) -> None:
    theirs = CONTRACT["components"]["schemas"][name]
    ours = {field.name for field in attrs.fields(CLASSES[name])} - {"deadlines"}
    not_yet = set(NOT_YET_KEYS.get(name, ()))
    assert not ours & not_yet
    assert ours | not_yet == set(theirs["properties"])
    assert set(theirs.get("required", ())) <= set(REQUIRED_KEYS.get(name, ()))
    for key, default in NOT_YET_KEYS.get(name, {}).items():
        said = theirs["properties"][key].get("default")
        assert said is None or said == default, f"{name}.{key}"


def test_every_route_of_the_contract_is_known() -> None:
    from trivmm.control.routes import ROUTES

    theirs = {path.lstrip("/"): set(methods) for path, methods in CONTRACT["paths"].items()}
    assert not NOT_YET_ROUTES & set(ROUTES)
    assert set(theirs) - set(ROUTES) == NOT_YET_ROUTES
    for name in set(ROUTES) & set(theirs):
        assert {ROUTES[name].method.lower()} == theirs[name], name
    assert all(theirs[name] == {"put"} for name in NOT_YET_ROUTES)
    assert {name for name in ROUTES if name not in theirs} == {"vm.migration-progress", "vm.cancel-migration"}


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
        "topology": None,
        "kvm_hyperv": False,
        "max_phys_bits": 46,
        "nested": True,
        "affinity": None,
        "features": {"amx": False},
        "core_scheduling": "Vm",
    }
    assert dumped["memory"]["size"] == 512 << 20
    assert dumped["rng"]["src"] == "/dev/urandom"
    assert dumped["serial"] == {"mode": "Null", "file": None, "socket": None}
    assert dumped["console"] == {
        "mode": "Off",
        "file": None,
        "socket": None,
        "id": None,
        "pci_segment": 0,
        "pci_device_id": None,
        "iommu": False,
    }
    assert set(dumped) == set(CONTRACT["components"]["schemas"]["VmConfig"]["properties"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "body = '[]': not an object"),
        ({}, "payload = None: missing"),
        ({"payload": {}}, "payload.kernel = None: missing"),
        ({"payload": {"firmware": "/f"}}, "payload.firmware = '/f': not supported yet"),
        ({"payload": {"kernel": 5}}, "payload.kernel = 5: wrong type; give text"),
        ({"payload": {"kernel": "a\0b"}}, "payload.kernel = 'a\\x00b': wrong type"),
        (minimal(memroy={}), "memroy = '{}': unknown key; did you mean memory?"),
        (minimal(memory={"size": "1G"}), "memory.size = '1G': wrong type; give an integer"),
        (minimal(memory={"size": True}), "memory.size = True: wrong type"),
        (minimal(memory={"size": 0}), "memory.size = 0: no memory"),
        (minimal(memory={"size": -1}), "memory.size = -1: wrong type"),
        (minimal(memory={"size": 1.5}), "memory.size = '1.5': wrong type"),
        (minimal(cpus={"boot_vcpus": 1}), "cpus.max_vcpus = None: missing"),
        (minimal(cpus={"boot_vcpus": 0, "max_vcpus": 1}), "cpus.boot_vcpus = 0: out of range"),
        (minimal(disks={}), "disks = '{}': not a list"),
        (minimal(disks=[{"path": "a"}, {"path": "b", "readonly": 1}]), "disks[1].readonly = 1: wrong type"),
        (minimal(disks=[{"path": "a", "direct": True}]), "disks[0].direct = True: not supported yet"),
        (minimal(net=[{"tap": "t"}]), "net = "),
        (minimal(serial={"mode": 7}), "serial.mode = 7: wrong type"),
        (minimal(serial={"mode": "pty"}), "serial.mode = 'pty': no such mode; use Off, Null, Tty, Pty, File, Socket"),
        (minimal(serial={"mode": "x" * 60000}), "serial.mode = 'xxx"),
        (minimal(serial={"mode": "File"}), "serial.file = None: missing, and the mode is File; give a path"),
        (minimal(console={"mode": "Socket", "file": "/f"}), "console.socket = None: missing"),
        (minimal(console={"mode": "Tty", "iommu": True}), "console.iommu = True: not supported yet"),
        (minimal(console={"mode": "Tty", "id": "a\nb"}), "console.id = 'a\\nb': not a name"),
        (minimal(cpus={"boot_vcpus": 1, "max_vcpus": 1, "features": {"amx": True}}), "cpus.features.amx = True"),
    ],
)
def test_refusals_are_one_line_and_name_the_path(body: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(body)
    text = str(caught.value)
    assert text.startswith(said)
    assert "\n" not in text
    assert "; " in text


def test_what_is_not_there_yet_has_its_own_class() -> None:
    with pytest.raises(NotSupported):
        load_config(minimal(vsock={"cid": 3, "socket": "/s"}))


def test_send_and_receive() -> None:
    data = load_send({"destination_url": "unix:/x", "downtime_ms": 50, "connections": 1, "local": False})
    assert (data.destination_url, data.downtime_ms, data.timeout_s, data.timeout_strategy) == (
        "unix:/x",
        50,
        None,
        "Cancel",
    )
    assert load_receive({"receiver_url": "tcp:0.0.0.0:1", "memory_mode": "Precopy"}).receiver_url == "tcp:0.0.0.0:1"
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "destination_url"),
        ({"destination_url": "unix:/x", "downtime_ms": 0}, "downtime_ms = 0"),
        ({"destination_url": "unix:/x", "timeout_strategy": "cancel"}, "timeout_strategy = 'cancel'"),
        ({"destination_url": "unix:/x", "connections": 4}, "connections = 4: not supported yet"),
        ({"destination_url": "unix:/x", "memory_mode": "Postcopy"}, "memory_mode"),
    ]
    for body, said in bad:
        with pytest.raises(ConfigError, match=said):
            load_send(body)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"NaN", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"a": Infinity}'], ids=lambda b: repr(b[:12])
)
def test_what_is_not_json(body: bytes) -> None:
    with pytest.raises(ConfigError, match="not JSON") as caught:
        parse_json(body)
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
KEYS = sorted({key for schema in CLASSES for key in CONTRACT["components"]["schemas"][schema]["properties"]})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON))
def test_any_json_is_loaded_or_refused_by_name(body: dict[str, Any]) -> None:
    for load in (load_config, load_send, load_receive):
        said, made = "", None
        try:
            made = load(body)
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
        if isinstance(made, VmConfig):
            assert load_config(dump_config(made)) == made
