"""A virtio device on PCI (virtio 1.2 section 4.1), laid out as Cloud Hypervisor lays it out.

One BAR holds the common, ISR, device and notification structures, the MSI-X table and the pending bits. Accesses
come from vCPU threads and never block: registers are behind the one short lock of the device's state
(``trivmm.virtio.life``), and a notification writes an eventfd (most are taken by the hypervisor before they get here).
A changed interrupt route waits for the kernel, under the MSI-X table's own lock.
"""

from __future__ import annotations

import logging
import struct
from typing import Final

from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import Effect
from trivmm.deadlines import Deadlines
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import VmBackend
from trivmm.platform.pci.config_space import PciConfigSpace
from trivmm.state.strict import refused
from trivmm.state.virtio import DeviceLifeState, TransportState
from trivmm.virtio.handles import DeviceHandles
from trivmm.virtio.kind import OTHER_CLASS
from trivmm.virtio.life import FEATURES_OK, SET_UP, DeviceState, check_life
from trivmm.virtio.pci.common_config import COMMON_SIZE, DEVICE_STATUS, VECTORS, CommonConfig
from trivmm.virtio.pci.msix import MsixTable
from trivmm.virtio.port import DeviceBackend
from trivmm.virtio.setup import DeviceLimits, DriverSetup, features_fit, positions_fault, setup_fault
from trivmm.virtio.status import StatusRegister

__all__ = ["VirtioPciTransport"]

logger = logging.getLogger(__name__)

VENDOR: Final = 0x1AF4
DEVICE_BASE: Final = 0x1040

BAR: Final = 0
COMMON: Final = 0x0000
ISR: Final = 0x2000
DEVICE: Final = 0x4000
DEVICE_SIZE: Final = 0x1000
NOTIFY: Final = 0x6000
NOTIFY_SIZE: Final = 0x1000
NOTIFY_MULTIPLIER: Final = 4
MSIX_TABLE: Final = 0x8000
MSIX_TABLE_SIZE: Final = 0x40000
MSIX_PBA: Final = 0x48000
MSIX_PBA_SIZE: Final = 0x800
BAR_SIZE: Final = 0x80000

CAP_VENDOR: Final = 0x09
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = range(1, 6)
ISR_BITS: Final = 0x3  # queue, configuration change
WINDOW_DATA: Final = 16  # offset of pci_cfg_data in the config-access capability


