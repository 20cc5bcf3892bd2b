"""virtio-rng, as everybody else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivmm.config import RngConfig
from trivmm.syntax import as_text
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Option, Place

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["RNG"]


def _make(config: RngConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.rng.device import RngDevice

    return RngDevice(config, place.memory, place.name)


RNG: Final = DeviceKind(
    config=RngConfig,
    contract=Contract("RngConfig", "rng", many=False, required=("src",)),
    option=Option(
        "rng",
        "src=FILE",
        "entropy (/dev/urandom)",
        keys={"src": ("src", as_text), **BUS_KEYS},
        main="src",
        absent="",
        base={"src": "/dev/urandom"},
    ),
    name="__rng",
    make=_make,
)
