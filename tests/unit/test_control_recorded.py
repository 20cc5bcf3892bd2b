"""Bodies of the real client and of the real VMM, recorded: what of them is taken here, and what is refused by name.

And the other way round: what vm.info says of a configuration must be one that Cloud Hypervisor's own structs read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.config import (
    MAX_SERIAL,
    OUR_IDS,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from trivmm.control.contract import NOT_YET_ROUTES
from trivmm.control.routes import ROUTES
from trivmm.control.schema import (
    dump_config,
    load_config,
    load_device,
    load_receive,
    load_remove,
    load_resize,
    load_resize_disk,
    load_send,
)
from trivmm.control.unknown import UnknownKeys
from trivmm.errors import NotSupported
from trivmm.virtio.kinds import hotplug_verbs

DATA: Final = Path(__file__).parent.parent / "data"
REQUESTS: Final = json.loads((DATA / "ch-remote-54.requests.json").read_text())
ANSWERS: Final = json.loads((DATA / "cloud-hypervisor-54.answers.json").read_text())["answers"]
TABLES: Final = json.loads((DATA / "cloud-hypervisor-54.structs.json").read_text())
CREATED: Final = [each["body"]["config"] for each in ANSWERS if "config" in (each["body"] or ())]

# What ch-remote was called with → None: its body is taken; else the key that is refused, which is not there yet.
OUTCOMES: Final = {
    "resize --cpus 2": None,  # what can be resized depends on the VM: see test_vm_verbs
    "resize --memory 1G": None,
    "resize --balloon 64M": None,
    "resize-disk --disk d0 --size 1G": None,
    "remove-device d0": None,
    "add-disk path=/tmp/d.img": None,
    "add-disk path=/tmp/d.img,readonly=on,id=d0,num_queues=2,queue_size=128": None,
    "add-net tap=tap0,mac=12:34:56:78:90:ab,mtu=1500": None,
    "add-net tap=,ip=192.168.4.1,mask=255.255.255.0,num_queues=4": None,
    "add-pmem file=/tmp/p.img,size=1G": None,
    "add-fs tag=t,socket=/tmp/fs.sock": "fs",
    "add-vsock cid=3,socket=/tmp/v.sock": None,
    "add-device path=/sys/bus/pci/devices/0000:00:01.0": "devices",
    "add-vdpa path=/dev/vhost-vdpa-0": "vdpa",
    "send-migration destination_url=unix:/tmp/m": None,
    "send-migration destination_url=tcp:127.0.0.1:9000,connections=4,downtime_ms=200,timeout_s=60,"
    "timeout_strategy=ignore": "connections",
    "send-migration destination_url=unix:/tmp/m,local=on": "local",
    "receive-migration receiver_url=unix:/tmp/m": None,
    "receive-migration receiver_url=tcp:0.0.0.0:9000": None,
}
PLACES: Final = {  # a hotplug verb's body is what vm.create takes under this key
    "vm.add-disk": "disks",
    "vm.add-net": "net",
    "vm.add-pmem": "pmem",
    "vm.add-fs": "fs",
    "vm.add-vsock": "vsock",
    "vm.add-device": "devices",
    "vm.add-vdpa": "vdpa",
}
# Bodies of routes that do not exist here: nothing reads them.
UNREAD: Final = {"vm.coredump", "vm.resize-zone", "vm.restore", "vm.snapshot"}


def route_of(recorded: dict[str, Any]) -> str:
    return str(recorded["request"].split()[1].removeprefix("/api/v1/"))


def load(route: str, body: Any, unknown: UnknownKeys) -> None:
    if (verb := route.removeprefix("vm.")) in hotplug_verbs():
        load_device(hotplug_verbs()[verb], body, unknown)
        return
    match route:
        case "vm.remove-device":
            load_remove(body, unknown)
        case "vm.send-migration":
            load_send(body, unknown)
        case "vm.receive-migration":
            load_receive(body, unknown)
        case "vm.resize":
            load_resize(body, unknown)
        case "vm.resize-disk":
            load_resize_disk(body, unknown)
        case _:
            key = PLACES[route]
            load_config({"payload": {"kernel": "/k"}, key: body if key == "vsock" else [body]}, unknown)


@pytest.mark.parametrize("recorded", REQUESTS, ids=lambda recorded: " ".join(recorded["args"]))
def test_every_recorded_body_is_taken_or_refused_by_name(recorded: dict[str, Any]) -> None:
    route, body, called = route_of(recorded), recorded["body"], " ".join(recorded["args"])
    assert route in ROUTES or route in NOT_YET_ROUTES
    if body is None:
        assert route not in ROUTES or ROUTES[route].load is None
        return
    if route in UNREAD:
        assert route in NOT_YET_ROUTES
        return
    unknown, refused = UnknownKeys(), OUTCOMES[called]
    if refused is None:
        load(route, body, unknown)
    else:
        with pytest.raises(NotSupported) as caught:
            load(route, body, unknown)
        assert caught.value.field == refused
    assert unknown.counts == {}  # the real client's keys are all known


def test_no_recorded_body_is_left_out() -> None:
    bodies = {" ".join(each["args"]) for each in REQUESTS if each["body"] is not None and route_of(each) not in UNREAD}
    assert bodies == set(OUTCOMES)


@pytest.mark.parametrize("config", CREATED)
def test_a_recorded_vm_info_can_be_created_here(config: dict[str, Any]) -> None:
    unknown = UnknownKeys()
    loaded = load_config(config, unknown)
    assert unknown.counts == {}
    assert (loaded.cpus.boot_vcpus, loaded.memory.size, loaded.serial.file) == (2, 128 << 20, "ser")
    assert dump_config(loaded) == config  # said as it was, key by key


# --- what their structs read ---------------------------------------------------------------------------------

BITS: Final = {"u8": 8, "u16": 16, "u32": 32, "u64": 64}


def faults(kind: str, value: Any, at: str) -> list[str]:
    """What serde would refuse, by the table of the structs' fields."""
    if kind.endswith("?"):
        return [] if value is None else faults(kind[:-1], value, at)
    kind = kind.rstrip("!")
    if kind.startswith("["):
        if not isinstance(value, list):
            return [f"{at} is no list"]
        return [fault for index, item in enumerate(value) for fault in faults(kind[1:-1], item, f"{at}[{index}]")]
    if kind in TABLES["structs"]:
        if not isinstance(value, dict):
            return [f"{at} is no {kind}"]
        fields = TABLES["structs"][kind]
        missing = [
            f"{at}.{key} is missing" for key, inner in fields.items() if inner.endswith("!") and key not in value
        ]
        known = {key: item for key, item in value.items() if key in fields}  # others are ignored there
        return missing + [fault for key, item in known.items() for fault in faults(fields[key], item, f"{at}.{key}")]
    if kind in TABLES["enums"]:
        good = value in TABLES["enums"][kind]
    elif kind in BITS:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << BITS[kind]
    else:
        good = isinstance(value, {"text": str, "bool": bool, "i32": int}[kind])
    return [] if good else [f"{at} = {value!r} is no {kind}"]


