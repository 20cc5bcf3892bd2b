"""One device's life, as plain data that two sides share, as the two ends of a trio channel share its state.

- The guest's side is the :class:`~trivmm.virtio.status.StatusRegister`: vCPU threads, which never block.
- The VMM's side is the ``ActivationActor`` (``trivmm.nursery.activation``): a trio task.

Neither calls the other. The guest's side says here what is wanted, and wakes the actor; the actor makes it so, and says
so here.

**The one lock.** ``lock`` guards all that is here and the registers of the transport, which are this device's too. It
is held for a few assignments. Under it only leaves are called: a ticket settles (which kicks vCPUs), and ``wake`` posts
to the trio thread. Neither takes this lock, nor waits; nobody asks for this lock while it holds another. So there is no
order of locks to keep, and the trio thread may wait for it. What does wait for the kernel, a changed interrupt route,
has another lock, in the MSI-X table, that is never held together with this one.

Stages (virtio 1.2 section 2.1): ``RESET → DRIVER → FEATURES_OK → ACTIVATING → ACTIVE``, ``NEEDS_RESET``, and from
anywhere through ``RESETTING`` (the old generation may still touch guest memory; the guest sees its old status) back to
``RESET``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.bus.ticket import Ticket
from trivmm.errors import IllegalTransition
from trivmm.state.virtio import LifeStage
from trivmm.virtio.setup import DeviceLimits, DriverSetup, setup_fault

__all__ = ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FAILED", "FEATURES_OK", "NEEDS_RESET", "TRANSITIONS", "DeviceState"]

# Device status bits, virtio 1.2 section 2.1.
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64
FAILED: Final = 128

_S = LifeStage
TRANSITIONS: Final[dict[LifeStage, frozenset[LifeStage]]] = {
    _S.RESET: frozenset({_S.DRIVER, _S.FEATURES_OK, _S.RESETTING}),
    _S.DRIVER: frozenset({_S.FEATURES_OK, _S.RESETTING}),
    _S.FEATURES_OK: frozenset({_S.ACTIVATING, _S.RESETTING}),
    _S.ACTIVATING: frozenset({_S.ACTIVE, _S.NEEDS_RESET, _S.RESETTING}),
    _S.ACTIVE: frozenset({_S.NEEDS_RESET, _S.RESETTING}),
    _S.NEEDS_RESET: frozenset({_S.RESETTING}),
    _S.RESETTING: frozenset({_S.RESET}),
}


@attrs.define(eq=False)
class DeviceState:
    """As long-lived as its device. Read and change it with ``lock`` held.

    ``setup`` is what the driver handed over at DRIVER_OK, with the positions of its queues, while ACTIVATING and
    ACTIVE; ``problem`` why the device needs a reset, until the actor has seen to it; ``ticket`` where a vCPU waits for
    an activation or a reset."""

    name: str
    lock: BoundedLock
    status: int = attrs.field(default=0, init=False)
    generation: int = attrs.field(default=0, init=False)
    setup: DriverSetup | None = attrs.field(default=None, init=False)
    problem: str | None = attrs.field(default=None, init=False)
    ticket: Ticket | None = attrs.field(default=None, init=False)
    ignored_writes: int = attrs.field(default=0, init=False)
    wake: Callable[[], None] = attrs.field(default=lambda: None, init=False)
    """Tells the actor that something else may be wanted now. Any thread, never blocks; set by the actor."""
    _stage: LifeStage = attrs.field(default=LifeStage.RESET, init=False)

    @property
    def stage(self) -> LifeStage:
        return self._stage

    def enter(self, stage: LifeStage) -> None:
        """The one place where the stage changes. :raises IllegalTransition: for a step that is not in the table."""
        if stage is not self._stage and stage not in TRANSITIONS[self._stage]:
            raise IllegalTransition(self.name, self._stage.value, stage.value)
        self._stage = stage

    @property
    def barrier(self) -> Ticket | None:
        """The ticket, while a vCPU waits at it."""
        ticket = self.ticket
        return None if ticket is None or ticket.settled else ticket

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """With the actor quiesced."""
        with self.lock:
            queues = () if self.setup is None else self.setup.queues
            return {
                "state": self.stage.value,
                "status": self.status,
                "generation": self.generation,
                "positions": [[index, each.next_avail, each.next_used] for index, each in enumerate(queues)],
            }

    def load(self, saved: dict[str, Any], registers: DriverSetup, limits: DeviceLimits) -> None:
        """Take over a saved state, with the gate closed and the transport's registers already loaded.

        :raises ValueError: when the state makes no sense."""
        stage = LifeStage(saved["state"])
        status, generation = int(saved["status"]), int(saved["generation"])
        if not 0 <= status <= 0xFF or not 0 <= generation < 1 << 64:
            raise ValueError(f"device {self.name}: status {status:#x}, generation {generation}")
        setup: DriverSetup | None = None
        if stage in (LifeStage.ACTIVATING, LifeStage.ACTIVE):
            where = {int(index): (int(avail), int(used)) for index, avail, used in saved["positions"]}
            if not all(0 <= each < 1 << 16 for pair in where.values() for each in pair):
                raise ValueError(f"device {self.name}: queue positions {where}")
            queues = [
                attrs.evolve(queue, next_avail=where[index][0], next_used=where[index][1]) if index in where else queue
                for index, queue in enumerate(registers.queues)
            ]
            setup = attrs.evolve(registers, queues=tuple(queues))
            fault = setup_fault(setup, limits)
            if fault is not None:
                raise ValueError(f"device {self.name}: {fault}")
        pending = {LifeStage.ACTIVATING: "activation", LifeStage.RESETTING: "reset"}.get(stage)
        with self.lock:
            self._stage, self.status, self.generation = stage, status, generation
            self.setup, self.problem = setup, None
            self.ticket = Ticket(self.name, generation, pending) if pending else None
