"""virtio-pmem, as everybody else sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from trivmm.syntax import as_text, parse_toggle
from trivmm.values import parse_size
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Hotplug, Option, Place
from trivmm.virtio.pmem.config import PmemConfig

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["PMEM"]


def _make(config: PmemConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.pmem.device import PmemDevice

    return PmemDevice(config, place.memory, place.name, lock=not place.incoming)


def _check(all_of_them: Sequence[PmemConfig]) -> None:
    from trivmm.virtio.block.file import check_given_once

    given = [(f"pmem[{index}].file", each.file, each.discard_writes) for index, each in enumerate(all_of_them)]
    check_given_once(given, "give each its own, or give both discard_writes=on")


PMEM: Final = DeviceKind(
    config=PmemConfig,
    contract=Contract("PmemConfig", "pmem", many=True, required=("file",)),
    option=Option(
        "pmem",
        "file=FILE[,size=SIZE,discard_writes=on,id=…]",
        "a file mapped as memory; several values, or the option again",
        keys={
            "file": ("file", as_text),
            "size": ("size", parse_size),
            "discard_writes": ("discard_writes", parse_toggle),
            **BUS_KEYS,
        },
        main="file",
    ),
    name="_pmem{}",
    make=_make,
    check=_check,
    hotplug=Hotplug("add-pmem", "The pmem device could not be added to the VM"),
)
