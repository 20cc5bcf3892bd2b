"""A persistent memory's configuration."""

from __future__ import annotations

import os

import attrs

from trivmm.config import PathText, check_id, typed
from trivmm.errors import ConfigError
from trivmm.memory.layout import DEVICE_MEMORY_ALIGNMENT
from trivmm.values import parse_size

__all__ = ["PmemConfig"]


def _as_path(value: PathText) -> str:
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


def _as_size(value: int | str | None) -> int | None:
    return parse_size("pmem.size", value) if isinstance(value, str) else value


@attrs.frozen(field_transformer=typed("pmem."))
class PmemConfig:
    """``file`` is mapped: all of it, or the first ``size`` bytes. A folder: a new file of ``size`` bytes that has no
    name there and is gone with the machine. ``discard_writes``: what the guest writes is not kept."""

    file: str = attrs.field(converter=_as_path)
    size: int | None = attrs.field(default=None, converter=_as_size)
    discard_writes: bool = False
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        check_id("pmem.id", self.id)
        if self.size is not None and (self.size <= 0 or self.size % DEVICE_MEMORY_ALIGNMENT):
            up = max(1, -(-self.size // DEVICE_MEMORY_ALIGNMENT)) * DEVICE_MEMORY_ALIGNMENT
            raise ConfigError("pmem.size", self.size, "not a multiple of 2 MiB", f"give {up}")