class VirtioPciTransport:
    """A ``PciFunction``. ``state`` is its device's life, which it shares with the device's actor; ``handles`` are what
    the device works with."""

    def __init__(
        self,
        device: DeviceBackend,
        vm: VmBackend,
        deadlines: Deadlines,
        *,
        pci_class: int = OTHER_CLASS,
        bar_is_64bit: bool = True,
    ) -> None:
        self.name = device.name
        self.device = device
        self.state = DeviceState(device.name, BoundedLock(f"the registers of {device.name}", deadlines.lock))
        limits = DeviceLimits(device.features, device.queue_sizes, len(device.queue_sizes) + 1)
        self.status = StatusRegister(self.state, limits)
        self.common = CommonConfig(limits, self.status.read)
        self._vm = vm
        self._doorbells_at: int | None = None
        self._lost_doorbells = 0
        self._rung: set[int] = set()  # queues whose doorbell the hypervisor has
        self.config = PciConfigSpace(
            vendor_id=VENDOR,
            device_id=DEVICE_BASE + device.device_type,
            class_code=pci_class,
            revision=1,
            subsystem_vendor_id=VENDOR,
            subsystem_id=DEVICE_BASE + device.device_type,
            lock_s=deadlines.lock,
        )
        self.config.add_bar(BAR, BAR_SIZE, is_64bit=bar_is_64bit)
        self._add_capabilities()
        self.handles = DeviceHandles(len(device.queue_sizes))
        try:
            self.msix = MsixTable(vm, self.config, limits.vectors, MSIX_TABLE | BAR, MSIX_PBA | BAR, deadlines)
        except BaseException:
            self.handles.close()
            raise

    def _add_capabilities(self) -> None:
        def locate(kind: int, offset: int, length: int, extra: bytes = b"", writable: bytes | None = None) -> int:
            body = struct.pack("<BBB3xII", 16 + len(extra), kind, BAR, offset, length) + extra
            return self.config.add_capability(CAP_VENDOR, body, writable or bytes(len(body)))

        locate(CFG_COMMON, COMMON, COMMON_SIZE)
        locate(CFG_ISR, ISR, 1)
        locate(CFG_DEVICE, DEVICE, DEVICE_SIZE)
        locate(CFG_NOTIFY, NOTIFY, NOTIFY_SIZE, struct.pack("<I", NOTIFY_MULTIPLIER))
        window = b"\0\0\xff\0\0\0" + b"\xff" * 12  # bar, offset, length and data are the driver's
        self._window = locate(CFG_PCI, 0, 0, bytes(4), window)

    # --- PCI configuration space -----------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> bytes:
        if self._in_window(offset, size):
            self._window_read()
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        if self.msix.depends_on(offset, len(data)):
            self.msix.follow()
        if self.config.holds_command(offset, len(data)):
            with self.state.lock:  # the bit is read under it: of two vCPUs that change it, the last one is believed
                return self.status.set_bus_master(self.config.bus_master)
        if self._in_window(offset, len(data)):
            return self._window_write()
        return None

    def _in_window(self, offset: int, size: int) -> bool:
        start = self._window + WINDOW_DATA
        return offset < start + 4 and offset + size > start

    def _window_target(self) -> tuple[int, int] | None:
        """(BAR offset, length) that the config-access capability points at, where that is a legal access."""
        bar = self.config.read(self._window + 4, 1)[0]
        offset, length = struct.unpack("<II", self.config.read(self._window + 8, 8))
        if bar != BAR or length not in (1, 2, 4) or offset % length or offset + length > BAR_SIZE:
            return None
        return offset, length

    def _window_read(self) -> None:
        target = self._window_target()
        if target is not None:
            self.config.patch(self._window + WINDOW_DATA, self.bar_read(BAR, *target))

    def _window_write(self) -> Effect:
        target = self._window_target()
        if target is None:
            return None
        offset, length = target
        return self.bar_write(BAR, offset, self.config.read(self._window + WINDOW_DATA, length))

    # --- the BAR ---------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        if offset < COMMON + COMMON_SIZE:
            with self.state.lock:
                return self.common.read(offset - COMMON, size)
        if offset == ISR and size == 1:
            return bytes([self.handles.take_isr()])
        if DEVICE <= offset < DEVICE + DEVICE_SIZE:
            return self.device.read_config(offset - DEVICE, size)
        if MSIX_TABLE <= offset < MSIX_TABLE + MSIX_TABLE_SIZE:
            return self.msix.read_table(offset - MSIX_TABLE, size)
        if MSIX_PBA <= offset < MSIX_PBA + MSIX_PBA_SIZE:
            return self.msix.read_pba(offset - MSIX_PBA, size)
        if NOTIFY <= offset < NOTIFY + NOTIFY_SIZE:
            return bytes(size)
        return b"\xff" * size

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        if NOTIFY <= offset < NOTIFY + NOTIFY_SIZE:
            self.handles.ring((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif offset == COMMON + DEVICE_STATUS:
            if len(data) == 1:
                with self.state.lock:
                    return self.status.write(data[0], self.common.setup())
        elif offset < COMMON + COMMON_SIZE:
            with self.state.lock:
                self.common.write(offset - COMMON, data)
                if offset - COMMON in VECTORS:
                    self._route_irqs()
        elif DEVICE <= offset < DEVICE + DEVICE_SIZE:
            self.device.write_config(offset - DEVICE, data)
        elif MSIX_TABLE <= offset < MSIX_TABLE + MSIX_TABLE_SIZE:
            self.msix.write_table(offset - MSIX_TABLE, data)
        return None

    def _route_irqs(self) -> None:
        """A vector may be rewritten while its queue is live: the worker sees the new one at its next interrupt."""
        queue_fds = [self.msix.fd_of(queue.vector) for queue in self.common.queues]
        self.handles.route(self.msix.fd_of(self.common.config_vector), queue_fds)

    # --- the actor's side (trio thread) ----------------------------------------------------------------------

    def reset_registers(self) -> None:
        """Nothing of the old generation runs any more: queues and features take their reset values (section
        4.1.4.3.1), and its interrupts go."""
        with self.state.lock:
            self.common.reset()
            self._route_irqs()
        self.handles.take_isr()
        self.msix.forget_interrupts()

    def config_changed(self) -> None:
        """The device's configuration is another now, and the driver is to know."""
        with self.state.lock:
            self.common.generation += 1
        self.handles.signal_config_change()

    # --- doorbells and interrupts ----------------------------------------------------------------------------

    def bars_changed(self) -> None:
        """Doorbells follow the BAR."""
        mapped = self.config.bars[BAR].mapped
        if mapped == self._doorbells_at:
            return
        for index, queue in enumerate(self.handles.queues):
            fd, at = queue.doorbell, NOTIFY + index * NOTIFY_MULTIPLIER
            if index in self._rung and self._doorbells_at is not None:
                self._vm.remove_doorbell(fd, self._doorbells_at + at)
            self._rung.discard(index)
            if mapped is None:
                continue
            try:
                self._vm.add_doorbell(fd, mapped + at)
                self._rung.add(index)
            except HypervisorError as error:  # it works without, only slower: the write then comes to bar_write
                self._lost_doorbells += 1
                if self._lost_doorbells == 1:  # a guest that moves its BARs about can bring this on at will
                    logger.warning("%s: no doorbell for queue %d: %s", self.name, index, error)
        self._doorbells_at = mapped

    def messages(self) -> list[tuple[int, int]]:
        """See :meth:`MsixTable.messages`."""
        return self.msix.messages()

    def connect_interrupts(self) -> None:
        self.msix.connect_all()

    def disconnect_interrupts(self) -> None:
        self.msix.disconnect_all()

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> tuple[DeviceLifeState, TransportState]:
        """After ``disconnect_interrupts``, with the actor quiesced."""
        with self.state.lock:
            life, registers = self.state.save(), self.common.save(self.state.setup)
        return life, TransportState(self.config.save(), registers, self.msix.save(), self.handles.isr)

    def check(self, life: DeviceLifeState, saved: TransportState, where: str) -> None:
        """Whether a device and its driver can be in this state; changes nothing.

        :raises ProtocolError: naming the field, with ``where`` before it."""
        at = f"{where}.transport"
        self.config.check(saved.pci, f"{at}.pci")
        self.common.check(saved.registers, f"{at}.registers")
        self.msix.check(saved.msix, f"{at}.msix")
        if saved.isr & ~ISR_BITS:
            raise refused(f"{at}.isr", saved.isr, f"bits of {ISR_BITS:#x}")
        check_life(life, f"{where}.life")
        setup, limits = DriverSetup(saved.registers.features, saved.registers.queues), self.common.limits
        if life.status & FEATURES_OK and not features_fit(setup.features, limits):
            wanted = f"a subset of {limits.features} with VERSION_1, as FEATURES_OK says"
            raise refused(f"{at}.registers.features", setup.features, wanted)
        fault = setup_fault(setup, limits) if life.stage in SET_UP else positions_fault(setup)
        if fault is not None:
            raise refused(f"{at}.registers.{fault.field}", fault.value, fault.wanted)

    def load(self, life: DeviceLifeState, saved: TransportState) -> None:
        """Take over what :meth:`check` has passed, with the gate closed; again after an undo. The PCI bus places the
        BARs afterwards (``PciBus.load``)."""
        self.config.load(saved.pci)
        self.msix.load(saved.msix)
        self.handles.isr = saved.isr
        with self.state.lock:
            self.common.load(saved.registers)
            self._route_irqs()
            setup = DriverSetup(saved.registers.features, saved.registers.queues)
            self.state.load(life, setup, bus_master=self.config.bus_master)

    def close(self) -> None:
        """After every worker and vCPU has ended; the VM is closed next, and its doorbells and routes with it."""
        self.msix.close()
        self.handles.close()
