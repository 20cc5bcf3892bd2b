"""Who takes an ejected device away: a task of the device nursery, beside the devices' own actors.

A guest ejects by a register write (``trivmm.platform.pci.hotplug``), whose vCPU thread leaves a target and goes on; the
device is gone for it. What is left to do waits for workers, kernel and storage, and is done here, whoever owns the VM:
each slot by itself, so that a device that is stuck is in no other one's way.

Two inputs hold it up, and what is ejected meanwhile stays the target: the *device gate*, as with activations, and a
migration, since its destination builds the devices that there are at its start. So a device that is ejected in
mid-migration travels as one that is ejected, and whichever side runs the VM takes it away.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Protocol

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import TrivmmError

__all__ = ["Ejector"]

logger = logging.getLogger(__name__)


class Target(Protocol):
    """What is ejected, by slot; ``wake`` is called in any thread when there is more."""

    wake: Callable[[], None]

    @property
    def ejected(self) -> Collection[int]: ...


@attrs.define(eq=False)
class Ejector:
    """As long-lived as its machine. ``eject(slot)`` takes a device away and out of the target; one that fails is tried
    again when the gate opens next, or somebody asks. In the trio thread."""

    target: Target
    eject: Callable[[int], Awaitable[None]]
    deadlines: Deadlines
    name: str = "hotplug"
    _gate_open: bool = attrs.field(default=True, init=False)
    _holders: int = attrs.field(default=0, init=False)
    _serving: set[int] = attrs.field(factory=set, init=False)
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False)
    _settled: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def serving(self) -> Collection[int]:
        """Slots whose device is being taken away."""
        return self._serving

    async def run(self, workers: trio.Nursery) -> None:
        """For ever."""
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the program is over: nobody is served any more
                token.run_sync_soon(self.look)

        self.target.wake = wake
        self.look()
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                if self._gate_open and not self._holders:
                    for slot in set(self.target.ejected) - self._serving:
                        self._serving.add(slot)
                        nursery.start_soon(self._serve, slot, name=f"ejecting slot {slot}")

    async def _serve(self, slot: int) -> None:
        try:
            await self.eject(slot)
        except (TrivmmError, OSError) as error:
            logger.critical("the device in PCI slot %d is ejected, and can't be taken away: %s", slot, error)
        finally:
            self._serving.discard(slot)
            self._settled.set()
            self._settled = trio.Event()

    def look(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def close_gate(self) -> None:
        """Nothing is begun from now on; :meth:`quiesce` also waits for what runs."""
        self._gate_open = False

    async def quiesce(self) -> None:
        """Bounded by the caller (``quiesce``)."""
        self.close_gate()
        while self._serving:
            await self._settled.wait()

    def reopen(self) -> None:
        self._gate_open = True
        self.look()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """The machine has the devices that it has, for the length of the block.

        :raises DeadlineError: (quiesce) one is being taken away, and that does not end."""
        self._holders += 1
        try:
            with self.deadlines.enter("quiesce", lambda: f"PCI slots {sorted(self._serving)} are being ejected"):
                while self._serving:
                    await self._settled.wait()
            yield
        finally:
            self._holders -= 1
            self.look()
