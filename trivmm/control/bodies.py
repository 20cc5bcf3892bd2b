"""Bodies of requests that are no configuration of a VM: what :mod:`trivmm.control.schema` makes of them. Plain data."""

from __future__ import annotations

import attrs

from trivmm.migration.options import SendOptions

__all__ = [
    "ReceiveMigrationData",
    "RemoveDeviceData",
    "ResizeData",
    "ResizeDiskData",
    "ResolveMigrationData",
    "SendMigrationData",
]


@attrs.frozen
class SendMigrationData:
    """The body of vm.send-migration: where to, and how."""

    destination_url: str
    options: SendOptions


@attrs.frozen
class ReceiveMigrationData:
    receiver_url: str


@attrs.frozen
class ResolveMigrationData:
    """Ours. ``force``: take the doubt away although nobody knows, at the risk of two copies."""

    force: bool = False


@attrs.frozen
class ResizeData:
    """Sizes that a VM is to have, RAM and balloon in bytes; None: as it is."""

    desired_vcpus: int | None = None
    desired_ram: int | None = None
    desired_balloon: int | None = None


@attrs.frozen
class RemoveDeviceData:
    id: str


@attrs.frozen
class ResizeDiskData:
    """``desired_size`` in bytes."""

    id: str
    desired_size: int
