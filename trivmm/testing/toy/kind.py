"""A toy, as everybody else sees it. ``KINDS.append(TOY)`` is all that the rest of TriVMM needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from trivmm.syntax import as_text
from trivmm.testing.toy.config import ToyConfig
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Hotplug, Option, Place

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["TOY"]


def _make(config: ToyConfig, place: Place) -> WorkerDevice:
    from trivmm.testing.toy.device import ToyDevice

    return ToyDevice(config, place.memory, place.name)


TOY: Final = DeviceKind(
    config=ToyConfig,
    contract=Contract("ToyConfig", "toys", many=True),
    option=Option("toy", "src=FILE[,id=…]", "a toy, for tests", keys={"src": ("src", as_text), **BUS_KEYS}, main="src"),
    name="_toy{}",
    make=_make,
    hotplug=Hotplug("add-toy", "The toy could not be added to the VM"),
)
