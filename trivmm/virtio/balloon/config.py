"""A balloon's configuration."""

from __future__ import annotations

import attrs

from trivmm.config import check_id, typed
from trivmm.errors import ConfigError
from trivmm.values import parse_size

__all__ = ["BalloonConfig"]


def _as_size(value: int | str) -> int:
    return parse_size("balloon.size", value) if isinstance(value, str) else value


@attrs.frozen(field_transformer=typed("balloon."))
class BalloonConfig:
    """``size``: bytes that the guest is asked for from the start, or text such as ``512M``; whole pages of it count.
    ``deflate_on_oom``: the guest may take pages back when it runs out of memory. ``free_page_reporting``: it tells of
    pages that it does not use for now, whatever the size."""

    size: int = attrs.field(default=0, converter=_as_size)
    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        check_id("balloon.id", self.id)
        if self.size < 0:
            raise ConfigError("balloon.size", self.size, "less than nothing", "give 0, or a size such as 512M")
