"""The bus between the local APICs of a soft VM: MSIs, the I/O APIC's messages and IPIs find their CPUs here.

Pure state, changed by whoever has the turn (:mod:`.turns`). Intel SDM vol. 3, sections 11.6 (IPIs,
destinations) and 11.11 (MSI).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from trivmm.hypervisor.soft.lapic import MODE_LOWEST, Icr, Lapic

__all__ = ["ApicBus"]

MSI_REGION: Final = 0xFEE
LOGICAL: Final = 1 << 2


class ApicBus:
    """``lapics``: one a vCPU, in their order. ``on_eoi(vector)`` is the I/O APIC's."""

    def __init__(self, on_eoi: Callable[[int], None]) -> None:
        self._on_eoi = on_eoi
        self.lapics: list[Lapic] = []

    def add(self) -> Lapic:
        """The next vCPU's."""
        lapic = Lapic(self._on_eoi, self.send, len(self.lapics))
        self.lapics.append(lapic)
        return lapic

    def message(self, address: int, data: int) -> None:
        """An MSI. One for nobody, or with a mode that has no meaning here, is dropped."""
        if address >> 20 == MSI_REGION:
            destination = address >> 12 & 0xFF
            self._deliver(self._addressed(destination, bool(address & LOGICAL)), data >> 8 & 7, data & 0xFF)

    def send(self, sender: Lapic, icr: Icr) -> None:
        """An IPI."""
        match icr.shorthand:
            case 1:
                targets: Sequence[Lapic] = [sender]
            case 2:
                targets = self.lapics
            case 3:
                targets = [each for each in self.lapics if each is not sender]
            case _:
                targets = self._addressed(icr.destination, icr.logical)
        self._deliver(targets, icr.mode, icr.vector)

    def _addressed(self, destination: int, logical: bool) -> list[Lapic]:
        return [each for each in self.lapics if each.is_addressed(destination, logical)]

    def _deliver(self, targets: Sequence[Lapic], mode: int, vector: int) -> None:
        if mode == MODE_LOWEST:
            able = [each for each in targets if each.enabled]
            targets = [min(able, key=lambda each: each.ppr)] if able else []
        for each in targets:
            each.accept(mode, vector)
