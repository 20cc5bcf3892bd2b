"""Which pages were written: every writer's log, switched on, read and switched off as one.

A guest's own writes are logged by its hypervisor, those of its devices' workers by the bitmap beside each region
(:class:`HostWriters`). Each such log is a :class:`DirtySource`; a page that any of them saw is dirty.

Owned by a machine, used by whoever holds its lease, one at a time. Switching waits for the kernel, in a thread, and a
thread in the kernel can't be ended. So on or off is a *target*: a call that nobody can wait for any longer ends with
what is wanted by then, and a log that came on too late goes off again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import TrivmmError
from trivmm.memory.guest import GuestMemory

__all__ = ["DirtyLog", "DirtySource", "HostWriters"]

T = TypeVar("T")


class DirtySource(Protocol):
    """One log of writes to guest memory, as a hypervisor's VM has it."""

    def set_dirty_log(self, enabled: bool) -> None:
        """Start or stop logging, for every slot. Starting gives a log in which nothing is dirty."""

    def harvest_dirty(self, slot: int, into: Any) -> None:
        """OR the slot's dirty bits into ``into`` (cffi ``uint64_t *``, a bit a 4 KiB page) and clear them here."""


class SlowCall(Protocol):
    """Makes a call that may wait for the kernel: off the trio thread, one at a time, not cut short by a cancellation.

    :raises DeadlineError: it has not returned. It, or its turn, is still to come."""

    async def __call__(self, what: str, work: Callable[[], T], /) -> T: ...


@attrs.frozen(eq=False)
class HostWriters:
    """What this process writes into guest memory: the workers mark it themselves (``ffi/memory.h``), always."""

    memory: GuestMemory

    def set_dirty_log(self, enabled: bool) -> None:
        for region in self.memory.regions if enabled else ():
            lib.tv_dirty_take(region.dirty, ffi.new("uint64_t[]", region.bitmap_words), region.bitmap_words)

    def harvest_dirty(self, slot: int, into: Any) -> None:
        region = self.memory.regions[slot]
        lib.tv_dirty_take(region.dirty, into, region.bitmap_words)


@attrs.define(eq=False)
class DirtyLog:
    """``call`` makes the calls that wait."""

    sources: Sequence[DirtySource]
    call: SlowCall
    _wanted: bool = attrs.field(default=False, init=False)
    _on: bool | None = attrs.field(default=False, init=False)  # the thread's; None: half way
    _begun: bool = attrs.field(default=False, init=False)  # it may be on, or come on
    _forgotten: bool = attrs.field(default=False, init=False)

    async def start(self) -> None:
        """From now on the next :meth:`harvest` sees every write. What was written before it does not.

        :raises TrivmmError: a source can't; none is on. :raises DeadlineError: it is not on, or goes off by itself."""
        self._wanted = self._begun = True
        try:
            await self.call("switching the dirty log on", self._agree)
        except BaseException:
            self._wanted = False
            raise

    async def stop(self) -> None:
        """Idempotent. :raises DeadlineError: it goes off by itself, later."""
        self._wanted = False
        if self._begun and not self._forgotten:
            await self.call("switching the dirty log off", self._agree)
            self._begun = False

    def forget(self) -> None:
        """The VM is closed next, and its log with it: nobody waits for the kernel to switch it off first."""
        self._forgotten = True

    async def harvest(self, into: Sequence[Any], *, stopped: bool) -> None:
        """OR what was written since the last harvest into ``into`` (by slot, as :class:`DirtySource` has it), and
        clear it. While it is on.

        ``stopped`` says that no vCPU runs. Then none moves a BAR, which holds the kernel's lock for as long as that
        waits: the call is made here, in the time that a thread would take to begin.

        :raises DeadlineError: not read."""
        if stopped:
            self._harvest(into)
        else:
            await self.call("reading the dirty log", lambda: self._harvest(into))

    def _harvest(self, into: Sequence[Any]) -> None:
        for slot, bits in enumerate(into):
            for source in self.sources:
                source.harvest_dirty(slot, bits)

    def _agree(self) -> None:
        """In a thread."""
        while self._on is not self._wanted:
            wanted, self._on = self._wanted, None
            if wanted:
                self._switch_on()
            else:
                for source in self.sources:
                    source.set_dirty_log(False)
            self._on = wanted

    def _switch_on(self) -> None:
        try:
            for source in self.sources:
                source.set_dirty_log(True)
        except TrivmmError:  # of one slot, perhaps: no other goes on logging for nobody
            left = 0
            for source in self.sources:
                try:
                    source.set_dirty_log(False)
                except TrivmmError:
                    left += 1
            if not left:
                self._on = False
            raise
