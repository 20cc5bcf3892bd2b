"""A network interface's configuration: Cloud Hypervisor's keys, and ``link`` beside them for what is no tap.

``tap`` names one, or an empty one (nothing given) asks for a new one; ``fds`` are open ones. ``link`` is instead:

================  ====================================================================================================
``connect:PATH``  a unix stream socket that somebody listens at: another VM, a running passt, QEMU's ``-netdev stream``
``listen:PATH``   a unix stream socket that is made here; who connects last is the other end
``dgram:PATH``    a unix datagram socket that is made here; frames go to the one at ``peer``
``passt``         a passt of its own: the host's network without root, and its services at the gateway's address
================  ====================================================================================================

Pure.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Any, Final

import attrs

from trivmm.config import check_id, typed
from trivmm.errors import ConfigError
from trivmm.unixsocket import check_path

__all__ = ["MAX_PAIRS", "NetConfig", "mac_bytes", "split_link"]

MAX_PAIRS: Final = 16  # ``TV_NET_PAIRS``: a worker thread each
MIN_QUEUE_SIZE, MAX_QUEUE_SIZE = 4, 1024
MIN_MTU, MAX_MTU = 1280, 65535  # Cloud Hypervisor's least, IPv6's
IFNAMSIZ: Final = 16
RESERVED_FDS, MAX_FD = 2, (1 << 31) - 1  # standard input, output and error are nobody's network
MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
STREAMS: Final = ("connect", "listen")
LINKS: Final = "connect:PATH, listen:PATH, dgram:PATH or passt"


def _local_mac() -> str:
    """A random address of those that nobody is given: locally administered, unicast."""
    made = bytearray(os.urandom(6))
    made[0] = made[0] & 0xFC | 2
    return made.hex(":")


def _as_mac(value: Any) -> Any:
    if value is None:
        return _local_mac()
    return value.lower() if isinstance(value, str) else value  # anything else is refused as it is


def _as_fds(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def split_link(link: str) -> tuple[str, str]:
    """(kind, path): ``connect:/x`` is ("connect", "/x")."""
    kind, _, path = link.partition(":")
    return kind, path


@attrs.frozen(field_transformer=typed("net."))
class NetConfig:
    """``mac`` is the guest's; one is made up where none is given, and kept from then on. ``num_queues`` counts both
    directions. ``fds``: open taps, one a pair of queues; they stay their owner's."""

    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str = attrs.field(default=None, converter=_as_mac)
    host_mac: str | None = None
    mtu: int | None = None
    num_queues: int = 2
    queue_size: int = 256
    fds: tuple[int, ...] | None = attrs.field(default=None, converter=_as_fds)
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True
    link: str | None = None
    peer: str | None = None
    id: str | None = None
    pci_device_id: int | None = None

    @property
    def pairs(self) -> int:
        return self.num_queues // 2

    @property
    def is_tap(self) -> bool:
        """Has virtio-net headers, so that checksums and segmentation can be left to others."""
        return self.link is None

    def __attrs_post_init__(self) -> None:
        check_id("net.id", self.id)
        _check_mac("net.mac", self.mac)
        if self.host_mac is not None:
            _check_mac("net.host_mac", self.host_mac.lower())
        self._check_queues()
        if self.mtu is not None and not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigError("net.mtu", self.mtu, "out of range", f"give {MIN_MTU} to {MAX_MTU}, or leave it out")
        if not self.offload_csum and (self.offload_tso or self.offload_ufo):
            remedy = "give offload_tso=off,offload_ufo=off too"
            raise ConfigError("net.offload_csum", False, "segmentation needs checksums", remedy)
        self._check_addresses()
        if self.link is not None:
            self._check_link(self.link)
        elif self.peer is not None:
            raise ConfigError("net.peer", self.peer, "there is no link for it", "give link=dgram:PATH")
        self._check_tap()

    def _check_queues(self) -> None:
        if self.num_queues < 2 or self.num_queues % 2 or self.pairs > MAX_PAIRS:
            raise ConfigError(
                "net.num_queues", self.num_queues, "not a number of queues", f"give an even one, 2 to {2 * MAX_PAIRS}"
            )
        size = self.queue_size
        if not MIN_QUEUE_SIZE <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            limits = f"{MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"
            raise ConfigError("net.queue_size", size, "not a queue size", f"give a power of two, {limits}")

    def _check_addresses(self) -> None:
        for field, value in (("ip", self.ip), ("mask", self.mask)):
            if value is None:
                continue
            try:
                ipaddress.IPv4Address(value)
            except ValueError as error:
                raise ConfigError(f"net.{field}", value, "not an IPv4 address", "give one such as 10.0.0.1") from error
        if (self.ip is None) != (self.mask is None):
            missing, there = ("mask", self.ip) if self.mask is None else ("ip", self.mask)
            raise ConfigError(f"net.{missing}", None, f"missing, and the other one is {there}", "give both, or none")

    def _check_link(self, link: str) -> None:
        kind, path = split_link(link)
        if kind in (*STREAMS, "dgram"):
            check_path(path, "net.link", link)
        elif link != "passt":
            raise ConfigError("net.link", link, "no such link", f"give {LINKS}")
        if kind == "dgram":
            if self.peer is None:
                raise ConfigError("net.peer", None, "missing, and the link is a datagram one", "give peer=PATH")
            check_path(self.peer, "net.peer", self.peer)
            if self.peer == path:
                raise ConfigError("net.peer", self.peer, "the interface itself", "give the other one's path")
        elif self.peer is not None:
            raise ConfigError("net.peer", self.peer, f"a {kind} link has its other end itself", "leave it out")
        given = {"tap": self.tap, "fds": self.fds, "ip": self.ip, "host_mac": self.host_mac}
        for field, value in given.items():
            if value is not None:
                raise ConfigError(f"net.{field}", value, "of a tap, and there is a link", "leave one of both out")
        if self.pairs > 1:
            remedy = "give num_queues=2, or a tap"
            raise ConfigError("net.num_queues", self.num_queues, "a link has one pair of queues", remedy)

    def _check_tap(self) -> None:
        name = self.tap
        if name and (len(os.fsencode(name)) >= IFNAMSIZ or not name.isprintable() or set(name) & set("/ ")):
            problem = f"not the name of an interface, which has less than {IFNAMSIZ} bytes"
            raise ConfigError("net.tap", name, problem, "give the name of a tap")
        if self.fds is None:
            return
        if name is not None:
            raise ConfigError("net.fds", list(self.fds), "there is a tap's name too", "leave one of both out")
        if len(self.fds) != self.pairs:
            raise ConfigError(
                "net.fds",
                list(self.fds),
                f"not one a pair of queues ({self.pairs})",
                f"give num_queues={2 * len(self.fds)}",
            )
        for fd in self.fds:
            if not RESERVED_FDS < fd <= MAX_FD:
                raise ConfigError("net.fds", fd, "not a descriptor for this", "give the number of an open tap")


def _check_mac(field: str, value: str) -> None:
    if not MAC.fullmatch(value):
        raise ConfigError(field, value, "not a MAC address", "give one such as 52:54:00:12:34:56, or leave it out")
    if int(value[:2], 16) & 1:
        raise ConfigError(field, value, "a multicast address", "give one whose first byte is even")
    if not int(value.replace(":", ""), 16):
        raise ConfigError(field, value, "no address", "give one such as 52:54:00:12:34:56, or leave it out")
