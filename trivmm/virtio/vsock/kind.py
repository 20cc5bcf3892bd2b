"""virtio-vsock, as everybody else sees it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from trivmm.errors import ConfigError
from trivmm.syntax import as_text, parse_integer
from trivmm.unixsocket import MAX_UNIX_PATH, check_path
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Hotplug, Option, Place
from trivmm.virtio.vsock.config import VsockConfig

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["VSOCK"]

SUFFIX: Final = len("_4294967295")  # of a guest's connection, behind the path


def _make(config: VsockConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.vsock.device import VsockDevice

    return VsockDevice(config, place.memory, place.name, listen=not place.incoming, deadlines=place.deadlines)


def _check(devices: Sequence[VsockConfig]) -> None:
    if len(devices) > 1:
        raise ConfigError("vsock", len(devices), "more than one vsock device", "give one")
    for each in devices:
        check_path(each.socket, "vsock.socket", each.socket)
        if len(os.fsencode(each.socket)) > MAX_UNIX_PATH - SUFFIX:
            raise ConfigError(
                "vsock.socket",
                each.socket,
                f"has more than {MAX_UNIX_PATH - SUFFIX} bytes: no socket path holds it with a port behind it",
                "give a shorter path",
            )


VSOCK: Final = DeviceKind(
    config=VsockConfig,
    contract=Contract("VsockConfig", "vsock", many=False, required=("cid", "socket")),
    option=Option(
        "vsock",
        "cid=N,socket=PATH[,id=…]",
        "streams between the guest's vsock sockets and unix sockets (none)",
        keys={"cid": ("cid", parse_integer), "socket": ("socket", as_text), **BUS_KEYS},
        main="socket",
    ),
    name="_vsock{}",
    make=_make,
    check=_check,
    hotplug=Hotplug("add-vsock", "The vsock device could not be added to the VM"),
)
