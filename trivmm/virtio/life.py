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
from typing import Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.bus.ticket import Ticket
from trivmm.errors import IllegalTransition
from trivmm.state.strict import refused
from trivmm.state.virtio import DeviceLifeState, LifeStage
from trivmm.virtio.setup import DriverSetup

__all__ = [
    "ACKNOWLEDGE",
    "DRIVER",
    "DRIVER_OK",
    "FEATURES_OK",
    "NEEDS_RESET",
    "SET_UP",
    "DeviceState",
    "check_life",
]

# Device status bits, virtio 1.2 section 2.1.
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64

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
WAY: Final = (_S.DRIVER, _S.FEATURES_OK, _S.ACTIVATING, _S.ACTIVE, _S.NEEDS_RESET)  # from RESET, each after the other
SET_UP: Final = frozenset({_S.ACTIVATING, _S.ACTIVE})  # the device has a DriverSetup
STATUS_OF: Final[dict[LifeStage, tuple[int, int]]] = {  # status bits that a stage has, and bits that it can't have
    _S.RESET: (0, DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET),
    _S.DRIVER: (DRIVER, FEATURES_OK | DRIVER_OK | NEEDS_RESET),
    _S.FEATURES_OK: (FEATURES_OK, DRIVER_OK | NEEDS_RESET),
    _S.ACTIVATING: (FEATURES_OK | DRIVER_OK, NEEDS_RESET),
    _S.ACTIVE: (FEATURES_OK | DRIVER_OK, NEEDS_RESET),
    _S.NEEDS_RESET: (FEATURES_OK | DRIVER_OK | NEEDS_RESET, 0),
    _S.RESETTING: (0, 0),  # the guest still sees its old status
}


@attrs.define(eq=False)
class DeviceState:
    """As long-lived as its device. Read and change it with ``lock`` held.

    ``setup`` is what the driver handed over at DRIVER_OK, with the positions of its queues, while ACTIVATING and
    ACTIVE; ``problem`` why the device needs a reset, until the actor has seen to it; ``ticket`` where a vCPU waits for
    an activation or a reset. While its function is not ``bus_master``, no queue is served; ``bus_ticket`` is where a
    vCPU waits for that."""

    name: str
    lock: BoundedLock
    status: int = attrs.field(default=0, init=False)
    generation: int = attrs.field(default=0, init=False)
    setup: DriverSetup | None = attrs.field(default=None, init=False)
    problem: str | None = attrs.field(default=None, init=False)
    ticket: Ticket | None = attrs.field(default=None, init=False)
    bus_master: bool = attrs.field(default=False, init=False)
    bus_ticket: Ticket | None = attrs.field(default=None, init=False)
    ignored_writes: int = attrs.field(default=0, init=False)
    retired: bool = attrs.field(default=False, init=False)
    """It is being unplugged: its driver asks for nothing any more."""
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

    def retire(self) -> None:
        """For good: whoever waits for it goes on, and its actor resets it. A vCPU that is still in a register of its
        changes nothing any more, and never comes to wait."""
        self.retired = True
        if self._stage is not LifeStage.RESETTING:
            self.generation += 1
            self.enter(LifeStage.RESETTING)
        self.setup = self.problem = None
        for ticket in (self.ticket, self.bus_ticket):
            if ticket is not None:
                ticket.settle()
        self.ticket = self.bus_ticket = None

    # --- saved state -----------------------------------------------------------------------------------------

    def save(self) -> DeviceLifeState:
        """With the actor quiesced."""
        return DeviceLifeState(self._stage, self.status, self.generation)

    def load(self, saved: DeviceLifeState, setup: DriverSetup, *, bus_master: bool) -> None:
        """Take over what :func:`check_life` has passed, with the actor quiesced; ``setup`` is what the registers hold.

        The stage is walked to by the steps that led there, so there is no other way into it."""
        for stage in (LifeStage.RESETTING, LifeStage.RESET, *_way_to(saved.stage)):
            self.enter(stage)
        self.status, self.generation = saved.status, saved.generation
        self.setup, self.problem = setup if saved.stage in SET_UP else None, None
        pending = {LifeStage.ACTIVATING: "activation", LifeStage.RESETTING: "reset"}.get(saved.stage)
        self.ticket = None if pending is None else Ticket(self.name, self.generation, pending)
        self.bus_master, self.bus_ticket = bus_master, None


def _way_to(stage: LifeStage) -> tuple[LifeStage, ...]:
    if stage is _S.RESETTING:
        return (stage,)
    return WAY[: WAY.index(stage) + 1] if stage in WAY else ()


def check_life(life: DeviceLifeState, where: str) -> None:
    """Whether stage and status say the same. :raises ProtocolError: naming the field."""
    holds, lacks = STATUS_OF[life.stage]
    if life.status & holds != holds or life.status & lacks:
        wanted = f"with bits {holds:#x} and without {lacks:#x}, as {life.stage.value} wants"
        raise refused(f"{where}.status", life.status, wanted)
