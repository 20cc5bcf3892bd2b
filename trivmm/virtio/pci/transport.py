"""A virtio device on PCI (virtio 1.2 section 4.1), laid out as Cloud Hypervisor lays it out.

One BAR holds the common, ISR, device and notification structures, the MSI-X table and the pending bits. Accesses
come from vCPU threads and never block: registers are behind one short lock, device_status goes to the lifecycle
*outside* that lock, and a notification writes an eventfd (most are taken by the hypervisor before they get here).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.bus.space import Effect
from trivmm.bus.ticket import Ticket
from trivmm.errors import HypervisorError, TrivmmError
from trivmm.hypervisor.base import VmBackend
from trivmm.platform.pci.config_space import PciConfigSpace
from trivmm.state.fields import Fields
from trivmm.virtio.pci.common_config import COMMON_SIZE, DEVICE_STATUS, CommonConfig
from trivmm.virtio.pci.msix import MsixTable
from trivmm.virtio.port import Activation, DeviceBackend, DeviceStatusPort, QueueConfig

__all__ = ["VirtioPciTransport"]

logger = logging.getLogger(__name__)

VENDOR: Final = 0x1AF4
DEVICE_BASE: Final = 0x1040
CLASSES: Final = {1: 0x020000, 2: 0x018000}  # network: Ethernet; block: mass storage, other
OTHER_CLASS: Final = 0xFFFF00

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
CAP_MSIX: Final = 0x11
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = range(1, 6)
WINDOW_DATA: Final = 16  # offset of pci_cfg_data in the config-access capability
LOCK_S: Final = 30.0  # microseconds, or as long as the kernel takes for a few routes: longer is a bug, reported as one


class VirtioPciTransport:
    """A ``PciFunction``, and the ``TransportPort`` of its device's lifecycle. ``status`` is set by the board."""

    def __init__(self, device: DeviceBackend, vm: VmBackend, *, use_64bit_bar: bool = True) -> None:
        self.name = device.name
        self.device = device
        self.status: DeviceStatusPort | None = None
        self._vm = vm
        self._lock = threading.Lock()
        self._isr = ffi.new("uint32_t *")
        queues = len(device.queue_sizes)
        self.msix = MsixTable(vm, queues + 1)
        self.common = CommonConfig(device.features, device.queue_sizes, len(self.msix), self._read_status)
        self._config_irq = self._new_irq()
        self._queue_irqs = [self._new_irq() for _ in range(queues)]
        self._doorbells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(queues)]
        self._doorbells_at: int | None = None
        self._lost_doorbells = 0
        self._rung: set[int] = set()  # queues whose doorbell the hypervisor has
        self.config = PciConfigSpace(
            vendor_id=VENDOR,
            device_id=DEVICE_BASE + device.device_type,
            class_code=CLASSES.get(device.device_type, OTHER_CLASS),
            revision=1,
            subsystem_vendor_id=VENDOR,
            subsystem_id=DEVICE_BASE + device.device_type,
            lock_s=LOCK_S,
        )
        self.config.add_bar(BAR, BAR_SIZE, is_64bit=use_64bit_bar)
        self._add_capabilities()

    def _new_irq(self) -> Any:
        irq = ffi.new("struct tv_irq *")
        irq.fd, irq.isr = -1, self._isr
        return irq

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
        control = len(self.msix) - 1
        body = struct.pack("<HII", control, MSIX_TABLE | BAR, MSIX_PBA | BAR)
        self._msix_cap = self.config.add_capability(CAP_MSIX, body, b"\x00\xc0" + bytes(8))

    @contextmanager
    def _registers(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=LOCK_S):
            raise TrivmmError(f"{self.name}: the register lock was held for more than {LOCK_S} s")
        try:
            yield
        finally:
            self._lock.release()

    def _read_status(self) -> int:
        return 0 if self.status is None else self.status.read_status()

    # --- PCI configuration space -----------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> bytes:
        if self._in_window(offset, size):
            self._window_read()
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        if offset < self._msix_cap + 4 and offset + len(data) > self._msix_cap + 2:
            with self._registers():
                self.msix.set_control(int.from_bytes(self.config.read(self._msix_cap + 2, 2), "little"))
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
            with self._registers():
                return self.common.read(offset - COMMON, size)
        if offset == ISR and size == 1:
            return bytes([int(lib.tv_isr_take(self._isr)) & 0xFF])
        if DEVICE <= offset < DEVICE + DEVICE_SIZE:
            return self.device.read_config(offset - DEVICE, size)
        if MSIX_TABLE <= offset < MSIX_TABLE + MSIX_TABLE_SIZE:
            with self._registers():
                return self.msix.read_table(offset - MSIX_TABLE, size)
        if MSIX_PBA <= offset < MSIX_PBA + MSIX_PBA_SIZE:
            with self._registers():
                return self.msix.read_pba(offset - MSIX_PBA, size)
        if NOTIFY <= offset < NOTIFY + NOTIFY_SIZE:
            return bytes(size)
        return b"\xff" * size

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        if NOTIFY <= offset < NOTIFY + NOTIFY_SIZE:
            index = (offset - NOTIFY) // NOTIFY_MULTIPLIER
            if index < len(self._doorbells):
                os.eventfd_write(self._doorbells[index], 1)
        elif offset == COMMON + DEVICE_STATUS:
            if len(data) == 1 and self.status is not None:
                return self._write_status(data[0])
        elif offset < COMMON + COMMON_SIZE:
            with self._registers():
                self.common.write(offset - COMMON, data)
                self._route_irqs()
        elif DEVICE <= offset < DEVICE + DEVICE_SIZE:
            self.device.write_config(offset - DEVICE, data)
        elif MSIX_TABLE <= offset < MSIX_TABLE + MSIX_TABLE_SIZE:
            with self._registers():
                self.msix.write_table(offset - MSIX_TABLE, data)
        return None

    def _write_status(self, value: int) -> Ticket | None:
        assert self.status is not None
        return self.status.write_status(value, self._features_acceptable, self.snapshot)

    def _features_acceptable(self) -> bool:
        with self._registers():
            return self.common.features_acceptable()

    def _route_irqs(self) -> None:
        """A vector may be rewritten while its queue is live: the worker sees the new one at its next interrupt."""
        lib.tv_irq_set_fd(self._config_irq, self.msix.fd_of(self.common.config_vector))
        for irq, queue in zip(self._queue_irqs, self.common.queues, strict=True):
            lib.tv_irq_set_fd(irq, self.msix.fd_of(queue.vector))

    def snapshot(self, generation: int) -> Activation:
        """The private copy that an activation works on.

        :raises ValueError: where an enabled queue's registers make no sense."""
        with self._registers():
            self._route_irqs()
            queues = []
            for index, queue in enumerate(self.common.queues):
                if not queue.enabled:
                    continue
                if queue.desc % 16 or queue.driver % 2 or queue.device % 4:
                    raise ValueError(f"queue {index}: ring addresses are not aligned (virtio 1.2 section 2.7)")
                queues.append(
                    QueueConfig(
                        index,
                        queue.size,
                        queue.desc,
                        queue.driver,
                        queue.device,
                        self._doorbells[index],
                        self._queue_irqs[index],
                    )
                )
            return Activation(generation, self.common.acked & self.common.offered, tuple(queues))

    # --- the lifecycle's side (trio thread) ------------------------------------------------------------------

    def reset_registers(self) -> bool:
        if not self._lock.acquire(timeout=0):
            return False
        try:
            self.common.reset()
            self._route_irqs()
            lib.tv_isr_take(self._isr)
            self.msix.reset()
        finally:
            self._lock.release()
        return True

    def signal_config_change(self) -> None:
        lib.tv_irq_signal(self._config_irq, lib.TV_ISR_CONFIG)

    def bump_config_generation(self) -> None:
        with self._registers():
            self.common.generation += 1

    def config_changed(self) -> None:
        """The device's configuration is another now, and the driver is to know."""
        self.bump_config_generation()
        self.signal_config_change()

    # --- doorbells and interrupts ----------------------------------------------------------------------------

    def bars_changed(self) -> None:
        """Doorbells follow the BAR."""
        mapped = self.config.bars[BAR].mapped
        if mapped == self._doorbells_at:
            return
        for index, fd in enumerate(self._doorbells):
            at = NOTIFY + index * NOTIFY_MULTIPLIER
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
        with self._registers():
            return self.msix.messages()

    def connect_interrupts(self) -> None:
        with self._registers():
            self.msix.connect_all()

    def disconnect_interrupts(self) -> None:
        with self._registers():
            self.msix.disconnect_all()

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """After ``disconnect_interrupts``."""
        with self._registers():
            return {
                "pci": self.config.save(),
                "common": self.common.save(),
                "msix": self.msix.save(),
                "isr": int(self._isr[0]),
            }

    def load(self, state: dict[str, Any]) -> None:
        """May be called again. The PCI bus places the BARs afterwards (``PciBus.load``).

        :raises ProtocolError: / :raises ValueError: when the state is malformed."""
        fields = Fields(self.name, state)
        pci, common, msix = fields.object("pci"), fields.object("common"), fields.object("msix")
        isr = fields.integer("isr", 0, 0xFF)
        fields.end()
        self.config.load(pci)
        with self._registers():
            self.common.load(common)
            self.msix.load(msix)
            self._isr[0] = isr
            self._route_irqs()

    def close(self) -> None:
        """After every worker and vCPU has ended; the VM is closed next, and its doorbells and routes with it."""
        self.msix.close()
        doorbells, self._doorbells = self._doorbells, []
        for fd in doorbells:
            os.close(fd)
