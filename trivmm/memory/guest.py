"""Guest memory: one memfd a region, mapped shared, and the one bounds-checked way for the host to touch its RAM.

Owned by the board, from build to close. The mapping must outlive every thread that may touch it: a worker stuck in
the kernel keeps its own reference (:meth:`GuestMemory.hold`) and the unmapping waits for the last one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError, GuestMemoryError

__all__ = ["PAGE_SIZE", "GuestMemory", "MemoryRegion"]

PAGE_SIZE: Final = 4096


@attrs.frozen(eq=False)
class MemoryRegion:
    """``slot`` is its number for the hypervisor; ``mapping`` a cffi ``void *`` that unmaps when it is released, ``hva``
    the same as an int; ``dirty`` a cffi ``uint64_t *`` with a bit a page: the host writers' dirty bitmap; ``native``
    the C view (``struct tv_region *``), as long-lived as the memory's. ``rom``: what the guest writes there is dropped,
    and devices find nothing there at all."""

    slot: int
    gpa: int
    size: int
    memfd: int
    mapping: Any
    hva: int
    dirty: Any
    native: Any
    rom: bool = False

    @property
    def given_back(self) -> bool:
        """The guest has given memory of it back (a balloon): there may be holes."""
        return bool(self.native.given_back)

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE

    @property
    def bitmap_words(self) -> int:
        """Length of a dirty bitmap of this region, in 64-bit words."""
        return (self.pages + 63) // 64


def _unmap(size: int, mapped: Any) -> None:
    lib.tv_memory_unmap(mapped, size)


class GuestMemory:
    """A guest's RAM, and its ROM. ``native`` is the C view (``struct tv_memory *``), valid until the last hold ends."""

    def __init__(self, ranges: Sequence[tuple[int, int]], rom: tuple[int, int] | None = None) -> None:
        """``ranges``: (gpa, size in bytes) of each region of RAM, page-aligned, ascending; ``rom``, where there is one,
        likewise. Slots are in the order of addresses.

        :raises ConfigError: when the host has not that much address space or memory.
        """
        self.native = ffi.new("struct tv_memory *")
        self.regions: tuple[MemoryRegion, ...] = ()
        self._lock = threading.Lock()
        self._holds = 1
        self._hook: Any = None
        try:
            for slot, (gpa, size) in enumerate(sorted([*ranges, *([rom] if rom else [])])):
                self.regions += (self._map(slot, gpa, size, (gpa, size) == rom),)
        except BaseException:
            self.close()
            raise
        self.native.count = len(self.regions)

    def _map(self, slot: int, gpa: int, size: int, rom: bool) -> MemoryRegion:
        memfd = os.memfd_create(f"trivmm-ram{slot}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memfd, size)
            mapped = lib.tv_memory_map(memfd, size)
            if mapped == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
        except (OSError, OverflowError) as error:
            os.close(memfd)
            raise ConfigError("memory.size", size, f"cannot map guest RAM ({error})", "give less memory") from error
        mapping = ffi.gc(mapped, partial(_unmap, size), size)
        hva = int(ffi.cast("uintptr_t", mapped))
        dirty = ffi.new("uint64_t[]", (size // PAGE_SIZE + 63) // 64)
        native = self.native.regions[slot]
        native.gpa, native.size, native.rom = gpa, size, rom
        native.hva, native.dirty = ffi.cast("uint8_t *", hva), dirty
        return MemoryRegion(slot, gpa, size, memfd, mapping, hva, dirty, ffi.addressof(native), rom)

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(size for _, size in self.ram)

    @property
    def ram(self) -> tuple[tuple[int, int], ...]:
        """(gpa, size in bytes) of each region of RAM."""
        return tuple((region.gpa, region.size) for region in self.regions if not region.rom)

    def fill_rom(self, end: bytes) -> None:
        """The ROM's last bytes. Before the guest runs: it is told of no change."""
        region = next(each for each in self.regions if each.rom)
        ffi.buffer(ffi.cast("uint8_t *", region.hva), region.size)[region.size - len(end) :] = end

    def read(self, gpa: int, length: int) -> bytes:
        """:raises GuestMemoryError: when the range is not inside one region of RAM."""
        into = ffi.new("uint8_t[]", max(length, 1))
        if length < 0 or lib.tv_memory_read(self.native, gpa, into, length):
            raise GuestMemoryError(gpa, length, "read")
        return bytes(ffi.buffer(into, length))

    def write(self, gpa: int, data: bytes) -> None:
        """Write and mark dirty. :raises GuestMemoryError: when the range is not inside one region of RAM."""
        if lib.tv_memory_write(self.native, gpa, ffi.from_buffer("uint8_t[]", data), len(data)):
            raise GuestMemoryError(gpa, len(data), "write")

    def before_told(self, hook: Any, argument: Any) -> None:
        """Devices call ``hook(argument)`` (cffi ``void (*)(void *)``, any thread) after they wrote and before the guest
        can learn of it: for a CPU that keeps copies of what it has read. Set before any worker starts; both are kept
        as long as this memory."""
        self._hook = hook, argument
        self.native.before_told, self.native.before_told_argument = hook, argument

    def hold(self) -> None:
        """Keep the mapping until :meth:`close` was called once more."""
        with self._lock:
            self._holds += 1

    def close(self) -> None:
        """Give up one hold; the last one unmaps, some 0.2 s a GiB that was touched. Call once per owner; any thread."""
        with self._lock:
            self._holds -= 1
            if self._holds > 0:
                return
            regions, self.regions = self.regions, ()
        self.native.count = 0
        for region in regions:
            ffi.release(region.mapping)
            os.close(region.memfd)
