"""A soft VM: memory slots, doorbells, interrupt sources, the PC's old chips and its I/O APIC, around one emulated CPU.

Its vCPUs take turns on that CPU (:mod:`.turns`). Interrupt sources are eventfds in one epoll set. A vCPU's thread looks
into it between slices of guest code, for all of them, and sleeps on it when the guest halts: there is no other thread.
What it takes from an eventfd is at once in a LAPIC or in the 8259s and the I/O APIC, and so part of the saved state;
after ``disconnect`` it takes nothing any more.
"""

from __future__ import annotations

import errno
import json
import os
import select
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import attrs

from trivmm._native import lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import VmBackend, VmBackendState
from trivmm.hypervisor.soft.apic_bus import ApicBus
from trivmm.hypervisor.soft.engine import PHYSICAL_END, Engine, Slot
from trivmm.hypervisor.soft.env import ENGINE_VERSION
from trivmm.hypervisor.soft.ioapic import IoApic
from trivmm.hypervisor.soft.lapic import TIMER_HZ, Lapic
from trivmm.hypervisor.soft.paging import Physical
from trivmm.hypervisor.soft.pic import LegacyChips
from trivmm.hypervisor.soft.turns import Turns
from trivmm.hypervisor.soft.vcpu import SoftVcpu
from trivmm.hypervisor.soft.written import WrittenPages, why_no_dirty_log

__all__ = ["STATE_KIND", "SoftVm"]

STATE_KIND: Final = f"soft/1/{'.'.join(map(str, ENGINE_VERSION))}"
EVENTS_AT_ONCE: Final = 64


@attrs.frozen
class Source:
    """An eventfd and what it raises: an MSI, or an edge on an ISA line."""

    fd: int
    address: int = 0
    data: int = 0
    gsi: int | None = None


