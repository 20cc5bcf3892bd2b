"""What a guest's virtio-pci driver does, as pieces of a script (``trivmm.testing.scripted``): ``yield from`` them.

It finds its device by the PCI slot, puts its BAR where it wants it, and uses its registers and rings by exits and
stores: nothing of the VMM is reached around the back.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any, Final

import attrs

from trivmm.testing.scripted import Compute, IoIn, IoOut, MmioRead, MmioWrite, Store
from trivmm.virtio.life import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from trivmm.virtio.setup import VERSION_1

__all__ = ["BUS_MASTER", "MEMORY", "ScriptDriver", "pci_read", "pci_write"]

Steps = Generator[Any, Any, Any]

MEMORY, BUS_MASTER = 2, 4  # of the PCI command register
WRITE: Final = 2
AVAIL, USED = 0x1000, 0x2000  # from a queue's base: descriptor table, available ring, used ring


def pci_write(slot: int, register: int, value: int, size: int = 4) -> Steps:
    yield IoOut(0xCF8, 4, struct.pack("<I", 1 << 31 | slot << 11 | register & 0xFC))
    yield IoOut(0xCFC + register % 4, size, value.to_bytes(size, "little"))


def pci_read(slot: int, register: int, size: int = 4) -> Steps:
    yield IoOut(0xCF8, 4, struct.pack("<I", 1 << 31 | slot << 11 | register & 0xFC))
    return int.from_bytes((yield IoIn(0xCFC + register % 4, size, 1)), "little")


@attrs.define(eq=False)
class ScriptDriver:
    """One device's: its BAR at ``bar``, the rings of queue 0 (8 entries) at ``base`` in RAM."""

    slot: int
    bar: int
    base: int
    offered: int = 0

    def place(self, command: int = MEMORY | BUS_MASTER) -> Steps:
        yield from pci_write(self.slot, 0x10, self.bar & 0xFFFF_FFFF)
        if self.bar >> 32:
            yield from pci_write(self.slot, 0x14, self.bar >> 32)
        yield from self.command(command)

    def command(self, value: int) -> Steps:
        yield from pci_write(self.slot, 4, value, 2)

    def read(self, offset: int, size: int) -> Steps:
        return int.from_bytes((yield MmioRead(self.bar + offset, size)), "little")

    def write(self, offset: int, size: int, value: int) -> Steps:
        yield MmioWrite(self.bar + offset, value.to_bytes(size, "little"))

    def status(self) -> Steps:
        return (yield from self.read(0x14, 1))

    def reset(self) -> Steps:
        """Gives device_status as it reads afterwards: 0."""
        yield from self.write(0x14, 1, 0)
        return (yield from self.status())

    def activate(self, vector: int = 0xFFFF) -> Steps:
        """From reset to DRIVER_OK, with fresh rings. Gives device_status."""
        self.offered = 0
        yield from self.write(0x14, 1, ACKNOWLEDGE | DRIVER)
        for select in (0, 1):
            yield from self.write(0x08, 4, select)
            yield from self.write(0x0C, 4, VERSION_1 >> 32 * select & 0xFFFF_FFFF)
        yield from self.write(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        yield Store(self.base, bytes(0x3000))
        yield from self.write(0x16, 2, 0)
        yield from self.write(0x18, 2, 8)
        yield from self.write(0x1A, 2, vector)
        for register, gpa in ((0x20, self.base), (0x28, self.base + AVAIL), (0x30, self.base + USED)):
            yield from self.write(register, 8, gpa)
        yield from self.write(0x1C, 2, 1)
        yield from self.write(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return (yield from self.status())

    def offer(self, gpa: int, length: int) -> Steps:
        """A buffer for the device to fill, and a notification."""
        at = self.offered % 8
        yield Store(self.base + 16 * at, struct.pack("<QIHH", gpa, length, WRITE, 0))
        yield Store(self.base + AVAIL + 4 + 2 * at, struct.pack("<H", at))
        self.offered += 1
        yield Store(self.base + AVAIL + 2, struct.pack("<H", self.offered))
        yield from self.write(0x6000, 2, 0)

    def used(self, cpu: Any) -> int:
        """How many buffers came back."""
        return int.from_bytes(cpu.vm.fetch(self.base + USED + 2, 2), "little")

    def until_used(self, cpu: Any, count: int) -> Steps:
        while self.used(cpu) != count:
            yield Compute(0.0005)
