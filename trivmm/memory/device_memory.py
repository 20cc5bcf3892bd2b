"""Memory that devices bring: files mapped into the guest above its RAM, and what becomes of it when a file fails.

It is the guest's CPUs' alone: no device, and nothing of the VMM, finds it by a guest's address (``GuestMemory`` does
not know it), and no migration sends it. A page of a mapped file may be gone when it is touched: the file was cut, or
its storage is full or failed. Then the guest can't go on, and whoever runs it asks :meth:`DeviceMemory.fault` why.

Owned by the board. Mapping into the VM and out of it waits for the kernel: in a thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.bus.lock import BoundedLock
from trivmm.errors import ConfigError
from trivmm.memory import layout

if TYPE_CHECKING:
    from trivmm.memory.guest import GuestMemory

__all__ = ["DeviceMemory", "FileMapping"]

FIRST_SLOT: Final = 64  # of the hypervisor's: those before it are RAM


class FileMapping:
    """A file in this process's memory, guarded: a page that is gone is a page of zeros, and :meth:`lost` says so."""

    def __init__(self, fd: int, size: int, *, private: bool, what: str) -> None:
        """``private``: what is written there never reaches the file. ``what`` names it. :raises OSError:"""
        self.fd, self.size, self.what = fd, size, what
        self._at = (lib.tv_memory_map_private if private else lib.tv_memory_map)(fd, size)
        if self._at == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.hva = int(ffi.cast("uintptr_t", self._at))
        self._guard = lib.tv_guard(self._at, size)
        if self._guard < 0:
            lib.tv_memory_unmap(self._at, size)
            raise OSError(0, "too many files are mapped")

    def lost(self) -> str | None:
        """Why the guest can't go on, where it touched a page that is gone; any thread."""
        if self._guard >= 0 and lib.tv_guard_lost(self._guard):
            return f"{self.what}: a page of it is gone"
        return None

    def cut(self) -> str | None:
        """The same, where nobody knows which page it was."""
        try:
            about = os.fstat(self.fd)
        except OSError:
            return None
        if stat.S_ISREG(about.st_mode) and about.st_size < self.size:
            return f"{self.what}: cut to {about.st_size} bytes, of which the guest has {self.size}"
        return self.lost()

    def close(self) -> None:
        """Idempotent; nobody touches it any more."""
        guard, self._guard = self._guard, -1
        if guard >= 0:
            lib.tv_unguard(guard)
            lib.tv_memory_unmap(self._at, self.size)


@attrs.define(eq=False)
class DeviceMemory:
    """Where it lies: from :data:`~trivmm.memory.layout.DEVICE_MEMORY_END` down, in multiples of 2 MiB. ``vm`` is the
    hypervisor's (``VmBackend``); ``kernel_s``: the deadline ``kernel``, since who changes it waits for that."""

    vm: Any
    memory: GuestMemory
    kernel_s: float
    _mapped: dict[int, tuple[int, FileMapping]] = attrs.field(factory=dict, init=False)  # by slot: gpa
    _lock: BoundedLock = attrs.field(
        default=attrs.Factory(lambda self: BoundedLock("the map of device memory", self.kernel_s, "kernel"), True),
        init=False,
    )

    def add(self, mapping: FileMapping, at: int | None = None) -> int:
        """Map it into the guest, ``at`` an address or where there is room. Gives the address.

        :raises ConfigError: there is none. :raises HypervisorError: the back end can't, or can't any more."""
        with self._lock:
            gpa = self._room(mapping.size) if at is None else self._free(at, mapping.size)
            slot = next(number for number in range(FIRST_SLOT, 1 << 15) if number not in self._mapped)
            self.vm.add_device_memory(slot, gpa, mapping.size, mapping.hva)
            self._mapped[slot] = gpa, mapping
            self.vm.memory_fault = self.fault
            return gpa

    def remove(self, mapping: FileMapping) -> None:
        """The guest finds nothing there any more. Idempotent."""
        with self._lock:
            for slot, (gpa, each) in list(self._mapped.items()):
                if each is mapping:
                    self.vm.remove_device_memory(slot, gpa, each.size)
                    del self._mapped[slot]

    def holds(self, mapping: FileMapping) -> bool:
        return any(each is mapping for _, each in tuple(self._mapped.values()))

    def close(self) -> None:
        """With the VM closed: unmap what is left. Idempotent."""
        with self._lock:
            for _, each in self._mapped.values():
                each.close()
            self._mapped.clear()

    def _lowest(self) -> int:
        top = max([layout.RAM_64BIT_START, *(gpa + size for gpa, size in self.memory.ram)])
        return -(-top // layout.DEVICE_MEMORY_ALIGNMENT) * layout.DEVICE_MEMORY_ALIGNMENT

    def _fits(self, gpa: int, size: int) -> bool:
        taken = [(start, start + each.size) for start, each in self._mapped.values()]
        inside = self._lowest() <= gpa and gpa + size <= layout.DEVICE_MEMORY_END
        return inside and all(gpa + size <= start or end <= gpa for start, end in taken)

    def _room(self, size: int) -> int:
        """The highest place."""
        for end in sorted([layout.DEVICE_MEMORY_END, *(gpa for gpa, _ in self._mapped.values())], reverse=True):
            if self._fits(end - size, size):
                return end - size
        raise ConfigError("pmem.size", size, "there is no room for it above RAM", "give fewer, or smaller ones")

    def _free(self, gpa: int, size: int) -> int:
        if gpa % layout.DEVICE_MEMORY_ALIGNMENT or not self._fits(gpa, size):
            raise ConfigError("pmem.start", hex(gpa), "no place for device memory", "see what the sender has there")
        return gpa

    def fault(self, *, stopped: bool) -> str | None:
        """Why the guest's memory is not what it should be, if it isn't; ``stopped``: an access has failed, or the CPU
        goes on all the same, with zeros. Any thread."""
        asked: Callable[[FileMapping], str | None] = FileMapping.cut if stopped else FileMapping.lost
        return next((why for _, each in tuple(self._mapped.values()) if (why := asked(each))), None)