@pytest.mark.parametrize("config", CREATED)
def test_the_structs_table_reads_what_was_recorded(config: dict[str, Any]) -> None:
    assert faults("VmConfig", config, "config") == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"debug_console": None}, "config.debug_console is no DebugConsoleConfig"),
        ({"iommu": None}, "config.iommu = None is no bool"),
        ({"rng": {}}, "config.rng.src is missing"),
        ({"disks": [{"queue_size": 1 << 16}]}, "config.disks[0].queue_size = 65536 is no u16"),
        ({"disks": [{"image_type": "Iso"}]}, "config.disks[0].image_type = 'Iso' is no ImageType"),
    ],
)
def test_the_structs_table_finds_faults(broken: dict[str, Any], said: str) -> None:
    assert faults("VmConfig", broken, "config") == [said]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
SERIAL: Final = TEXT.filter(lambda text: len(text.encode()) <= MAX_SERIAL)
NAME = st.none() | TEXT.filter(lambda name: name.isprintable() and not name.startswith(OUR_IDS))
CONFIGS = st.builds(
    VmConfig,
    payload=st.builds(PayloadConfig, kernel=TEXT | st.just(""), cmdline=st.just("") | TEXT, initramfs=st.none() | TEXT),
    cpus=st.builds(CpusConfig, st.integers(1, 8)),
    memory=st.builds(MemoryConfig, st.integers(1, 1 << 20).map(lambda number: number << 21), shared=st.booleans()),
    disks=st.lists(st.builds(DiskConfig, TEXT, readonly=st.booleans(), id=NAME, serial=st.none() | SERIAL), max_size=3),
    rng=st.builds(RngConfig, TEXT, id=NAME),
    serial=st.builds(SerialConfig, st.sampled_from(["Off", "Null", "Tty"]))
    | st.builds(SerialConfig, st.just("File"), TEXT),
)


@given(CONFIGS)
def test_their_structs_read_what_we_say(config: VmConfig) -> None:
    said = json.loads(json.dumps(dump_config(config)))
    assert faults("VmConfig", said, "config") == []
    assert load_config(said) == config
    assert "null" not in json.dumps(_without_text(said))


def _without_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_text(item) for item in value]
    return "" if isinstance(value, str) else value
