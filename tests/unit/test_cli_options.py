"""Option strings, as Cloud Hypervisor spells them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.cli.options import parse_deadlines, parse_receive, parse_send, parse_socket, parse_socket_path, parse_vm
from trivmm.config import ConsoleConfig
from trivmm.control.schema import load_config, load_receive, load_send
from trivmm.errors import ConfigError, NotSupported
from trivmm.syntax import parse_console, parse_pairs, split_commas
from trivmm.unixsocket import SocketFd
from trivmm.values import parse_size
from trivmm.virtio.kinds import KINDS

BEFORE = ["firmware", "kernel", "cmdline", "initramfs", "cpus", "memory", "serial", "platform", "pvpanic"]
NAMES = [*BEFORE, *(kind.option.name for kind in KINDS)]


def arguments(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**dict.fromkeys(NAMES), "kernel": "/k", **given})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a=1,b=2", ["a=1", "b=2"]),
        ('path="a,b",x=1', ["path=a,b", "x=1"]),
        ("t=[1,2],u=[[1,2],[3]]", ["t=[1,2]", "u=[[1,2],[3]]"]),
        ('p="]"', ["p=]"]),
    ],
)
def test_commas(text: str, parts: list[str]) -> None:
    assert split_commas("--x", text) == parts


@pytest.mark.parametrize("text", ['"', "[", "]", "a=[]]", 'a="b'])
def test_what_does_not_match_up(text: str) -> None:
    with pytest.raises(ConfigError, match="do not match"):
        split_commas("--x", text)


@given(st.text(max_size=40))
def test_any_string_parses_or_is_refused(text: str) -> None:
    for parse in (
        parse_socket,
        parse_socket_path,
        parse_send,
        parse_receive,
        lambda t: parse_pairs("--x", t, ("a", "b")),
    ):
        said = ""
        try:
            parse(text)
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1K", 1024), ("512M", 512 << 20), ("1G", 1 << 30), ("2T", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--memory size", text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1GB", "٣", "1" * 30, " "])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size("--memory size", text)


@pytest.mark.parametrize(
    ("text", "image_type"),
    [
        ("", "Unknown"),
        (",image_type=raw", "Raw"),
        (",image_type=RAW", "Raw"),
        (",image_type=unknown", "Unknown"),
        (",image_type=qcow2", "Qcow2"),
    ],
)
def test_image_types(text: str, image_type: str) -> None:
    config = load_config(parse_vm(arguments(disk=[f"path=/d{text}"])))
    assert config.disks[0].image_type == image_type


@pytest.mark.parametrize(
    ("word", "name"),
    [("vhd", "FixedVhd"), ("fixedvhd", "FixedVhd"), ("vhdx", "Vhdx"), ("vmdk", "FlatVmdk")],
)
def test_image_types_that_are_not_there_yet(word: str, name: str) -> None:
    with pytest.raises(NotSupported, match=rf'disks\.image_type = "{name}"'):
        load_config(parse_vm(arguments(disk=[f"path=/d,image_type={word}"])))
    with pytest.raises(ConfigError, match="no such type"):
        parse_vm(arguments(disk=["path=/d,image_type=iso"]))


def test_a_full_command_line() -> None:
    config = load_config(
        parse_vm(
            arguments(
                cmdline="console=ttyS0",
                cpus="boot=2,max=4",
                memory="size=1G,shared=on",
                disk=["path=a.img,readonly=on,id=d0,serial=S", 'path="b,c.img"'],
                rng="src=/dev/random",
                serial="file=/tmp/s",
                console="off",
            )
        )
    )
    assert (config.cpus.boot_vcpus, config.cpus.max_vcpus) == (2, 4)
    assert (config.memory.size, config.memory.shared) == (1 << 30, True)
    assert [disk.path for disk in config.disks] == ["a.img", "b,c.img"]
    assert (config.disks[0].readonly, config.disks[0].id, config.disks[0].serial) == (True, "d0", "S")
    assert (config.serial.mode, config.serial.file, config.rng.src) == ("File", "/tmp/s", "/dev/random")


def test_defaults() -> None:
    config = load_config(parse_vm(arguments()))
    assert (config.cpus.boot_vcpus, config.memory.size, config.serial.mode) == (1, 512 << 20, "Null")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cpus": "boots=2"}, '--cpus boots = "2": unknown key; did you mean boot?'),
        ({"cpus": "boot=0"}, "cpus.boot_vcpus = 0: out of range"),
        ({"cpus": "boot=x"}, '--cpus boot = "x": not a number'),
        ({"cpus": "boot"}, '--cpus boot = "": no value'),
        ({"cpus": "boot=1,boot=2"}, '--cpus boot = "2": given twice'),
        ({"memory": "size=0"}, "memory.size = 0: no memory"),
        ({"memory": "size=3"}, "memory.size = 3: not a multiple of 2 MiB; give 2097152"),
        ({"memory": "512M"}, '--memory = "512M": no key; give size=512M'),
        ({"cpus": "2"}, '--cpus = "2": no key; give boot=2'),
        ({"disk": ["x.img"]}, '--disk = "x.img": no key; give path=x.img'),
        ({"disk": ["path=a", "paths.img"]}, '--disk = "paths.img": no key; give path=paths.img'),
        ({"disk": ["path=a,paht"]}, '--disk paht = "": unknown key; did you mean path?'),
        ({"rng": "/dev/random"}, '--rng = "/dev/random": no key; give src=/dev/random'),
        ({"cpus": "boot=1,profile=old"}, '--cpus profile = "old": unknown; give host'),
        ({"memory": "size=1G,hugepages=on"}, "memory.hugepages = true: not supported yet"),
        ({"memory": "shared=maybe"}, '--memory shared = "maybe": neither on nor off'),
        ({"disk": ["readonly=on"]}, '--disk = "readonly=on": no path'),
        ({"disk": ["path=a,vhost_user=on"]}, "disks[0].vhost_user = true: not supported yet"),
        ({"serial": "file="}, '--serial = "file=": no such mode; give one of off, null, tty, pty, file=PATH, socket=P'),
        ({"serial": ""}, '--serial = "": no such mode'),
        ({"serial": "ptty"}, '--serial = "ptty": no such mode'),
        ({"serial": "tty=x"}, '--serial = "tty=x": no such mode'),
        ({"serial": "tty,pty"}, '--serial = "tty,pty": more than one mode; give one'),
        ({"serial": "file=/a,b"}, '--serial = "file=/a,b": more than a mode; leave b out'),
        ({"console": "tty,idd=x"}, '--console idd = "x": unknown key; did you mean id?'),
        ({"console": "tty,iommu=on"}, "console.iommu = true: not supported yet"),
        ({"console": "id=x"}, '--console = "id=x": no such mode'),
    ],
)
def test_mistakes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(parse_vm(arguments(**given)))
    assert str(caught.value).startswith(said)


def test_harmless_defaults_of_cloud_hypervisor_are_taken() -> None:
    load_config(parse_vm(arguments(cpus="boot=1,max_phys_bits=46,nested=on", memory="size=512M,thp=on,mergeable=off")))
    load_config(parse_vm(arguments(cpus="profile=host", disk=["path=a,_disable_io_uring=on,_disable_aio=off"])))


def test_consoles() -> None:
    assert parse_console("--serial", "off") == {"mode": "Off"}
    assert parse_console("--serial", "file=/x=y") == {"mode": "File", "file": "/x=y"}
    assert parse_console("--serial", "socket=/x") == {"mode": "Socket", "socket": "/x"}
    assert parse_console("--serial", 'file="/a,b"') == {"mode": "File", "file": "/a,b"}
    config = load_config(parse_vm(arguments(console='pty,id="a,b",addr=9')))
    assert config.console == ConsoleConfig("Pty", id="a,b", pci_device_id=9)


@pytest.mark.parametrize(
    ("given", "modes"),
    [
        ({}, ("Tty", "Off")),
        ({"serial": "null"}, ("Null", "Off")),
        ({"console": "tty"}, ("Null", "Tty")),
        ({"console": "pty"}, ("Tty", "Pty")),
        ({"console": "tty", "serial": "tty"}, ("Tty", "Tty")),
    ],
)
def test_the_serial_port_shows_on_a_terminal(given: dict[str, str], modes: tuple[str, str]) -> None:
    config = load_config(parse_vm(arguments(**given), terminal=True))
    assert (config.serial.mode, config.console.mode) == modes


def test_api_sockets() -> None:
    assert parse_socket("path=/tmp/a.sock") == "/tmp/a.sock"
    assert parse_socket("/tmp/a.sock") == "/tmp/a.sock"
    assert parse_socket("fd=3") == SocketFd(3)
    assert parse_socket("./fd=3") == "./fd=3"
    for text, said in [
        ("", "no path"),
        ("path=", "no path"),
        ("path=a,b=c", "unknown"),
        ("fd=", "not a number"),
        ("fd=-1", "not a number"),
        ("fd=x", "not a number"),
        ("fd=2147483648", "not a descriptor"),
        ("fd=3,path=x", "both a path and a descriptor"),
    ]:
        with pytest.raises(ConfigError, match=said):
            parse_socket(text)


def test_a_server_is_asked_by_its_path() -> None:
    assert parse_socket_path("path=/a") == "/a"
    with pytest.raises(ConfigError, match="asked by its path"):
        parse_socket_path("fd=3")


def test_deadlines() -> None:
    limits = parse_deadlines(["pause=2,activation=0.5", "stall=7"])
    assert (limits.pause, limits.activation, limits.stall, limits.commit) == (2, 0.5, 7, 10)
    for text, said in [("paus=1", "did you mean pause"), ("pause=x", "not a time"), ("pause=0", "not a time")]:
        with pytest.raises(ConfigError, match=said):
            parse_deadlines([text])


def test_migrations() -> None:
    assert parse_send("unix:/x") == {"destination_url": "unix:/x"}
    assert parse_send("destination_url=tcp:h:1,downtime_ms=50,timeout_s=9,timeout_strategy=ignore,local=off") == {
        "destination_url": "tcp:h:1",
        "downtime_ms": 50,
        "timeout_s": 9,
        "timeout_strategy": "Ignore",
        "local": False,
    }
    with pytest.raises(NotSupported, match="preserve_source = true"):
        load_send(parse_send("destination_url=unix:/x,preserve_source=on"))
    with pytest.raises(NotSupported, match='zone_updates = "\\[m0@1\\]"'):
        load_receive(parse_receive("receiver_url=unix:/x,zone_updates=[m0@1]"))
    assert parse_receive("tcp:[::1]:9") == {"receiver_url": "tcp:[::1]:9"}
    for text, said in [("downtime_ms=1", "no destination_url"), ("unix:/x,downtme_ms=1", "did you mean downtime_ms")]:
        with pytest.raises(ConfigError, match=said):
            parse_send(text)
    assert issubclass(NotSupported, ConfigError)
