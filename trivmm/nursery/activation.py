"""The activation servicer: who makes a virtio device active, and why a migration cannot deadlock on it.

A guest that writes DRIVER_OK expects an active device. The vCPU thread that made the write does not activate it: it
records what is wanted in the device's :class:`DeviceLifecycle` and parks at a barrier. The *actor* of that lifecycle,
a task of the **device nursery**, brings the device there. The device nursery outlives every owner of the VM, so
neither handing the VM to a migration, nor cancelling or failing that migration, can leave an activation unserved.

What is wanted is a *target*, not a queue of requests: (generation, activate or reset). The actor compares the target
with what is, and converges. So a request can't go stale: a reset makes a new generation, which voids a pending
activation, cancels a running one, and opens its barrier. Actors of different devices run side by side.

The *device gate* is a second input: while it is closed (switchover) nothing activates and no queue takes a chain.
An activation that is pending or running then stays the target, is saved as pending, and is served when a gate opens
again, here or on the destination.

Status table (virtio 1.2 section 2.1): ``RESET → DRIVER → FEATURES_OK → ACTIVATING → ACTIVE``, ``NEEDS_RESET``, and
from anywhere through ``RESETTING`` (the old generation may still touch guest memory; the guest sees its old status)
back to ``RESET``.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import attrs
import trio

from trivmm.bus.ticket import Ticket
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, IllegalTransition, TrivmmError
from trivmm.virtio.port import (
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    Activation,
    DeviceBackend,
    TransportPort,
)

__all__ = ["DeviceLifecycle", "LifecycleState"]

logger = logging.getLogger(__name__)

REGISTERS_RETRY_S: Final = 0.001


class LifecycleState(enum.Enum):
    RESET = "reset"
    DRIVER = "driver"
    FEATURES_OK = "features_ok"
    ACTIVATING = "activating"
    ACTIVE = "active"
    NEEDS_RESET = "needs_reset"
    RESETTING = "resetting"


_S = LifecycleState
TRANSITIONS: Final[dict[LifecycleState, frozenset[LifecycleState]]] = {
    _S.RESET: frozenset({_S.DRIVER, _S.FEATURES_OK, _S.NEEDS_RESET, _S.RESETTING}),
    _S.DRIVER: frozenset({_S.FEATURES_OK, _S.NEEDS_RESET, _S.RESETTING}),
    _S.FEATURES_OK: frozenset({_S.ACTIVATING, _S.NEEDS_RESET, _S.RESETTING}),
    _S.ACTIVATING: frozenset({_S.ACTIVE, _S.NEEDS_RESET, _S.RESETTING}),
    _S.ACTIVE: frozenset({_S.NEEDS_RESET, _S.RESETTING}),
    _S.NEEDS_RESET: frozenset({_S.RESETTING}),
    _S.RESETTING: frozenset({_S.RESET}),
}


@attrs.define(eq=False)
class DeviceLifecycle:
    """Status, generation, barrier and actor of one device; lives as long as its machine.

    Guest-facing methods (``read_status``, ``write_status``) are called from vCPU threads and never block; the rest
    belongs to the trio thread. ``on_event(kind, device, generation)`` tells observers of settled activations,
    resets and failures.
    """

    backend: DeviceBackend
    transport: TransportPort
    deadlines: Deadlines
    on_event: Callable[[str, str, int], None] = lambda kind, device, generation: None
    state: LifecycleState = attrs.field(default=LifecycleState.RESET, init=False)
    status: int = attrs.field(default=0, init=False)
    generation: int = attrs.field(default=0, init=False)
    activations: int = attrs.field(default=0, init=False)
    resets: int = attrs.field(default=0, init=False)
    failures: int = attrs.field(default=0, init=False)
    ignored_writes: int = attrs.field(default=0, init=False)
    stuck: str | None = attrs.field(default=None, init=False)
    """Why a thread of this device may still touch guest memory past its deadline; None when none does."""
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _ticket: Ticket | None = attrs.field(default=None, init=False)
    _activation: Activation | None = attrs.field(default=None, init=False)
    _failed: str | None = attrs.field(default=None, init=False)
    _gate_open: bool = attrs.field(default=True, init=False)
    _live: bool = attrs.field(default=False, init=False)
    _busy: bool = attrs.field(default=False, init=False)
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False)
    _idle: trio.Event = attrs.field(factory=trio.Event, init=False)
    _running: trio.CancelScope | None = attrs.field(default=None, init=False)
    _running_generation: int = attrs.field(default=0, init=False)
    _token: trio.lowlevel.TrioToken | None = attrs.field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def ticket(self) -> Ticket | None:
        """The open barrier of this device, if any."""
        ticket = self._ticket
        return None if ticket is None or ticket.settled else ticket

    @property
    def busy(self) -> bool:
        """True while the actor has something to do."""
        return self._busy

    def _enter(self, target: LifecycleState) -> None:
        if target is not self.state and target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.name, self.state.value, target.value)
        self.state = target

    # --- the guest's side: vCPU threads, never blocks --------------------------------------------------------

    def read_status(self) -> int:
        return self.status

    def write_status(
        self, value: int, accept_features: Callable[[], bool], snapshot: Callable[[int], Activation]
    ) -> Ticket | None:
        """See :class:`trivmm.virtio.port.DeviceStatusPort`."""
        with self._lock:
            ticket, void = self._write_status(value, accept_features, snapshot)
        if void is not None:
            void.settle()  # outside the lock: it wakes vCPUs
        if ticket is not None or self._failed is not None:
            self._post()
        return ticket

    def _write_status(
        self, value: int, accept_features: Callable[[], bool], snapshot: Callable[[int], Activation]
    ) -> tuple[Ticket | None, Ticket | None]:
        if value == 0:
            if self.state is _S.RESETTING:
                return self._ticket, None  # a second reset waits for the first
            void = self._ticket
            self.generation += 1
            self._enter(_S.RESETTING)
            self._activation = None
            self._failed = None
            self._ticket = Ticket(self.name, self.generation, "reset")
            return self._ticket, void
        if self.state in (_S.RESETTING, _S.NEEDS_RESET):
            self.ignored_writes += 1  # only a (complete) reset leads out
            return None, None
        # A driver must not clear bits (section 2.1.1); only a reset does, so a write can only add them.
        added = value & 0xBF & ~self.status
        if added & FEATURES_OK and (self.status & DRIVER_OK or not accept_features()):
            added &= ~FEATURES_OK  # the driver reads it back and learns that its choice was refused
        if added & DRIVER_OK and not (self.status | added) & FEATURES_OK:
            added &= ~DRIVER_OK
            self.ignored_writes += 1
        self.status |= added
        if added & DRIVER and self.state is _S.RESET:
            self._enter(_S.DRIVER)
        if added & FEATURES_OK:
            self._enter(_S.FEATURES_OK)
        if not added & DRIVER_OK:
            return None, None
        self.generation += 1
        self._enter(_S.ACTIVATING)
        self._ticket = Ticket(self.name, self.generation, "activation")
        try:
            self._activation = snapshot(self.generation)
        except ValueError as error:
            self._failed = f"queue configuration refused: {error}"
        return self._ticket, None

    def _post(self) -> None:
        """Wake the actor, from any thread."""
        token = self._token
        if token is not None:
            with contextlib.suppress(trio.RunFinishedError):  # the program is over: nobody is served any more
                token.run_sync_soon(self._poke)

    def _poke(self) -> None:
        """In the trio thread: what is wanted may have changed; a running activation of an old wish is cancelled."""
        self._busy = True
        if self._running is not None and self._outdated(self._running_generation):
            self._running.cancel()
        self._wake.set()

    # --- the actor: a task of the device nursery -------------------------------------------------------------

    async def run(self, workers: trio.Nursery) -> None:
        """Serve this device for ever. ``workers`` is where its queue workers live: the device nursery too."""
        self._token = trio.lowlevel.current_trio_token()
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

    async def _converge(self, workers: trio.Nursery) -> bool:
        """One step towards what is wanted; False when there is nothing to do."""
        with self._lock:
            state, generation, activation, failed = self.state, self.generation, self._activation, self._failed
            gate_open, live = self._gate_open, self._live
        if state is _S.RESETTING:
            await self._reset(generation)
            return True
        if failed is not None and state is not _S.NEEDS_RESET:
            self._needs_reset(generation, failed)
            return True
        if live and (not gate_open or state is not _S.ACTIVE):
            await self._stop_backend()
            return True
        if gate_open and activation is not None and not live and state in (_S.ACTIVATING, _S.ACTIVE):
            return await self._activate(generation, activation, workers)
        return False

    async def _reset(self, generation: int) -> None:
        await self._stop_backend()
        self.backend.reset()
        while not self.transport.reset_registers():  # noqa: ASYNC110 - a vCPU's thread has them, and no event
            await trio.sleep(REGISTERS_RETRY_S)  # bounded by the vCPU's access, which the kernel may hold up
        with self._lock:
            if self.generation != generation:
                return
            self.status = 0
            self._enter(_S.RESET)
            self.resets += 1
            ticket = self._ticket
        if ticket is not None:
            ticket.settle()
        self.on_event("reset", self.name, generation)

    async def _activate(self, generation: int, activation: Activation, workers: trio.Nursery) -> bool:
        """Activate, bounded; False where it was put off (gate closed), so that the actor goes to sleep."""
        problem: str | None = None
        self._live = True  # from here on, stop() is owed
        with trio.CancelScope() as scope:
            self._running, self._running_generation = scope, generation
            if self._outdated(generation):
                scope.cancel()
            try:
                with self.deadlines.enter("activation", f"device {self.name}: activate() did not return"):
                    await self.backend.activate(activation, workers)
            except (TrivmmError, OSError, ValueError) as error:
                problem = str(error)
        self._running = None
        if scope.cancelled_caught or self._outdated(generation):
            await self._stop_backend()  # its late result is dropped by generation
            return True
        if problem is not None:
            await self._stop_backend()
            self._needs_reset(generation, f"activation failed: {problem}")
            return True
        with self._lock:
            if self.generation != generation or self.state not in (_S.ACTIVATING, _S.ACTIVE):
                return True
            first = self.state is _S.ACTIVATING
            self._enter(_S.ACTIVE)
            ticket = self._ticket
        if first:
            self.activations += 1
        if ticket is not None:
            ticket.settle()
        if first:
            self.on_event("activated", self.name, generation)
        return True

    def _outdated(self, generation: int) -> bool:
        return self.generation != generation or not self._gate_open

    async def _stop_backend(self) -> None:
        """Stop the workers. Past ``device_stop`` it is said aloud, and the device counts as stuck until it is over."""
        if not self._live:
            return
        try:
            with self.deadlines.enter("device_stop", f"device {self.name}: a worker did not stop"):
                await self.backend.stop()
        except DeadlineError as error:
            self.stuck = str(error)
            logger.critical("%s; it may still touch guest memory, the VM cannot migrate", error)
            self.on_event("stuck", self.name, self.generation)
            await self._outwait()
        self._live = False
        self._keep_positions()

    async def _outwait(self) -> None:
        """A thread in the kernel can't be kicked. Nothing of this device goes on before it is back; the barrier
        stays a checkpoint, so pause and stop still reach the vCPU."""
        while self.stuck is not None:
            with trio.move_on_after(self.deadlines.device_stop) as scope:
                await self.backend.stop()
            if not scope.cancelled_caught:
                self.stuck = None
                logger.warning("device %s: the stuck worker came back", self.name)

    def _keep_positions(self) -> None:
        """Where the queues stand, so that a later activation of the same generation goes on from there."""
        activation = self._activation
        if activation is None or self.state is not _S.ACTIVE:
            return
        where = {index: (avail, used) for index, avail, used in self.backend.positions()}
        queues = tuple(
            attrs.evolve(queue, next_avail=where[queue.index][0], next_used=where[queue.index][1])
            if queue.index in where
            else queue
            for queue in activation.queues
        )
        self._activation = attrs.evolve(activation, queues=queues)

    def _needs_reset(self, generation: int, problem: str) -> None:
        with self._lock:
            if self.generation != generation or self.state is _S.RESETTING:
                return
            self._enter(_S.NEEDS_RESET)
            self.status |= NEEDS_RESET
            self._failed = None
            self._activation = None
            self.failures += 1
            ticket = self._ticket
        if self.failures & (self.failures - 1) == 0:  # 1st, 2nd, 4th, …: a guest can have as many as it likes
            logger.error("device %s needs a reset (number %d): %s", self.name, self.failures, problem)
        self.transport.signal_config_change()
        if ticket is not None:
            ticket.settle()
        self.on_event("failed", self.name, generation)

    def fail(self, problem: str) -> None:
        """The device found its driver at fault while active (a broken queue). In the trio thread."""
        with self._lock:
            if self.state is not _S.ACTIVE:
                return
            self._failed = problem
        self._poke()

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

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """After :meth:`quiesce`."""
        activation = self._activation
        queues = activation.queues if activation is not None and self.state is _S.ACTIVE else ()
        return {
            "state": self.state.value,
            "status": self.status,
            "generation": self.generation,
            "positions": [[queue.index, queue.next_avail, queue.next_used] for queue in queues],
        }

    def load(self, saved: dict[str, Any], snapshot: Callable[[int], Activation]) -> None:
        """Take over a saved state, with the gate closed and the transport's registers already loaded.

        :raises ValueError: when the state makes no sense."""
        state = LifecycleState(saved["state"])
        status, generation = int(saved["status"]), int(saved["generation"])
        if not 0 <= status <= 0xFF or not 0 <= generation < 1 << 64:
            raise ValueError(f"device {self.name}: status {status:#x}, generation {generation}")
        activation: Activation | None = None
        if state in (_S.ACTIVATING, _S.ACTIVE):
            activation = snapshot(generation)
            where = {int(index): (int(avail), int(used)) for index, avail, used in saved["positions"]}
            if not all(0 <= each < 1 << 16 for pair in where.values() for each in pair):
                raise ValueError(f"device {self.name}: queue positions {where}")
            queues = tuple(
                attrs.evolve(q, next_avail=where.get(q.index, (0, 0))[0], next_used=where.get(q.index, (0, 0))[1])
                for q in activation.queues
            )
            activation = attrs.evolve(activation, queues=queues)
        pending = {_S.ACTIVATING: "activation", _S.RESETTING: "reset"}.get(state)
        with self._lock:
            self.state, self.status, self.generation = state, status, generation
            self._activation, self._failed = activation, None
            self._ticket = Ticket(self.name, generation, pending) if pending else None

    def power_on(self) -> None:
        """The board itself resets (guest reboot): as if the guest had written 0. Follow with :meth:`settled`."""
        self.write_status(0, lambda: False, _no_snapshot)

    async def settled(self) -> None:
        """Wait until nothing is pending. Bounded by the caller."""
        while self._busy or self.state is _S.RESETTING:
            await self._idle.wait()

    def counters(self) -> dict[str, int]:
        return {
            "activations": self.activations,
            "resets": self.resets,
            "activation_failures": self.failures,
            "ignored_status_writes": self.ignored_writes,
        }


def _no_snapshot(generation: int) -> Activation:
    raise ValueError("no driver")
