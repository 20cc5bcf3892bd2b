"""virtio-balloon, as everybody else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivmm.syntax import parse_toggle
from trivmm.values import parse_size
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Option, Place

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["BALLOON"]


def _make(config: BalloonConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.balloon.device import BalloonDevice

    return BalloonDevice(config, place.memory, place.name)


BALLOON: Final = DeviceKind(
    config=BalloonConfig,
    contract=Contract("BalloonConfig", "balloon", many=False, required=("size",)),
    option=Option(
        "balloon",
        "size=SIZE[,deflate_on_oom=on,free_page_reporting=on,id=…]",
        "memory that the guest gives back; vm.resize changes how much",
        keys={
            "size": ("size", parse_size),
            "deflate_on_oom": ("deflate_on_oom", parse_toggle),
            "free_page_reporting": ("free_page_reporting", parse_toggle),
            **BUS_KEYS,
        },
        main="size",
        base={"size": 0},
    ),
    name="__balloon",
    make=_make,
)
