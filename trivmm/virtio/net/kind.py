"""virtio-net, as everybody else sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from trivmm.errors import ConfigError
from trivmm.syntax import as_text, parse_integer, parse_toggle, split_commas
from trivmm.virtio.kind import BUS_KEYS, BUS_NOT_YET, Contract, DeviceKind, Hotplug, Option, Place
from trivmm.virtio.net.config import NetConfig, split_link

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["NET"]

NETWORK: Final = 0x020000  # PCI class: network controller, Ethernet


def _make(config: NetConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.net.device import NetDevice

    passt_s = place.deadlines.passt
    return NetDevice(config, place.memory, place.name, incoming=place.incoming, passt_s=passt_s)


def parse_fds(option: str, text: str) -> list[int]:
    """``3`` or ``[3,4]``. :raises ConfigError:"""
    return [parse_integer(option, part.strip()) for part in split_commas(option, text.strip("[]"))]


def _check(nets: Sequence[NetConfig]) -> None:
    """What two interfaces of a VM can't share."""
    seen: dict[tuple[str, Any], int] = {}
    for index, net in enumerate(nets):
        mine: list[tuple[str, str, Any]] = [("mac", "mac", net.mac)]
        mine += [("tap", "tap", net.tap)] if net.tap else []
        mine += [("fds", "fds", fd) for fd in net.fds or ()]
        if net.link is not None and net.link != "passt":
            mine.append(("link", "link", split_link(net.link)[1]))
        for field, what, value in mine:
            first = seen.setdefault((what, value), index)
            if first != index or mine.count((field, what, value)) > 1:
                where, other = f"net[{index}].{field}", f"net[{first}].{field}"
                raise ConfigError(where, value, f"the same as {other}", "give each its own")


LIMITER: Final = ("bw_size", "bw_one_time_burst", "bw_refill_time", "ops_size", "ops_one_time_burst", "ops_refill_time")

NET: Final = DeviceKind(
    config=NetConfig,
    contract=Contract(
        "NetConfig",
        "net",
        many=True,
        not_yet={
            **BUS_NOT_YET,
            "vhost_user": False,
            "vhost_socket": None,
            "vhost_mode": "Client",
            "rate_limiter_config": None,
        },
    ),
    option=Option(
        "net",
        "[tap=NAME|fd=N|link=passt|link=connect:PATH|…][,mac=…,mtu=…,num_queues=…]",
        "network interfaces: a tap, a unix socket, or (passt, alone too) the host's network without root",
        keys={
            "tap": ("tap", as_text),
            "ip": ("ip", as_text),
            "mask": ("mask", as_text),
            "mac": ("mac", as_text),
            "host_mac": ("host_mac", as_text),
            "mtu": ("mtu", parse_integer),
            "num_queues": ("num_queues", parse_integer),
            "queue_size": ("queue_size", parse_integer),
            "fd": ("fds", parse_fds),
            "offload_tso": ("offload_tso", parse_toggle),
            "offload_ufo": ("offload_ufo", parse_toggle),
            "offload_csum": ("offload_csum", parse_toggle),
            "link": ("link", as_text),
            "peer": ("peer", as_text),
            "vhost_user": ("vhost_user", parse_toggle),
            "socket": ("vhost_socket", as_text),
            "vhost_mode": ("vhost_mode", as_text),
            **dict.fromkeys(LIMITER, ("rate_limiter_config", as_text)),
            **BUS_KEYS,
        },
        main="tap",
        plain="link=passt",
    ),
    name="_net{}",
    make=_make,
    pci_class=NETWORK,
    check=_check,
    hotplug=Hotplug("add-net", "The network device could not be added to the VM"),
    descriptors="fds",
)
