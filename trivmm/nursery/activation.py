"""The activation servicer: who makes a virtio device active, and why a migration cannot deadlock on it.

A guest that writes DRIVER_OK expects an active device. The vCPU thread that made the write does not activate it: it
records what is wanted in the device's state (``trivmm.virtio.life``) and parks at a barrier. The *actor* of the device,
a task of the **device nursery**, brings the device there. The device nursery outlives every owner of the VM, so
neither handing the VM to a migration, nor cancelling or failing that migration, can leave an activation unserved.

What is wanted is a *target*, not a queue of requests: (generation, activate or reset). The actor compares the target
with what is, and converges. So a request can't go stale: a reset makes a new generation, which voids a pending
activation, cancels a running one, and opens its barrier. Actors of different devices run side by side.

The *device gate* is a second input: while it is closed (switchover) nothing activates and no queue takes a chain.
An activation that is pending or running then stays the target, is saved as pending, and is served when a gate opens
again, here or on the destination. A function that is no *bus master* has its queues stopped in the same way; but its
activation is settled, since a driver may set the bit after DRIVER_OK.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, TrivmmError
from trivmm.state.virtio import LifeStage
from trivmm.virtio.handles import DeviceHandles
from trivmm.virtio.life import NEEDS_RESET, DeviceState
from trivmm.virtio.port import DeviceBackend
from trivmm.virtio.setup import DriverSetup

__all__ = ["ActivationActor"]

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class ActivationActor:
    """The VMM's side of one device's life; a task as long-lived as its machine. In the trio thread.

    ``reset_registers()`` gives the transport's registers their reset values; ``on_event(kind, device, generation)``
    tells observers of settled activations, resets and failures."""

    device: DeviceBackend
    state: DeviceState
    handles: DeviceHandles
    deadlines: Deadlines
    reset_registers: Callable[[], None]
    on_event: Callable[[str, str, int], None] = lambda kind, device, generation: None
    activations: int = attrs.field(default=0, init=False)
    resets: int = attrs.field(default=0, init=False)
    failures: int = attrs.field(default=0, init=False)
    stuck: str | None = attrs.field(default=None, init=False)
    """Why a thread of this device may still touch guest memory past its deadline; None when none does."""
    _gate_open: bool = attrs.field(default=True, init=False)
    _live: bool = attrs.field(default=False, init=False)
    _busy: bool = attrs.field(default=False, init=False)
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False)
    _idle: trio.Event = attrs.field(factory=trio.Event, init=False)
    _running: trio.CancelScope | None = attrs.field(default=None, init=False)
    _running_generation: int = attrs.field(default=0, init=False)

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def busy(self) -> bool:
        """True while there is something to do."""
        return self._busy

    # --- the task --------------------------------------------------------------------------------------------

    async def run(self, workers: trio.Nursery) -> None:
        """Serve this device for ever. ``workers`` is where its queue workers live: the device nursery too."""
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):  # the program is over: nobody is served any more
                token.run_sync_soon(self._poke)

        self.state.wake = wake
        self._poke()
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while await self._converge(workers):
                pass
            if not self._wake.is_set():
                self._busy = False
                self._idle.set()
                self._idle = trio.Event()

    def _poke(self) -> None:
        """What is wanted may have changed; a running activation of an old wish is cancelled."""
        self._busy = True
        if self._running is not None and self._outdated(self._running_generation):
            self._running.cancel()
        self._wake.set()

    async def _converge(self, workers: trio.Nursery) -> bool:
        """One step towards what is wanted; False when there is nothing to do."""
        with self.state.lock:
            stage, generation = self.state.stage, self.state.generation
            setup, problem = self.state.setup, self.state.problem
            bus_master, bus_ticket = self.state.bus_master, self.state.bus_ticket
        if stage is LifeStage.RESETTING:
            await self._reset(generation)
            return True
        if problem is not None:
            self._needs_reset(generation, problem)
            return True
        if self._live and not (stage is LifeStage.ACTIVE and self._gate_open and bus_master):
            await self._stop_device()
            return True
        if bus_ticket is not None and not bus_ticket.settled and not self._live:
            bus_ticket.settle()
        if self._gate_open and setup is not None and not self._live:
            if bus_master:
                await self._activate(generation, setup, workers)
                return True
            if stage is LifeStage.ACTIVATING:
                self._activated(generation)
                return True
        return False

    async def _reset(self, generation: int) -> None:
        await self._stop_device()
        self.device.reset()
        self.reset_registers()
        with self.state.lock:
            self.state.status = 0
            self.state.enter(LifeStage.RESET)
            ticket = self.state.ticket
        self.resets += 1
        if ticket is not None:
            ticket.settle()
        self.on_event("reset", self.name, generation)

    async def _activate(self, generation: int, setup: DriverSetup, workers: trio.Nursery) -> None:
        """Activate, bounded; what comes too late (a reset, a closed gate, no bus master any more) is stopped again."""
        problem: str | None = None
        self._live = True  # from here on, stop() is owed
        with trio.CancelScope() as scope:
            self._running, self._running_generation = scope, generation
            if self._outdated(generation):
                scope.cancel()
            try:
                with self.deadlines.enter("activation", f"device {self.name}: activate() did not return"):
                    await self.device.activate(setup, self.handles.queues, workers)
            except (TrivmmError, OSError, ValueError) as error:
                problem = str(error)
        self._running = None
        if scope.cancelled_caught or self._outdated(generation):
            await self._stop_device()
            return
        if problem is not None:
            await self._stop_device()
            self._needs_reset(generation, f"activation failed: {problem}")
            return
        self._activated(generation)

    def _activated(self, generation: int) -> None:
        with self.state.lock:
            if self.state.generation != generation or self.state.setup is None:
                return
            first = self.state.stage is LifeStage.ACTIVATING
            self.state.enter(LifeStage.ACTIVE)
            ticket = self.state.ticket
        if ticket is not None:
            ticket.settle()
        if first:
            self.activations += 1
            self.on_event("activated", self.name, generation)

    def _outdated(self, generation: int) -> bool:
        return self.state.generation != generation or not self._gate_open or not self.state.bus_master

    async def _stop_device(self) -> None:
        """Stop the workers. Past ``device_stop`` it is said aloud, and the device counts as stuck until it is over."""
        if not self._live:
            return
        try:
            with self.deadlines.enter("device_stop", f"device {self.name}: a worker did not stop"):
                await self.device.stop()
        except DeadlineError as error:
            self.stuck = str(error)
            logger.critical("%s; it may still touch guest memory, the VM cannot migrate", error)
            self.on_event("stuck", self.name, self.state.generation)
            await self._outwait()
        self._live = False
        self._keep_positions()

    async def _outwait(self) -> None:
        """A thread in the kernel can't be kicked. Nothing of this device goes on before it is back; the barrier
        stays a checkpoint, so pause and stop still reach the vCPU."""
        while self.stuck is not None:
            with trio.move_on_after(self.deadlines.device_stop) as scope:
                await self.device.stop()
            if not scope.cancelled_caught:
                self.stuck = None
                logger.warning("device %s: the stuck worker came back", self.name)

    def _keep_positions(self) -> None:
        """Where the queues stand, so that a later activation of the same generation goes on from there."""
        with self.state.lock:
            setup = self.state.setup
            if setup is not None and self.device.queues:
                self.state.setup = attrs.evolve(setup, queues=self.device.queues)

    def _needs_reset(self, generation: int, problem: str) -> None:
        with self.state.lock:
            if self.state.generation != generation:
                return
            self.state.enter(LifeStage.NEEDS_RESET)
            self.state.status |= NEEDS_RESET
            self.state.setup = self.state.problem = None
            ticket = self.state.ticket
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:  # 1st, 2nd, 4th, …: a guest can have as many as it likes
            logger.error("device %s needs a reset (number %d): %s", self.name, self.failures, problem)
        self.handles.signal_config_change()
        if ticket is not None:
            ticket.settle()
        self.on_event("failed", self.name, generation)

    def fail(self, problem: str) -> None:
        """The device found its driver at fault while active (a broken queue)."""
        with self.state.lock:
            if self.state.stage is not LifeStage.ACTIVE:
                return
            self.state.problem = problem
        self._poke()

    async def retire(self) -> None:
        """The device is unplugged: open its barriers, stop its workers, reset it, for good. Bounded by ``device_stop``,
        past which it counts as stuck, and is waited for."""
        with self.state.lock:
            self.state.retire()
        self._poke()
        while self._busy:
            await self._idle.wait()

    # --- the gate: the switchover's step 2 -------------------------------------------------------------------

    async def quiesce(self) -> None:
        """Close the gate of this device and wait until nothing of it runs. Bounded by the caller (``quiesce``)."""
        self.close_gate()
        self._poke()
        while self._busy:
            await self._idle.wait()

    def close_gate(self) -> None:
        """Nothing activates from now on; :meth:`quiesce` also waits for what runs."""
        self._gate_open = False

    def reopen(self) -> None:
        """Open the gate: what was active works again (every queue is looked at once), what was pending is served."""
        self._gate_open = True
        self._poke()

    def counters(self) -> dict[str, int]:
        return {
            "activations": self.activations,
            "resets": self.resets,
            "activation_failures": self.failures,
            "ignored_status_writes": self.state.ignored_writes,
        }
