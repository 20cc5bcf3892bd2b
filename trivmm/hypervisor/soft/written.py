"""The soft CPU's dirty log: the kernel says which pages of guest RAM were written (``ffi/written.h``).

The engine stores into guest RAM as any code of this process does, through the one mapping that devices' workers use
too. So what the kernel sees written there is the guest's writes, and the host's as well: more than a back end has to
tell, and nothing less. It needs Linux 6.7 and no privilege; where it is missing, a VM is copied while it stands still.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import HypervisorError

__all__ = ["WrittenPages", "why_no_dirty_log"]

PAGE: Final = 4096
REMEDY: Final = "the VM is copied while it is paused; live, on Linux 6.7 or newer, where userfaultfd is allowed"


@attrs.define(eq=False)
class WrittenPages:
    """Switched on, harvested and switched off as any dirty log. One thread at a time."""

    slots: Mapping[int, tuple[int, int]]
    """(host address, size in bytes) of those that are logged, by their numbers."""
    _uffd: int = attrs.field(default=-1, init=False)
    _pagemap: int = attrs.field(default=-1, init=False)

    @property
    def is_on(self) -> bool:
        return self._uffd >= 0

    def start(self) -> None:
        """Nothing is dirty; from now on writes are seen. :raises HypervisorError: the kernel can't; it is off."""
        self.stop()
        try:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _refused("open(/proc/self/pagemap)", error.errno or errno.EIO) from error
        uffd = int(lib.tv_written_open())
        if uffd < 0:
            self.stop()
            raise _refused("userfaultfd", -uffd)
        self._uffd = uffd
        for hva, size in self.slots.values():
            failed = lib.tv_written_watch(uffd, hva, size)
            if failed:
                self.stop()
                raise _refused("UFFDIO_WRITEPROTECT", failed)

    def take(self, number: int, into: Any) -> None:
        """OR the slot's written pages into ``into`` (cffi ``uint64_t *``, a bit a page) and watch them again.

        :raises HypervisorError: it is off, or the kernel lost it: then the log is not whole."""
        if not self.is_on:
            raise HypervisorError("PAGEMAP_SCAN", f"slot {number} is not being logged", "start the log first")
        failed = lib.tv_written_take(self._pagemap, *self.slots[number], into)
        if failed:
            raise _refused("PAGEMAP_SCAN", failed)

    def stop(self) -> None:
        """Idempotent. Takes every protection off: waits for the kernel."""
        uffd, self._uffd = self._uffd, -1
        pagemap, self._pagemap = self._pagemap, -1
        for fd in (uffd, pagemap):
            if fd >= 0:
                os.close(fd)


def _refused(call: str, number: int) -> HypervisorError:
    return HypervisorError(call, os.strerror(number), REMEDY, errno=number)


def why_no_dirty_log() -> str | None:
    """None where the kernel has the log: tried on two pages of memory as a guest's is."""
    memfd = os.memfd_create("trivmm-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memfd, 2 * PAGE)
        mapped = lib.tv_memory_map(memfd, 2 * PAGE)
    finally:
        os.close(memfd)
    if mapped == ffi.NULL:
        return f"no memory for a try ({os.strerror(ffi.errno)})"
    log = WrittenPages({0: (int(ffi.cast("uintptr_t", mapped)), 2 * PAGE)})
    try:
        return _try(log, mapped)
    except HypervisorError as error:
        return f"{error.call}: {os.strerror(error.errno or 0)}"
    finally:
        log.stop()
        lib.tv_memory_unmap(mapped, 2 * PAGE)


def _try(log: WrittenPages, mapped: Any) -> str | None:
    """Nothing is written at first; then both pages are, and the first is gone again before anybody looks."""
    clean, found = ffi.new("uint64_t[]", 1), ffi.new("uint64_t[]", 1)
    log.start()
    log.take(0, clean)
    memory = ffi.cast("uint8_t *", mapped)
    memory[0] = memory[PAGE] = 1
    region = ffi.new("struct tv_region *", {"size": 2 * PAGE, "hva": memory})
    lib.tv_memory_give_back(region, 0, PAGE)
    log.take(0, found)
    return None if (clean[0], found[0]) == (0, 0b11) else "the kernel does not see all that is written"
