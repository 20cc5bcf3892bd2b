"""The guest's side of a device's life: device_status (virtio 1.2 section 2.1), and the bus-master bit of its function.
On vCPU threads, and never blocks."""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.bus.ticket import Ticket
from trivmm.state.virtio import LifeStage
from trivmm.virtio.life import DRIVER, DRIVER_OK, FEATURES_OK, DeviceState
from trivmm.virtio.setup import DeviceLimits, DriverSetup, features_fit, setup_fault

__all__ = ["StatusRegister"]

WRITABLE: Final = 0xBF  # all but NEEDS_RESET, which is the device's to set
MAY_SERVE: Final = frozenset(
    {LifeStage.ACTIVATING, LifeStage.ACTIVE, LifeStage.NEEDS_RESET, LifeStage.RESETTING}
)  # until its actor has stopped it, in the last two


@attrs.frozen(eq=False)
class StatusRegister:
    """Its methods are called with ``state.lock`` held, by the transport, which reads its registers under it too: what
    it hands over is what they hold at this moment."""

    state: DeviceState
    limits: DeviceLimits

    def read(self) -> int:
        return self.state.status

    def write(self, value: int, setup: DriverSetup) -> Ticket | None:
        """``setup`` is what the registers hold. The ticket, if any, is where the writing vCPU must park."""
        state = self.state
        if state.retired:
            state.ignored_writes += 1
            return None
        if value == 0:
            return self._reset()
        if state.stage in (LifeStage.RESETTING, LifeStage.NEEDS_RESET):
            state.ignored_writes += 1  # only a (complete) reset leads out
            return None
        # A driver must not clear bits (section 2.1.1); only a reset does, so a write can only add them.
        added = value & WRITABLE & ~state.status
        if added & FEATURES_OK and (state.status & DRIVER_OK or not features_fit(setup.features, self.limits)):
            added &= ~FEATURES_OK  # the driver reads it back and learns that its choice was refused
        if added & DRIVER_OK and not (state.status | added) & FEATURES_OK:
            added &= ~DRIVER_OK
            state.ignored_writes += 1
        state.status |= added
        if added & DRIVER and state.stage is LifeStage.RESET:
            state.enter(LifeStage.DRIVER)
        if added & FEATURES_OK:
            state.enter(LifeStage.FEATURES_OK)
        return self._activate(setup) if added & DRIVER_OK else None

    def _activate(self, setup: DriverSetup) -> Ticket:
        state = self.state
        state.generation += 1
        state.enter(LifeStage.ACTIVATING)
        state.ticket = Ticket(state.name, state.generation, "activation")
        fault = setup_fault(setup, self.limits)
        if fault is None:
            state.setup = setup
        else:
            state.problem = f"what the driver set up is refused: {fault}"
        state.wake()
        return state.ticket

    def _reset(self) -> Ticket | None:
        state = self.state
        if state.stage is LifeStage.RESETTING:
            return state.ticket  # a second reset waits for the first
        void, state.ticket = state.ticket, Ticket(state.name, state.generation + 1, "reset")
        state.generation += 1
        state.enter(LifeStage.RESETTING)
        state.setup = state.problem = None
        if void is not None:
            void.settle()
        state.wake()
        return state.ticket

    def set_bus_master(self, on: bool) -> Ticket | None:
        """What the bit says now. The ticket is where a vCPU that cleared it must park: until no queue is served."""
        state = self.state
        if on is not state.bus_master and not state.retired:
            state.bus_master = on
            void, state.bus_ticket = state.bus_ticket, None
            if void is not None:
                void.settle()
            if not on and state.stage in MAY_SERVE:
                state.bus_ticket = Ticket(state.name, state.generation, "end of bus mastering")
            state.wake()
        return state.bus_ticket
