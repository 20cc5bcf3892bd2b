"""The generic event device's register (ACPI 6.5 section 5.6.9): one byte that says what happened, and an interrupt.

A byte of MMIO at ``layout.GED_START``, as in Cloud Hypervisor: each event has its bit there, a read gives them and
clears them. The DSDT's ``_EVT`` method reads it and notifies the device whose event it was. An event that the guest has
not read is part of the saved state, and interrupts again where that is loaded: whether an interrupt controller had
taken the first one is not known, and an interrupt too many finds the register empty.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

from trivmm.bus.space import Effect
from trivmm.state.platform import GedState

__all__ = ["GED_IRQ", "GED_SIZE", "PCI_DEVICES_CHANGED", "POWER_BUTTON", "Ged"]

GED_IRQ: Final = 13  # Cloud Hypervisor's, where 5 to 12 are the PCI slots'; edge, active high
GED_SIZE: Final = 1
PCI_DEVICES_CHANGED: Final = 1 << 2  # see ``pci.hotplug``
POWER_BUTTON: Final = 1 << 3  # bits 0 and 1 are hotplug of CPUs and memory there


class Ged:
    """A :class:`~trivmm.bus.space.BusDevice`; ``irq_fd`` is its eventfd for :data:`GED_IRQ`. Events come from the
    trio thread, reads from vCPU threads."""

    def __init__(self) -> None:
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events = 0
        self._lock = threading.Lock()

    def notify(self, events: int) -> None:
        """Set the bits, then interrupt. What the guest has not read yet and comes again, it sees once."""
        with self._lock:
            self._events |= events
        self._interrupt()

    def _interrupt(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is readable, which is all that it says
            os.eventfd_write(self.irq_fd, 1)

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            events, self._events = self._events, 0
        return events.to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> Effect:
        return None

    def save(self) -> GedState:
        return GedState(self._events)

    def check(self, state: GedState, where: str) -> None:
        """Any bits will do: a guest ignores those that it does not know."""

    def load(self, state: GedState) -> None:
        self._events = state.events
        if state.events:
            self._interrupt()

    def close(self) -> None:
        """After every vCPU thread has ended. Idempotent."""
        fd, self.irq_fd = self.irq_fd, -1
        if fd >= 0:
            os.close(fd)
