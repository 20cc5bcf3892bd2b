"""A network interface's configuration: what may be, what can't, in which words; and headers that may be believed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.cli.options import parse_vm
from trivmm.cli.parser import run_parser
from trivmm.config import PayloadConfig, VmConfig
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError
from trivmm.state.setup import config_from_setup, config_to_setup
from trivmm.virtio.kinds import sections
from trivmm.virtio.net.config import NetConfig
from trivmm.virtio.net.device import features_of
from trivmm.virtio.net.kind import NET

KERNEL = {"payload": {"kernel": "/k"}}


def nets(*words: str) -> list[NetConfig]:
    """Of a command line."""
    return list(NET.of(load_config(parse_vm(run_parser().parse(["--kernel", "/k", *words])))))


def test_an_address_is_made_up_once() -> None:
    net = NetConfig()
    assert int(net.mac[:2], 16) & 3 == 2  # locally administered, of one machine
    assert net.mac != NetConfig().mac
    config = VmConfig(PayloadConfig("/k"), virtio=[net])
    assert load_config(dump_config(config)) == config
    assert config_from_setup(config_to_setup(config, sections()), sections()).virtio == (net,)


def test_options() -> None:
    (net,) = nets(
        "--net", "tap=t0,mac=52:54:00:AA:bb:cc,ip=10.0.0.1,mask=255.0.0.0,mtu=1500,num_queues=4,queue_size=64"
    )
    assert (net.tap, net.mac, net.mtu, net.num_queues, net.queue_size) == ("t0", "52:54:00:aa:bb:cc", 1500, 4, 64)
    (net,) = nets("--net", "fd=[3,4],num_queues=4,id=n,offload_tso=off,offload_ufo=off,offload_csum=off")
    assert (net.fds, net.id, net.offload_csum) == ((3, 4), "n", False)
    assert nets("--net", "fd=5")[0].fds == (5,)
    assert [net.link for net in nets("--net", "link=listen:/a", "link=dgram:/b,peer=/c")] == ["listen:/a", "dgram:/b"]
    assert [net.tap for net in nets("--net", "tap=a", "--net", "tap=b")] == ["a", "b"]


def test_the_option_alone_is_the_internet_without_root() -> None:
    (net,) = nets("--net")
    assert net.link == "passt"
    assert [net.link for net in nets("--net", "--net", "link=listen:/a")] == ["passt", "listen:/a"]
    assert not nets()


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ({"mac": "52:54:00:00:00"}, 'net.mac = "52:54:00:00:00": not a MAC address'),
        ({"mac": "01:54:00:00:00:00"}, 'net.mac = "01:54:00:00:00:00": a multicast address'),
        ({"mac": "00:00:00:00:00:00"}, 'net.mac = "00:00:00:00:00:00": no address'),
        ({"mac": 7}, "net[0].mac = 7: wrong type"),
        ({"host_mac": "x"}, 'net.host_mac = "x": not a MAC address'),
        ({"num_queues": 0}, "net.num_queues = 0: not a number of queues; give an even one, 2 to 32"),
        ({"num_queues": 3}, "net.num_queues = 3"),
        ({"num_queues": 34}, "net.num_queues = 34"),
        ({"queue_size": 3}, "net.queue_size = 3: not a queue size"),
        ({"queue_size": 2048}, "net.queue_size = 2048: not a queue size; give a power of two, 4 to 1024"),
        ({"mtu": 1279}, "net.mtu = 1279: out of range"),
        ({"mtu": 65536}, "net.mtu = 65536: out of range"),
        ({"offload_csum": False}, "net.offload_csum = false: segmentation needs checksums"),
        ({"ip": "10.0.0.1"}, "net.mask = null: missing, and the other one is 10.0.0.1"),
        ({"mask": "255.0.0.0"}, "net.ip = null: missing"),
        ({"ip": "fe80::1", "mask": "255.0.0.0"}, 'net.ip = "fe80::1": not an IPv4 address'),
        ({"tap": "0123456789abcdef"}, 'net.tap = "0123456789abcdef": not the name of an interface'),
        ({"tap": "a/b"}, 'net.tap = "a/b": not the name of an interface'),
        ({"tap": "a\nb"}, 'net.tap = "a\\nb": not the name of an interface'),
        ({"fds": [2]}, "net.fds = 2: not a descriptor for this"),
        ({"fds": [1 << 31]}, "net.fds = 2147483648: not a descriptor for this"),
        ({"fds": [3, 4]}, "net.fds = [3, 4]: not one a pair of queues (1); give num_queues=4"),
        ({"fds": [3], "tap": "t"}, "net.fds = [3]: there is a tap's name too"),
        ({"fds": ["3"]}, 'net[0].fds[0] = "3": wrong type'),
        ({"link": "vde:/x"}, 'net.link = "vde:/x": no such link; give connect:PATH, listen:PATH, dgram:PATH or passt'),
        ({"link": "passt:/x"}, 'net.link = "passt:/x": no such link'),
        ({"link": "listen:"}, 'net.link = "listen:": no path'),
        ({"link": "connect:" + "x" * 200}, 'net.link = "connect:xxx'),
        ({"link": "dgram:/x"}, "net.peer = null: missing, and the link is a datagram one"),
        ({"link": "dgram:/x", "peer": "/x"}, 'net.peer = "/x": the interface itself'),
        ({"link": "listen:/x", "peer": "/y"}, 'net.peer = "/y": a listen link has its other end itself'),
        ({"peer": "/y"}, 'net.peer = "/y": there is no link for it'),
        ({"link": "passt", "tap": "t"}, 'net.tap = "t": of a tap, and there is a link'),
        ({"link": "passt", "fds": [3]}, "net.fds = "),
        ({"link": "passt", "num_queues": 4}, "net.num_queues = 4: a link has one pair of queues"),
        ({"id": "__net"}, 'net.id = "__net"'),
        ({"vhost_user": True}, "net[0].vhost_user = true: not supported yet"),
        ({"vhost_socket": "/s"}, 'net[0].vhost_socket = "/s": not supported yet'),
        ({"vhost_mode": "Server"}, 'net[0].vhost_mode = "Server": not supported yet'),
        ({"rate_limiter_config": {}}, "net[0].rate_limiter_config = {}: not supported yet"),
        ({"pci_segment": 1}, "net[0].pci_segment = 1: not supported yet"),
    ],
)
def test_mistakes(net: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**KERNEL, "net": [net]})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("two", "said"),
    [
        (({"tap": "t"}, {"tap": "t"}), 'net[1].tap = "t": the same as net[0].tap'),
        (({"fds": [3]}, {"fds": [3]}), "net[1].fds = 3: the same as net[0].fds"),
        (({"fds": [3, 3], "num_queues": 4},), "net[0].fds = 3: the same as net[0].fds"),
        (({"link": "listen:/a"}, {"link": "connect:/a"}), 'net[1].link = "/a": the same as net[0].link'),
        (({"mac": "52:54:00:00:00:01"}, {"mac": "52:54:00:00:00:01"}), "net[1].mac = "),
    ],
)
def test_what_two_interfaces_can_not_share(two: tuple[dict[str, Any], ...], said: str) -> None:
    config = load_config({**KERNEL, "net": list(two)})
    with pytest.raises(ConfigError) as caught:
        NET.check(NET.of(config))
    assert str(caught.value).startswith(said)


def test_two_that_share_nothing() -> None:
    NET.check([NetConfig(), NetConfig(), NetConfig(link="passt"), NetConfig(link="passt"), NetConfig(link="listen:/a")])


def test_what_is_offered_depends_on_the_configuration_alone() -> None:
    offloads = lib.TV_NET_F_CSUM | lib.TV_NET_F_HOST_TSO4 | lib.TV_NET_F_HOST_UFO | lib.TV_NET_GUEST_OFFLOADS
    assert features_of(NetConfig()) & offloads == offloads
    assert features_of(NetConfig(offload_tso=False, offload_ufo=False)) & offloads == (
        lib.TV_NET_F_CSUM | lib.TV_NET_F_GUEST_CSUM
    )
    assert not features_of(NetConfig(link="passt")) & offloads  # nobody there to leave a checksum to
    assert bool(features_of(NetConfig(num_queues=4)) & lib.TV_NET_F_MQ)
    assert not features_of(NetConfig()) & (lib.TV_NET_F_MQ | lib.TV_NET_F_MTU)
    assert features_of(NetConfig(mtu=9000)) & lib.TV_NET_F_MTU


ALLOWED = st.builds(
    lambda *flags: dict(zip(("checksum", "tso4", "tso6", "ecn", "ufo", "valid"), flags, strict=True)),
    *[st.booleans()] * 6,
)
SHORT = st.one_of(st.integers(0, 200), st.integers(0, 0xFFFF))


@given(st.integers(0, 255), st.integers(0, 255), SHORT, SHORT, SHORT, SHORT, st.integers(14, 65550), ALLOWED)
def test_a_header_that_passes_points_into_its_frame_and_asks_for_what_it_may(
    flags: int, kind: int, hdr_len: int, size: int, start: int, offset: int, length: int, allowed: dict[str, bool]
) -> None:
    """Beside a plain restatement of what a receiver may rely on (virtio 1.2 section 5.1.6)."""
    header = ffi.new("struct tv_vnet_header *", [flags, kind, hdr_len, size, start, offset, 77])
    permit = ffi.new("struct tv_vnet_allowed *", allowed)
    passed = lib.tv_vnet_check(header, length, permit) == 0
    wants = {1: "tso4", 4: "tso6", 3: "ufo"}.get(kind & 0x7F)
    good_checksum = allowed["checksum"] and start >= 14 and start + offset + 2 <= length
    good = not flags & 1 or good_checksum
    if kind:
        good &= bool(flags & 1) and wants is not None and allowed[wants] and size > 0 and hdr_len <= length
        good &= not kind & 0x80 or (allowed["ecn"] and wants != "ufo")
    assert passed == good
    if passed:
        checksum = bool(flags & 1)
        assert header.flags == (1 if checksum else 2 if flags & 2 and allowed["valid"] else 0)
        assert (header.csum_start, header.csum_offset) == ((start, offset) if checksum else (0, 0))
        assert (header.gso_type, header.gso_size) == ((kind, size) if kind else (0, 0))
        assert header.num_buffers == 0


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (0, ""),
        (lib.TV_NET_F_HOST_TSO4 | lib.TV_NET_F_HOST_UFO, ""),  # without CSUM
        (lib.TV_NET_F_CSUM | lib.TV_NET_F_HOST_ECN, "checksum"),  # without segmentation
        (lib.TV_NET_F_CSUM | lib.TV_NET_F_HOST_TSO6 | lib.TV_NET_F_HOST_ECN, "checksum tso6 ecn"),
        (lib.TV_NET_GUEST_OFFLOADS, ""),  # are the other direction's
    ],
)
def test_features_that_need_others(features: int, expected: str) -> None:
    allowed = lib.tv_vnet_from_driver(features)
    names = ("checksum", "tso4", "tso6", "ecn", "ufo", "valid")
    assert " ".join(name for name in names if getattr(allowed, name)) == expected
