"""One KVM VM: memory slots, in-kernel interrupt controllers and PIT, doorbells, the dirty log, the clock.

Owned by the board, closed after its vCPUs; guest RAM and every eventfd given to it outlive it.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import VmBackend, VmBackendState
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.irq import Routes
from trivmm.hypervisor.kvm.report import extension
from trivmm.hypervisor.kvm.ring0 import look_at_ring0, tell_of_lstar
from trivmm.hypervisor.kvm.state import KIND, check_parts
from trivmm.hypervisor.kvm.vcpu import KvmVcpu
from trivmm.memory import layout

__all__ = ["KvmVm"]

CHIPS: Final = ("pic_master", "pic_slave", "ioapic")  # by their KVM_IRQCHIP_ number
CLOCK: Final = struct.Struct("<QIIQQ16x")  # struct kvm_clock_data: clock, flags, pad, realtime, host_tsc
PAGE: Final = 4096


class KvmVm(VmBackend):
    name: str = "kvm"

    def __init__(self, kvm_fd: int) -> None:
        self.vcpus: list[KvmVcpu] = []
        self._kvm_fd = kvm_fd
        self._slots: dict[int, tuple[int, int, int]] = {}
        self._roms: dict[int, tuple[int, int, int]] = {}
        self._logs: dict[int, Any] = {}
        self._hooks: list[tuple[int, int, Any, Any]] = []
        self._memory: Any = None
        self._doorbell_lock = threading.Lock()
        self._fd = kvm_call(kvm_fd, "KVM_CREATE_VM", 0)
        try:
            kvm_call(self._fd, "KVM_SET_TSS_ADDR", layout.KVM_TSS_START)
            # Only Intel CPUs without unrestricted guest use the map; a kernel without it refuses politely.
            identity = struct.pack("<Q", layout.KVM_IDENTITY_MAP)
            kvm_call(self._fd, "KVM_SET_IDENTITY_MAP_ADDR", identity, allow=(errno.EINVAL, errno.ENOTTY))
            kvm_call(self._fd, "KVM_CREATE_IRQCHIP")
            kvm_call(self._fd, "KVM_CREATE_PIT2", struct.pack("<I60x", lib.KVM_PIT_SPEAKER_DUMMY))
            self._run_size = kvm_call(kvm_fd, "KVM_GET_VCPU_MMAP_SIZE")
            self._doorbell_lengths = (0,) if extension(kvm_fd, "KVM_CAP_IOEVENTFD_ANY_LENGTH") else (1, 2, 4, 8)
            self._routes = Routes(self._fd)
            assisted = extension(self._fd, "KVM_CAP_XSAVE2") <= int(lib.TV_ASSIST_AREA)  # else nobody serves the exits
            self._syscall_lost = assisted and look_at_ring0().syscall_lost and tell_of_lstar(self._fd)
        except BaseException:
            self.close()
            raise

    # --- memory ----------------------------------------------------------------------------------------------

    def add_memory(self, slot: int, gpa: int, size: int, hva: int, *, rom: bool = False) -> None:
        if rom:
            self._set_slot(slot, gpa, size, hva, lib.KVM_MEM_READONLY)
            self._roms[slot] = (gpa, size, hva)
            return
        flags = lib.KVM_MEM_LOG_DIRTY_PAGES if self._logs else 0
        self._set_slot(slot, gpa, size, hva, flags)
        self._slots[slot] = (gpa, size, hva)

    def attach_memory(self, memory: Any) -> None:
        self._memory = memory

    def _set_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        kvm_call(self._fd, "KVM_SET_USER_MEMORY_REGION", struct.pack("<IIQQQ", slot, flags, gpa, size, hva))

    def add_device_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        self._set_slot(slot, gpa, size, hva, 0)

    def remove_device_memory(self, slot: int, gpa: int, size: int) -> None:
        self._set_slot(slot, gpa, 0, 0, 0)

    def peek(self, gpa: int, length: int) -> bytes:
        """What is in memory there, for a crash report; nothing where there is none."""
        for start, size, hva in [*self._slots.values(), *self._roms.values()]:
            if start <= gpa and gpa + length <= start + size:
                return bytes(ffi.buffer(ffi.cast("uint8_t *", hva + gpa - start), length))
        return b""

    def set_dirty_log(self, enabled: bool) -> None:
        """KVM_GET_DIRTY_LOG without manual protection: a harvest write-protects again what it reports, 0.1 ms for
        512 MiB, and needs no second call that could be forgotten."""
        self._logs.clear()
        for slot, (gpa, size, hva) in self._slots.items():
            self._set_slot(slot, gpa, size, hva, lib.KVM_MEM_LOG_DIRTY_PAGES if enabled else 0)
            if enabled:
                self._logs[slot] = ffi.new("uint64_t[]", (size // PAGE + 63) // 64)
                self._fetch(slot)  # whatever the log starts with is dropped

    def _fetch(self, slot: int) -> Any:
        log = self._logs.get(slot)
        if log is None:
            raise HypervisorError("KVM_GET_DIRTY_LOG", f"slot {slot} is not being logged", "start the log first")
        address = int(ffi.cast("uintptr_t", log))
        kvm_call(self._fd, "KVM_GET_DIRTY_LOG", struct.pack("<IIQ", slot, 0, address))
        return log

    def harvest_dirty(self, slot: int, into: Any) -> None:
        if slot in self._roms:
            return
        log = self._fetch(slot)
        lib.tv_bits_or(into, log, len(log))

    # --- interrupts and doorbells ----------------------------------------------------------------------------

    def prepare_msi(self, messages: Sequence[tuple[int, int]]) -> None:
        self._routes.prepare(messages)

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        return self._routes.connect_msi(fd, address, data)

    def disconnect_msi(self, token: int) -> None:
        self._routes.disconnect_msi(token)

    def connect_irq(self, fd: int, gsi: int) -> None:
        self._routes.connect_irq(fd, gsi)

    def disconnect_irq(self, fd: int, gsi: int) -> None:
        self._routes.disconnect_irq(fd, gsi)

    def _ioeventfd(self, fd: int, gpa: int, length: int, flags: int, allow: tuple[int, ...] = ()) -> None:
        # struct kvm_ioeventfd: datamatch, addr, len, fd, flags, pad
        kvm_call(self._fd, "KVM_IOEVENTFD", struct.pack("<QQIiI36x", 0, gpa, length, fd, flags), allow=allow)

    def add_doorbell(self, fd: int, gpa: int) -> None:
        done: list[int] = []
        with self._doorbell_lock:
            try:
                for length in self._doorbell_lengths:
                    self._ioeventfd(fd, gpa, length, 0)
                    done.append(length)
            except HypervisorError:
                for length in done:
                    self._ioeventfd(fd, gpa, length, lib.KVM_IOEVENTFD_FLAG_DEASSIGN)
                raise

    def remove_doorbell(self, fd: int, gpa: int) -> None:
        with self._doorbell_lock:
            for length in self._doorbell_lengths:
                self._ioeventfd(fd, gpa, length, lib.KVM_IOEVENTFD_FLAG_DEASSIGN, allow=(errno.ENOENT,))

    def attach_pio_hook(self, base: int, length: int, function: Any, opaque: Any) -> None:
        self._hooks.append((base, length, function, opaque))
        for vcpu in self.vcpus:
            vcpu.add_hook(base, length, function, opaque)

    # --- vCPUs -----------------------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> KvmVcpu:
        vcpu = KvmVcpu(self, self._kvm_fd, self._fd, index, self._run_size)
        self.vcpus.append(vcpu)
        if self._memory is not None:
            vcpu.assist_on(self._memory, self._syscall_lost)
        for hook in self._hooks:
            vcpu.add_hook(*hook)
        return vcpu

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> VmBackendState:
        blobs = {}
        for number, name in enumerate(CHIPS):
            chip = bytearray(ffi.sizeof("struct kvm_irqchip"))
            struct.pack_into("<I", chip, 0, number)
            kvm_call(self._fd, "KVM_GET_IRQCHIP", chip)
            blobs[name] = bytes(chip)
        pit = bytearray(ffi.sizeof("struct kvm_pit_state2"))
        kvm_call(self._fd, "KVM_GET_PIT2", pit)
        blobs["pit"] = bytes(pit)
        clock = bytearray(CLOCK.size)
        kvm_call(self._fd, "KVM_GET_CLOCK", clock)
        value, flags, _, realtime, _ = CLOCK.unpack(clock)
        blobs["clock"] = struct.pack("<QQ", value, realtime if flags & lib.KVM_CLOCK_REALTIME else time.time_ns())
        return VmBackendState(KIND, blobs)

    def load(self, state: VmBackendState) -> None:
        """Before the vCPUs' states: their clock MSRs refer to the VM's clock."""
        chip_size = ffi.sizeof("struct kvm_irqchip")
        sizes = dict.fromkeys(CHIPS, chip_size) | {"pit": ffi.sizeof("struct kvm_pit_state2"), "clock": 16}
        check_parts("VM", state.kind, state.blobs, sizes)
        for number, name in enumerate(CHIPS):
            # The number is ours whatever the stream says: each chip's blob lands in its own chip.
            kvm_call(self._fd, "KVM_SET_IRQCHIP", struct.pack("<I", number) + state.blobs[name][4:])
        kvm_call(self._fd, "KVM_SET_PIT2", state.blobs["pit"])
        # kvmclock goes on as if the guest had run all the time: guest time stays real time.
        value, realtime = struct.unpack("<QQ", state.blobs["clock"])
        passed = max(0, time.time_ns() - realtime)
        kvm_call(self._fd, "KVM_SET_CLOCK", CLOCK.pack((value + passed) & (1 << 64) - 1, 0, 0, 0, 0))

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
