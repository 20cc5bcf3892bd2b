"""Guest memory as the CPU's own machinery sees it: physical access and the page walk (Intel SDM volume 3, chapter 4).

Delivery of an interrupt reads descriptor tables and pushes a frame through the guest's page tables; the engine has
no call for that which also reports a fault the way the guest must see it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Final

from trivmm.hypervisor.soft.env import CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, Env

__all__ = ["GuestFault", "Physical", "Virtual"]

PRESENT: Final = 1
WRITABLE: Final = 2
USER: Final = 4
ACCESSED: Final = 0x20
DIRTY: Final = 0x40
LARGE: Final = 0x80
ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
PAGE_FAULT: Final = 14


class GuestFault(Exception):
    """Delivery itself met an exception. ``error`` is its error code, ``cr2`` set for page faults."""

    def __init__(self, vector: int, error: int, cr2: int | None = None) -> None:
        self.vector = vector
        self.error = error
        self.cr2 = cr2
        super().__init__(vector, error)


class Physical:
    """Memory by guest physical address. An access outside reads all-ones and writes nothing, as a real bus does."""

    def __init__(self) -> None:
        self._slots: tuple[tuple[int, int, int, bool], ...] = ()  # gpa, end, hva, whether it may be written

    def add(self, gpa: int, size: int, hva: int, *, rom: bool = False) -> None:
        self._slots = (*self._slots, (gpa, gpa + size, hva, not rom))

    def _host(self, gpa: int, length: int, *, write: bool = False) -> int | None:
        for start, end, hva, writable in self._slots:
            if start <= gpa and gpa + length <= end and writable >= write:
                return hva + gpa - start
        return None

    def read(self, gpa: int, length: int) -> bytes:
        host = self._host(gpa, length)
        return b"\xff" * length if host is None else ctypes.string_at(host, length)

    def write(self, gpa: int, data: bytes) -> None:
        host = self._host(gpa, len(data), write=True)
        if host is not None:
            ctypes.memmove(host, data, len(data))

    def read_int(self, gpa: int, length: int) -> int:
        return int.from_bytes(self.read(gpa, length), "little")


class Virtual:
    """Linear addresses under the registers in ``env``."""

    def __init__(self, physical: Physical, env: Env) -> None:
        self._physical = physical
        self._env = env

    def translate(self, va: int, *, write: bool, user: bool) -> int:
        """:raises GuestFault: #PF, as the guest must see it."""
        env = self._env
        if not env.cr[0] & CR0_PG:
            return va & 0xFFFF_FFFF
        long_mode = bool(env.efer & EFER_LMA)
        if long_mode and (va >> 47) not in (0, 0x1FFFF) and not env.cr[4] & CR4_LA57:
            raise GuestFault(13, 0)
        wanted = (WRITABLE if write else 0) | (USER if user else 0)
        rights = WRITABLE | USER
        table = env.cr[3] & ADDRESS_MASK
        for shift, width, index_bits in self._levels(long_mode):
            where = table + (((va >> shift) & ((1 << index_bits) - 1)) * width)
            if index_bits == 2:  # the PAE page-directory-pointer table is 32-byte aligned and has no rights bits
                where = (env.cr[3] & 0xFFFF_FFE0) + ((va >> 30) & 3) * 8
            entry = self._physical.read_int(where, width)
            if not entry & PRESENT:
                raise GuestFault(PAGE_FAULT, wanted, va)
            if index_bits != 2:
                rights &= entry
            last = shift == 12 or (entry & LARGE and index_bits != 2 and (width == 8 or env.cr[4] & CR4_PSE))
            if last:
                supervisor_may = not write or rights & WRITABLE or (not user and not env.cr[0] & CR0_WP)
                if (user and not rights & USER) or not supervisor_may:
                    raise GuestFault(PAGE_FAULT, wanted | PRESENT, va)
            marks = 0 if index_bits == 2 else ACCESSED | (DIRTY if last and write else 0)
            if entry & marks != marks:
                self._physical.write(where, (entry | marks).to_bytes(width, "little"))
            if last:
                mask = (1 << shift) - 1
                return (entry & ADDRESS_MASK & ~mask) | (va & mask)
            table = entry & ADDRESS_MASK
        raise AssertionError("the last level ends the walk")

    def _levels(self, long_mode: bool) -> Iterable[tuple[int, int, int]]:
        """(shift, bytes an entry, index bits) from the root down."""
        if long_mode:
            top: tuple[tuple[int, int, int], ...] = ((48, 8, 9),) if self._env.cr[4] & CR4_LA57 else ()
            return (*top, (39, 8, 9), (30, 8, 9), (21, 8, 9), (12, 8, 9))
        if self._env.cr[4] & CR4_PAE:
            return ((30, 8, 2), (21, 8, 9), (12, 8, 9))
        return ((22, 4, 10), (12, 4, 10))

    def read(self, va: int, length: int, *, user: bool = False) -> bytes:
        data = b""
        for start, size in _pages(va, length):
            data += self._physical.read(self.translate(start, write=False, user=user), size)
        return data

    def write(self, va: int, data: bytes, *, user: bool = False) -> None:
        chunks = [(self.translate(start, write=True, user=user), size) for start, size in _pages(va, len(data))]
        done = 0
        for gpa, size in chunks:
            self._physical.write(gpa, data[done : done + size])
            done += size

    def read_int(self, va: int, length: int) -> int:
        return int.from_bytes(self.read(va, length), "little")


def _pages(va: int, length: int) -> Iterable[tuple[int, int]]:
    while length > 0:
        size = min(length, 0x1000 - (va & 0xFFF))
        yield va, size
        va = (va + size) & 0xFFFF_FFFF_FFFF_FFFF
        length -= size
