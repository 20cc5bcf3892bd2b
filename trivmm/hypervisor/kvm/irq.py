"""Interrupt routes of one KVM VM: the ISA lines of PIC and IOAPIC, and an MSI route for each connected vector.

Owned by its VM. The kernel takes the whole table at once, so the table lives here. Called from vCPU threads (a guest
that unmasks a vector) and the trio thread: one lock, held across two ioctls.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Final

from trivmm._native import lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.kvm.calls import kvm_call

__all__ = ["Routes"]

PIC_PINS: Final = 16
IOAPIC_PINS: Final = 24
MAX_GSI: Final = 4096  # KVM_MAX_IRQ_ROUTES; a guest can't reach it: its vectors are bounded by its devices' tables
MASTER, SLAVE, IOAPIC = 0, 1, 2  # enum of struct kvm_irq_routing_irqchip

ENTRY: Final = struct.Struct("<IIII32s")  # struct kvm_irq_routing_entry: gsi, type, flags, pad, union
IRQFD: Final = struct.Struct("<IIIi16s")  # struct kvm_irqfd: fd, gsi, flags, resamplefd, pad


def _chip(gsi: int, chip: int, pin: int) -> bytes:
    return ENTRY.pack(gsi, lib.KVM_IRQ_ROUTING_IRQCHIP, 0, 0, struct.pack("<II", chip, pin))


def _fixed() -> bytes:
    pics = [_chip(gsi, SLAVE if gsi >= 8 else MASTER, gsi % 8) for gsi in range(PIC_PINS)]
    return b"".join(pics + [_chip(gsi, IOAPIC, gsi) for gsi in range(IOAPIC_PINS)])


def _masked(messages: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(address & (1 << 64) - 1, data & 0xFFFF_FFFF) for address, data in messages]


class Routes:
    """GSI 0-23 are the chips' lines; from 24 up a GSI is one MSI message."""

    def __init__(self, vm_fd: int) -> None:
        self._vm_fd = vm_fd
        self._lock = threading.Lock()
        self._fixed = _fixed()
        self._messages: dict[int, tuple[int, int]] = {}  # GSI -> address, data; kept in the kernel until replaced
        self._eventfds: dict[int, int] = {}  # GSI in use -> eventfd

    def _upload(self) -> None:
        entries = [
            ENTRY.pack(
                gsi, lib.KVM_IRQ_ROUTING_MSI, 0, 0, struct.pack("<III", address & 0xFFFF_FFFF, address >> 32, data)
            )
            for gsi, (address, data) in self._messages.items()
        ]
        count = PIC_PINS + IOAPIC_PINS + len(entries)
        kvm_call(self._vm_fd, "KVM_SET_GSI_ROUTING", struct.pack("<II", count, 0) + self._fixed + b"".join(entries))

    def _irqfd(self, fd: int, gsi: int, flags: int) -> None:
        kvm_call(self._vm_fd, "KVM_IRQFD", IRQFD.pack(fd, gsi, flags, 0, b""))

    def _pick(self, message: tuple[int, int]) -> int:
        """A free GSI, best one whose route says this already: unmasking a vector again then needs no upload."""
        free = [gsi for gsi in self._messages if gsi not in self._eventfds]
        for gsi in free:
            if self._messages[gsi] == message:
                return gsi
        if free:
            gsi = free[0]
        else:
            gsi = IOAPIC_PINS + len(self._messages)
            if gsi >= MAX_GSI:
                raise HypervisorError("KVM_SET_GSI_ROUTING", f"more than {MAX_GSI} interrupt routes")
        before = self._messages.get(gsi)
        self._messages[gsi] = message
        try:
            self._upload()
        except HypervisorError:
            if before is None:
                del self._messages[gsi]
            else:
                self._messages[gsi] = before
            raise
        return gsi

    def prepare(self, messages: Sequence[tuple[int, int]]) -> None:
        """A free GSI for each message by one upload, which waits for the kernel: ``connect_msi`` then needs none. Where
        the kernel refuses the table, as it was before: it is one message's fault, which shows at its connection."""
        with self._lock:
            before = dict(self._messages)
            free = [gsi for gsi in self._messages if gsi not in self._eventfds]
            missing = []
            for message in _masked(messages):
                gsi = next((each for each in free if self._messages[each] == message), None)
                if gsi is None:
                    missing.append(message)
                else:
                    free.remove(gsi)
            for message in missing:
                gsi = free.pop() if free else IOAPIC_PINS + len(self._messages)
                if gsi < MAX_GSI:
                    self._messages[gsi] = message
            if self._messages == before:
                return
            try:
                self._upload()
            except HypervisorError:
                self._messages = before

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        """The GSI is the token. An ``fd`` that is readable now injects at once."""
        with self._lock:
            gsi = self._pick(*_masked([(address, data)]))
            self._irqfd(fd, gsi, 0)
            self._eventfds[gsi] = fd
            return gsi

    def disconnect_msi(self, token: int) -> None:
        """The deassign waits for injections that the kernel has queued."""
        with self._lock:
            fd = self._eventfds.get(token)
            if fd is not None:
                self._irqfd(fd, token, lib.KVM_IRQFD_FLAG_DEASSIGN)
                del self._eventfds[token]  # not before: a GSI whose eventfd the kernel still has is not free

    def connect_irq(self, fd: int, gsi: int) -> None:
        with self._lock:
            self._irqfd(fd, gsi, 0)

    def disconnect_irq(self, fd: int, gsi: int) -> None:
        with self._lock:
            self._irqfd(fd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN)
