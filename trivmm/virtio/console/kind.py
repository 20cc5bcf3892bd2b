"""virtio-console, as everybody else sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivmm.config import ConsoleConfig
from trivmm.syntax import parse_console
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Option, Place

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["CONSOLE"]


def _make(config: ConsoleConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.console.device import ConsoleDevice

    return ConsoleDevice(config, place.memory, place.sink, place.name)


CONSOLE: Final = DeviceKind(
    config=ConsoleConfig,
    contract=Contract("ConsoleConfig", "console", many=False, required=("mode",)),
    option=Option(
        "console",
        "off|null|tty|pty|file=FILE|socket=PATH[,id=…]",
        "virtio-console (off)",
        keys=BUS_KEYS,
        absent="off",
        custom=parse_console,
    ),
    name="__console",
    make=_make,
    present=lambda config: config.mode != "Off",
    line=lambda config: config,
)
