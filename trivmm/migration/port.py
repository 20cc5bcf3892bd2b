"""The port between migration and the VM: what a sender needs of its source, what a receiver builds.

Sender and receiver know sockets, frames, rounds and verdicts; the machine knows vCPUs, devices and interrupts.
All ``async`` methods are bounded inside by deadlines; ``at_most_s`` is what is left of the downtime budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trivmm.deadlines import Deadlines
    from trivmm.memory.dirty_log import DirtyLog
    from trivmm.memory.guest import GuestMemory
    from trivmm.state.machine import MachineState

__all__ = ["DestinationFactory", "DestinationMachine", "SourceMachine"]


class SourceMachine(Protocol):
    """The machine of a VM whose lease the migration holds."""

    deadlines: Deadlines

    @property
    def memory(self) -> GuestMemory: ...

    @property
    def live_copy(self) -> bool:
        """False where there is no dirty log (``soft``, on an old kernel): the machine stops before it is copied."""

    def describe(self) -> dict[str, Any]:
        """JSON-able SETUP section: everything that the destination needs to build the same machine."""

    @property
    def dirty_log(self) -> DirtyLog:
        """Of every writer: guest and host. Its calls are not cut short by a cancellation."""

    def set_throttle(self, percent: int) -> None:
        """0 takes it off."""

    async def stop(self, at_most_s: float) -> None:
        """Switchover steps 1 to 3: pause the vCPUs, close the device gate, deassign irqfds.

        :raises PauseTimeout: / :raises DeadlineError: everything was undone, the machine runs."""

    def save(self) -> MachineState:
        """Step 4, after ``stop``. May dirty guest memory."""

    async def undo(self) -> None:
        """Back from ``stop`` and ``release_locks``, finished or not: locks, gate, vCPUs (unless the VM was paused
        before), interrupts. Safe when not stopped.

        :raises TrivmmError: another process has the locks: it stays stopped, and without them."""

    async def flush_disks(self, at_most_s: float) -> bool:
        """Write out what the guest has written to its disks so far, so that ``release_locks`` finds little. False: it
        is not done in that time, and goes on by itself.

        :raises DeadlineError: (storage) nor in that. :raises MigrationError: what was written may be lost."""

    async def release_locks(self, at_most_s: float) -> None:
        """Flush the disks and give up their locks, before COMMIT; may be cancelled half way.

        :raises DeadlineError: not done in that time. :raises TrivmmError: a device's thread is stuck, or what was
            written may be lost."""


class DestinationMachine(Protocol):
    """A machine built from a SETUP section: memslots, RAM, devices, parked vCPU threads; nothing runs."""

    deadlines: Deadlines

    @property
    def memory(self) -> GuestMemory: ...

    async def load(self, state: MachineState) -> None:
        """Set all state, and do all that can be done before COMMIT; may be called again. Not cut short by a
        cancellation. :raises TrivmmError: when the state makes no sense."""

    async def take_locks(self) -> None:
        """On COMMIT. :raises ConfigError: → REFUSED."""

    async def start(self) -> None:
        """Run (or stay paused, as the state says): interrupts, gate, vCPUs. After this it is RUNNING. Raises only
        before the first guest instruction, with the locks given back: an error becomes REFUSED, a promise."""


class DestinationFactory(Protocol):
    async def __call__(self, setup: dict[str, Any]) -> DestinationMachine:
        """RAM must be fresh, all zero: pages that the source never touched are not sent.

        :raises ConfigError: when this host cannot build that machine (names the field)."""
