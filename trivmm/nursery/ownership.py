"""The ownership lease: whoever holds it may change the VM (power state, configuration, location).

A migration holds it from start to verdict; until then everybody else who wants to change the VM gets
:class:`~trivmm.errors.VmMigrating` at once, while reads never need it. The activation servicer needs no lease
either: that is the point of TriVMM. Short operations (pause, resume, …) wait for each other, bounded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import VmMigrating

__all__ = ["MIGRATION", "Ownership"]

MIGRATION: Final = "migration"


@attrs.define(eq=False)
class Ownership:
    """``holder`` is the operation that owns the VM now, or None."""

    deadlines: Deadlines
    holder: str | None = attrs.field(default=None, init=False)
    _freed: trio.Event = attrs.field(factory=trio.Event, init=False)

    @asynccontextmanager
    async def lease(self, operation: str, *, wait_for_migration: bool = False) -> AsyncIterator[None]:
        """Own the VM for the length of the block.

        ``wait_for_migration``: the control loop, which carries out a guest's own reset, outwaits whoever owns the VM
        (each bounds itself, a migration by its own ``timeout_s``); everybody else is refused.

        :raises VmMigrating: when a migration owns it.
        :raises DeadlineError: ``lease``, when another operation does not end."""
        if wait_for_migration:
            await self.free()
        while self.holder is not None:
            if self.holder == MIGRATION:
                raise VmMigrating(operation)
            with self.deadlines.enter("lease", f"{operation} waits for {self.holder}"):
                await self._freed.wait()
        self.holder = operation
        try:
            yield
        finally:
            self.holder = None
            self._freed.set()
            self._freed = trio.Event()

    async def free(self) -> None:
        """Wait until nobody owns the VM. Bounded by the caller."""
        while self.holder is not None:
            await self._freed.wait()
