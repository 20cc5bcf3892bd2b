"""A watchdog's configuration: there is one, or there is none."""

from __future__ import annotations

import attrs

from trivmm.config import check_id, typed

__all__ = ["WatchdogConfig"]


@attrs.frozen(field_transformer=typed("watchdog."))
class WatchdogConfig:
    """In the API a boolean; what it gets beside that is the machine's doing."""

    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        check_id("watchdog.id", self.id)
