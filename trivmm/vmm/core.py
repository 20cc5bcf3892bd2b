"""The VM's task and its place: what all verbs of the service stand on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationCancelled, TrivmmError, VmMigrating, VmNotCreated, WrongState
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.progress import MigrationProgress
from trivmm.migration.source.sender import socket_dialer
from trivmm.vm import Dial, ExitReason, Vm
from trivmm.vmm.slot import Result, Slot

__all__ = ["VmmCore", "VmmEnd", "VmmOptions"]

logger = logging.getLogger(__name__)
FIRST_LOOK_S: Final = 1.0  # for a client that has not asked yet when a short migration is over already


@attrs.frozen
class VmmOptions:
    """``stay_after_migration``: keep serving (and be ready to receive) after the VM migrated away.
    ``stay_after_shutdown``: keep serving after the guest powered off (Cloud Hypervisor's ``--no-shutdown``)."""

    stay_after_migration: bool = False
    stay_after_shutdown: bool = False


@attrs.frozen
class VmmEnd:
    """Why the process has nothing left to do: ``kind`` as ``ExitReason.kind``, ``asked`` (vmm.shutdown), or ``failed``:
    a fault of ours ended the VM."""

    kind: str
    reason: ExitReason | None = None


@attrs.define(eq=False)
class VmmCore:
    """At most one VM, in a task of its own."""

    hypervisor: Hypervisor
    deadlines: Deadlines
    options: VmmOptions
    events: EventBus
    _nursery: trio.Nursery
    _dial: Dial = socket_dialer
    _told_to_end: Callable[[], str | None] = lambda: None
    _verdicts: Verdicts = attrs.field(
        default=attrs.Factory(lambda self: Verdicts(self._nursery), takes_self=True), init=False
    )
    _slot: Slot | None = attrs.field(default=None, init=False)
    _sending: Result[None] | None = attrs.field(default=None, init=False)
    _last_progress: MigrationProgress | None = attrs.field(default=None, init=False)
    _verdict_read: trio.Event = attrs.field(factory=trio.Event, init=False)
    _watched: bool = attrs.field(default=False, init=False)  # somebody has asked for this migration's progress
    _end: Result[VmmEnd] = attrs.field(factory=Result, init=False)
    _settled_for: str | None = attrs.field(default=None, init=False)

    @property
    def vm(self) -> Vm:
        """:raises VmNotCreated: when there is none."""
        if self._slot is None or self._slot.vm is None:
            raise VmNotCreated
        return self._slot.vm

    @property
    def progress(self) -> MigrationProgress | None:
        """Of the migration that runs, or of the last one, which may have taken the VM away."""
        if self._slot is not None and self._slot.vm is not None and self._slot.vm.migration_progress is not None:
            return self._slot.vm.migration_progress
        return self._last_progress

    def read_progress(self) -> MigrationProgress | None:
        """:attr:`progress` for a client: once it has read how a migration ended, the process may go."""
        progress, self._watched = self.progress, True
        if progress is not None and progress.ended:
            self._verdict_read.set()
        return progress

    @property
    def stuck(self) -> tuple[str, ...]:
        return () if self._slot is None or self._slot.vm is None else self._slot.vm.stuck

    async def ended(self) -> VmmEnd:
        """Wait until the process has nothing left to do. Bounded by the caller: it is a VM's life."""
        return await self._end.get()

    async def _until_read(self) -> None:
        """Who asks for a migration's outcome gets it before the process ends."""
        limit_s = self.deadlines.verdict_read
        with trio.move_on_after(limit_s if self._watched else min(limit_s, FIRST_LOOK_S)):
            await self._verdict_read.wait()

    def _take(self, what: str, *, in_place_of: Slot | None = None) -> Slot:
        if self._slot is not None and self._slot is not in_place_of:
            raise WrongState(
                what, "there already" if self._slot.vm else f"in the middle of {self._slot.what}", "deleted first"
            )
        self._slot = Slot(what, aside=in_place_of)
        return self._slot

    def _changing(self, operation: str) -> None:
        if self._sending is not None:
            raise VmMigrating(operation)
        if self._slot is not None and self._slot.vm is None:
            raise WrongState(operation, f"in the middle of {self._slot.what}", "there")

    def _not_leaving(self, operation: str) -> None:
        if self._settled_for is not None:
            raise TrivmmError(f"{operation}: the VMM is shutting down ({self._settled_for})")

    async def _live(
        self,
        slot: Slot,
        scope: AbstractAsyncContextManager[Any],
        obtain: Callable[[Any], Any],
        outcome: Result[Vm],
    ) -> None:
        """One VM from its making to its end: a task of the Vmm nursery that fails nobody else."""
        try:
            async with scope as opened:
                # Around the making only: a VM that came in spite of a cancellation (that came after COMMIT) runs
                # nowhere else, and stays.
                with trio.CancelScope() as cancel:
                    slot.cancel = cancel.cancel
                    slot.vm = await obtain(opened)
                slot.cancel = None
                if slot.vm is not None:
                    if slot.aside is not None:
                        slot.aside.moved = True
                        slot.aside.close.set()
                        slot.aside = None
                    outcome.set(slot.vm)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._watch, slot, slot.vm)
                        await slot.close.wait()
                        nursery.cancel_scope.cancel()
            if not outcome.known:
                outcome.fail(MigrationCancelled(f"{slot.what} was cancelled; nothing runs here"))
        except Exception as error:
            if outcome.known:
                logger.critical("the VM's task failed: %s", error, exc_info=error)
                self._finish(VmmEnd("failed"))
            else:
                outcome.fail(error)
        except BaseException:
            if not outcome.known:
                outcome.fail(TrivmmError(f"{slot.what}: the VMM is shutting down"))
            raise
        finally:
            slot.close_descriptors()
            if self._slot is slot:
                self._slot = slot.aside
            if slot.vm is not None and not slot.moved:
                self.events.emit("vm", "deleted")
            slot.gone.set()

    async def _watch(self, slot: Slot, vm: Vm) -> None:
        """Tells the process what the end of a VM means for it."""
        while True:
            booted = slot.booted
            reason = await vm.wait()
            logger.info("the VM ended: %s", reason.kind)
            if reason.kind == "migrated":
                slot.moved = True
                if self.options.stay_after_migration:
                    return
                if self._sending is not None:
                    await self._sending.get()
                await self._until_read()
            stays = reason.kind == "shutdown" or (reason.kind == "poweroff" and self.options.stay_after_shutdown)
            if not stays:
                self._finish(VmmEnd(reason.kind, reason))
                return
            await booted.wait()

    async def _close(self) -> None:
        """Ends the VM's task. Bounded: ``open_vm`` ends within its own deadlines."""
        slot = self._slot
        if slot is not None:
            slot.close.set()
            await slot.gone.wait()

    def _finish(self, end: VmmEnd) -> None:
        if not self._end.known:
            self._end.set(end)
