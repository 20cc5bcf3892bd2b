"""What the PCI bus asks of a function: configuration space, BAR accesses, and news of moved BARs."""

from __future__ import annotations

from typing import Protocol

from trivmm.bus.space import Effect
from trivmm.platform.pci.config_space import PciConfigSpace

__all__ = ["PciFunction"]


class PciFunction(Protocol):
    """Accesses come from any vCPU thread and never block."""

    name: str
    config: PciConfigSpace

    def config_read(self, offset: int, size: int) -> bytes:
        """Usually ``config.read``; a virtio config-access window answers for its data register here."""

    def config_write(self, offset: int, data: bytes) -> Effect:
        """Usually ``config.write``; a virtio config-access window may give a ticket. The bus sees for itself
        whether BARs have moved."""

    def bar_read(self, bar: int, offset: int, size: int) -> bytes: ...

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect: ...

    def bars_changed(self) -> None:
        """``config.bars[…].mapped`` changed: move doorbells. Called under the bus's placement lock, so that two
        moves never interleave; must not touch configuration space through the bus."""
