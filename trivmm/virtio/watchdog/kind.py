"""virtio-watchdog, as everybody else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivmm.virtio.kind import Contract, DeviceKind, Option, Place
from trivmm.virtio.watchdog.config import WatchdogConfig

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["WATCHDOG"]


def _make(config: WatchdogConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.watchdog.device import WatchdogDevice

    return WatchdogDevice(place.memory, place.name)


WATCHDOG: Final = DeviceKind(
    config=WatchdogConfig,
    contract=Contract("", "watchdog", many=False, flag=True, not_yet={}),
    option=Option("watchdog", "", "a guest that stops to ping it is reset", keys={}),
    name="__watchdog",
    make=_make,
)