@attrs.define(eq=False)
class SoftVm(VmBackend):
    """``apics``, ``chips`` and ``ioapic`` belong to whoever has the turn; the tables are guarded by ``_lock``."""

    name: str = "soft"
    live_copy: bool = attrs.field(factory=lambda: why_no_dirty_log() is None)
    physical: Physical = attrs.field(factory=Physical)
    chips: LegacyChips = attrs.field(factory=LegacyChips)
    ioapic: IoApic = attrs.field(factory=IoApic)
    apics: ApicBus = attrs.field(
        default=attrs.Factory(lambda self: ApicBus(self.ioapic.end_of_interrupt), takes_self=True)
    )
    turns: Turns = attrs.field(factory=Turns)
    doorbells: dict[int, int] = attrs.field(factory=dict)
    slots: dict[int, Slot] = attrs.field(factory=dict)
    _logged: dict[int, tuple[int, int]] = attrs.field(factory=dict, init=False)
    _written: WrittenPages = attrs.field(
        default=attrs.Factory(lambda self: WrittenPages(self._logged), takes_self=True), init=False
    )
    _sources: dict[int, Source] = attrs.field(factory=dict, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _engine: Engine | None = attrs.field(default=None, init=False)
    _vcpus: list[SoftVcpu] = attrs.field(factory=list, init=False)

    # --- memory ----------------------------------------------------------------------------------------------

    def add_memory(self, slot: int, gpa: int, size: int, hva: int, *, rom: bool = False) -> None:
        if self._engine is not None:
            raise HypervisorError("add_memory", "soft takes memory before its vCPUs exist")
        if gpa + size > PHYSICAL_END:
            raise HypervisorError("add_memory", f"{gpa + size:#x} is above the soft CPU's 40 address bits")
        self.slots[slot] = Slot(gpa, size, hva, rom)
        self.physical.add(gpa, size, hva, rom=rom)
        if not rom:
            self._logged[slot] = hva, size

    def add_device_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        self.add_memory(slot, gpa, size, hva)
        del self._logged[slot]

    def remove_device_memory(self, slot: int, gpa: int, size: int) -> None:
        raise HypervisorError("remove_device_memory", "soft keeps the memory that its vCPUs began with")

    def set_dirty_log(self, enabled: bool) -> None:
        if enabled:
            self._written.start()
        else:
            self._written.stop()

    def harvest_dirty(self, slot: int, into: Any) -> None:
        if slot in self._logged:
            self._written.take(slot, into)

    def flush_code(self) -> None:
        """Guest memory that may hold code was changed by the host: translate it anew. Any thread."""
        if self._engine is not None:
            lib.tv_soft_gate_code(self._engine.gate)

    # --- vCPU ------------------------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> SoftVcpu:
        if index != len(self._vcpus):
            raise HypervisorError("create_vcpu", f"{index} is not the next one", "create them in their order")
        if self._engine is None:
            self._engine = Engine(TIMER_HZ)
            self._engine.map_memory(tuple(self.slots.values()))
        vcpu = SoftVcpu(self, self._engine, self.apics.add(), self._epoll.fileno())
        self._vcpus.append(vcpu)
        return vcpu

    def rouse(self) -> None:
        """Wake those that sleep and have got something to do. Who has the turn, before giving it away."""
        for vcpu in self._vcpus:
            if vcpu.asleep and vcpu.is_called():
                vcpu.wake()

    # --- doorbells -------------------------------------------------------------------------------------------

    def add_doorbell(self, fd: int, gpa: int) -> None:
        with self._lock:
            self.doorbells = {**self.doorbells, gpa: fd}

    def remove_doorbell(self, fd: int, gpa: int) -> None:
        with self._lock:
            self.doorbells = {at: each for at, each in self.doorbells.items() if (at, each) != (gpa, fd)}

    # --- interrupts ------------------------------------------------------------------------------------------

    def prepare_msi(self, messages: Sequence[tuple[int, int]]) -> None:
        return None

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        self._connect(Source(fd, address, data))
        return fd

    def disconnect_msi(self, token: int) -> None:
        self._disconnect(token)

    def connect_irq(self, fd: int, gsi: int) -> None:
        self._connect(Source(fd, gsi=gsi))

    def disconnect_irq(self, fd: int, gsi: int) -> None:
        self._disconnect(fd)

    def _connect(self, source: Source) -> None:
        with self._lock:
            if source.fd in self._sources:
                raise HypervisorError("connect", f"eventfd {source.fd} is connected already", errno=errno.EEXIST)
            self._epoll.register(source.fd, select.EPOLLIN)
            self._sources[source.fd] = source

    def _disconnect(self, fd: int) -> None:
        with self._lock:
            if self._sources.pop(fd, None) is not None:
                with suppress(OSError, ValueError):  # closed already: the kernel has forgotten it
                    self._epoll.unregister(fd)

    def collect(self) -> None:
        """Take what the interrupt sources hold. Who has the turn."""
        ready = self._epoll.poll(0, EVENTS_AT_ONCE)
        if not ready:
            return
        with self._lock:
            for fd, _events in ready:
                source = self._sources.get(fd)
                if source is None or not _take(fd):
                    continue
                if source.gsi is None:
                    self.apics.message(source.address, source.data)
                else:
                    self.chips.raise_line(source.gsi)
                    self.pulse(source.gsi)

    def pulse(self, pin: int) -> None:
        """An edge on an I/O APIC line; the ISA lines are there one to one, as in KVM. Who has the turn."""
        message = self.ioapic.pulse(pin)
        if message is not None:
            self.apics.message(*message)

    def interrupt_waits(self, lapic: Lapic) -> bool:
        """Whether there is one that its CPU would take, its flag aside. Who has the turn."""
        return lapic.nmi or lapic.pending() is not None or (self.chips.pending() and lapic.takes_extint())

    def next_pit_interrupt(self) -> int | None:
        """When the PIT next raises IRQ 0, in monotonic nanoseconds; None when it won't, or nobody would notice."""
        if self.chips.master.imr & 1 and not self.ioapic.is_open(0):
            return None
        return self.chips.timer.next_interrupt()

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self) -> VmBackendState:
        chips = self.chips.save(time.monotonic_ns()) | {"ioapic": self.ioapic.save()}
        return VmBackendState(STATE_KIND, {"chips": json.dumps(chips).encode()})

    def load(self, state: VmBackendState) -> None:
        if state.kind != STATE_KIND:
            raise HypervisorError("soft VM state", f"saved by {state.kind!r}, this is {STATE_KIND!r}", "use the same")
        try:
            chips = json.loads(state.blobs["chips"])
            self.chips.load(chips, time.monotonic_ns())
            self.ioapic.load(chips["ioapic"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise HypervisorError("soft VM state", f"its chips make no sense ({error!r})") from error

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._written.stop()
        self._epoll.close()
        self._sources.clear()


def _take(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except OSError:
        return False  # somebody else read it, or it is gone
    return True
