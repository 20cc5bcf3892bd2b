"""A vsock device's configuration, in the contract's words."""

from __future__ import annotations

import os
from typing import Final

import attrs

from trivmm.config import check_id, typed
from trivmm.errors import ConfigError

__all__ = ["VsockConfig"]

FIRST_CID: Final = 3  # vsock(7): 0 is the hypervisor's, 1 local, 2 the host
ANY_CID: Final = (1 << 32) - 1


def _as_path(value: str | os.PathLike[str]) -> str:
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


@attrs.frozen(field_transformer=typed("vsock."))
class VsockConfig:
    """``cid`` is the guest's address; the host is 2. ``socket`` is the path where clients of the host connect and say
    ``CONNECT <port>``; a guest's connection to port N of the host goes to the unix socket ``<socket>_N``."""

    cid: int
    socket: str = attrs.field(converter=_as_path)
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        if not FIRST_CID <= self.cid < ANY_CID:
            raise ConfigError(
                "vsock.cid", self.cid, "no guest can have that address", f"give {FIRST_CID} to {ANY_CID - 1}"
            )
        check_id("vsock.id", self.id)
