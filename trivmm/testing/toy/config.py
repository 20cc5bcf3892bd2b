"""A toy's configuration."""

from __future__ import annotations

import attrs

from trivmm.config import check_id, typed

__all__ = ["ToyConfig"]


@attrs.frozen(field_transformer=typed("toys."))
class ToyConfig:
    src: str = "/dev/urandom"
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        check_id("toys.id", self.id)
