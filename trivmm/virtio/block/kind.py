"""virtio-blk, as everybody else sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs

from trivmm.config import DiskConfig
from trivmm.errors import ConfigError
from trivmm.notyet import NotYet
from trivmm.syntax import as_text, parse_integer, parse_toggle
from trivmm.virtio.kind import BUS_KEYS, BUS_NOT_YET, Contract, DeviceKind, Hotplug, Option, Place
from trivmm.virtio.limiter import LIMITER_KEYS, parse_limited

if TYPE_CHECKING:
    from trivmm.virtio.device import WorkerDevice

__all__ = ["BLOCK", "parse_image_type"]

MASS_STORAGE: Final = 0x018000  # PCI class: mass storage, other
IMAGE_TYPES: Final[Mapping[str, str]] = {
    "raw": "Raw",
    "unknown": "Unknown",
    "qcow2": "Qcow2",
    "vhdx": "Vhdx",
    "vhd": "FixedVhd",
    "fixedvhd": "FixedVhd",
    "vmdk": "FlatVmdk",
    "flatvmdk": "FlatVmdk",
}  # as Cloud Hypervisor's option spells them, and its API


def parse_image_type(option: str, text: str) -> str:
    """Cloud Hypervisor's words, and the API's. :raises ConfigError:"""
    made = IMAGE_TYPES.get(text.lower())
    if made is None:
        raise ConfigError(option, text, "no such type", "give raw or qcow2, or leave it out")
    return made


def _make(config: DiskConfig, place: Place) -> WorkerDevice:
    from trivmm.virtio.block.device import BlockDevice

    return BlockDevice(config, place.memory, place.name, lock=not place.incoming)


def _check(disks: Sequence[DiskConfig]) -> None:
    from trivmm.virtio.block.file import check_given_once

    given = [(f"disks[{index}].path", disk.path, disk.readonly) for index, disk in enumerate(disks)]
    check_given_once(given, "give each disk its own, or give both readonly=on")


def _as_built(disk: DiskConfig, device: WorkerDevice) -> DiskConfig:
    """Its format is said from now on: nobody guesses again once the guest can write there."""
    image: Any = device.storage
    return attrs.evolve(disk, id=device.name, image_type=image.image_type)


BLOCK: Final = DeviceKind(
    config=DiskConfig,
    contract=Contract(
        "DiskConfig",
        "disks",
        many=True,
        required=("path",),
        not_yet={
            **BUS_NOT_YET,
            "vhost_user": False,
            "vhost_socket": None,
            "rate_limit_group": None,
            "queue_affinity": None,
            "disable_aio": NotYet(False, also=(True,)),  # it is not used here
            "lock_granularity": "ByteRange",
        },
    ),
    option=Option(
        "disk",
        "path=FILE[,readonly=on,direct=on,bw_size=…,bw_refill_time=MS,…]",
        "raw and qcow2 images; several values, or the option again",
        keys={
            "path": ("path", as_text),
            "readonly": ("readonly", parse_toggle),
            "serial": ("serial", as_text),
            "num_queues": ("num_queues", parse_integer),
            "queue_size": ("queue_size", parse_integer),
            "direct": ("direct", parse_toggle),
            "vhost_user": ("vhost_user", parse_toggle),
            "socket": ("vhost_socket", as_text),
            "queue_affinity": ("queue_affinity", as_text),
            "rate_limit_group": ("rate_limit_group", as_text),
            "_disable_io_uring": ("disable_io_uring", parse_toggle),
            "_disable_aio": ("disable_aio", parse_toggle),
            "backing_files": ("backing_files", parse_toggle),
            "sparse": ("sparse", parse_toggle),
            "image_type": ("image_type", parse_image_type),
            "lock_granularity": ("lock_granularity", as_text),
            **LIMITER_KEYS,
            **BUS_KEYS,
        },
        main="path",
        custom=partial(parse_limited, main="path"),
    ),
    name="_disk{}",
    make=_make,
    pci_class=MASS_STORAGE,
    bar_is_64bit=False,
    check=_check,
    as_built=_as_built,
    hotplug=Hotplug("add-disk", "The disk could not be added to the VM"),
)
