"""The process-level service: at most one VM, driven by the API and the command line.

``open_vmm`` owns the Vmm nursery. A VM lives in one task of it (``async with open_vm``), a migration that is sent in
another, and each keeps its outcome as a value: a migration or a boot that fails never ends the nursery. ``ended`` says
when the process has nothing left to do: the guest powered off or crashed, its VM migrated away, or a client asked.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

import attrs
import trio

from trivmm.config import VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import (
    MigrationCancelled,
    PastCommit,
    TrivmmError,
    VmMigrating,
    VmNotCreated,
    WrongState,
)
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.incoming import Incoming, open_incoming
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.migration.source.doubt import Resolution
from trivmm.migration.source.sender import socket_dialer
from trivmm.vm import Dial, ExitReason, Vm, open_vm

__all__ = ["Vmm", "VmmEnd", "VmmOptions", "open_vmm"]

LOG: Final = logging.getLogger(__name__)
FIRST_LOOK_S: Final = 1.0  # for a client that has not asked yet when a short migration is over already
T = TypeVar("T")


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
class _Result(Generic[T]):
    """What a task of the Vmm nursery came to, for whoever waits: a value or an error, once."""

    _value: T | None = None
    _error: BaseException | None = None
    _known: trio.Event = attrs.field(factory=trio.Event)

    def set(self, value: T) -> None:
        self._value = value
        self._known.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._known.set()

    @property
    def known(self) -> bool:
        return self._known.is_set()

    async def get(self) -> T:
        """Bounded by the operation whose outcome it is."""
        await self._known.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


@attrs.define(eq=False)
class _Slot:
    """The one VM's place: taken while it is being made, received, used and closed."""

    what: str
    vm: Vm | None = None
    moved: bool = False  # the VM is another process's now, or was overwritten: it is not deleted
    aside: _Slot | None = None  # of a VM that is not booted, and gives way to the one that comes if one does
    incoming: Incoming | None = None
    url: str = ""  # of the migration that brings it, or takes it away
    cancelled: bool = False
    cancel: Callable[[], None] | None = None
    arrival: _Result[Vm] | None = None
    close: trio.Event = attrs.field(factory=trio.Event)
    gone: trio.Event = attrs.field(factory=trio.Event)
    booted: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False)
class Vmm:
    """The service. Its methods are the API's verbs; they raise ``TrivmmError`` and never end the nursery."""

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
    _slot: _Slot | None = attrs.field(default=None, init=False)
    _sending: _Result[None] | None = attrs.field(default=None, init=False)
    _last_progress: MigrationProgress | None = attrs.field(default=None, init=False)
    _verdict_read: trio.Event = attrs.field(factory=trio.Event, init=False)
    _watched: bool = attrs.field(default=False, init=False)  # somebody has asked for this migration's progress
    _end: _Result[VmmEnd] = attrs.field(factory=_Result, init=False)
    _settled_for: str | None = attrs.field(default=None, init=False)

    # --- reading -----------------------------------------------------------------------------------------------

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
        return () if self._slot is None or self._slot.vm is None else tuple(getattr(self._slot.vm, "stuck", ()))

    async def ended(self) -> VmmEnd:
        """Wait until the process has nothing left to do. Bounded by the caller: it is a VM's life."""
        return await self._end.get()

    def shut_down(self) -> None:
        """vmm.shutdown: answers at once; the owner of the ``open_vmm`` block ends it."""
        self._finish(VmmEnd("asked"))

    @property
    def committing(self) -> str | None:
        """The migration that is past COMMIT and has no verdict yet, in words."""
        slot = self._slot
        if slot is None:
            return None
        progress, way = (self.progress, "to") if self._sending is not None else (None, "")
        if slot.vm is None and slot.incoming is not None:
            progress, way = slot.incoming.vm.migration_progress, "from the source at"
        if progress is None or progress.phase is not Phase.COMMIT:
            return None
        return f"the migration {progress.session} {way} {slot.url}"

    async def settle(self, why: str) -> MigrationProgress | None:
        """The process is about to end: from here no migration begins or commits. One that is past COMMIT gets its
        verdict, any other that is sent is rolled back, and who watches it reads how it ended, which is given; None:
        none was sent. Call before the ``open_vmm`` block ends, so that its end cuts nothing off.

        Bounded by the migration's own deadlines: ``commit``, or ``rollback``, and ``verdict_read``."""
        self._settled_for = why
        slot, sending = self._slot, self._sending
        if slot is None:
            return None
        if slot.vm is None:
            if slot.arrival is not None and slot.incoming is not None and slot.incoming.committed:
                with suppress(TrivmmError):
                    await slot.arrival.get()
            return None
        if sending is not None:
            with suppress(PastCommit):
                slot.vm.cancel_migration()
            await sending.get()
        elif not slot.moved:
            return None
        progress = self.progress
        if slot.moved or self._watched:
            await self._until_read()
        return progress

    async def _until_read(self) -> None:
        """Who asks for a migration's outcome gets it before the process ends."""
        limit_s = self.deadlines.verdict_read
        with trio.move_on_after(limit_s if self._watched else min(limit_s, FIRST_LOOK_S)):
            await self._verdict_read.wait()

    # --- one VM ------------------------------------------------------------------------------------------------

    async def create(self, config: VmConfig) -> Vm:
        """:raises WrongState: there is one. :raises ConfigError: / :raises HypervisorError: it can't be."""
        slot = self._take("create")
        outcome: _Result[Vm] = _Result()
        self._nursery.start_soon(
            self._live, slot, open_vm(config, hypervisor=self.hypervisor, events=self.events), _same, outcome
        )
        return await outcome.get()

    async def delete(self) -> None:
        """End the VM, whatever its state, and forget it. Without one there is nothing to do."""
        if self._slot is None:
            return
        self._changing("delete")
        await self._close()

    async def boot(self) -> None:
        self._changing("boot")
        vm, slot = self.vm, self._slot
        await vm.boot()
        if slot is not None:
            slot.booted.set()
            slot.booted = trio.Event()

    async def pause(self) -> None:
        self._changing("pause")
        await self.vm.pause()

    async def resume(self) -> None:
        self._changing("resume")
        await self.vm.resume()

    async def shutdown(self) -> None:
        self._changing("shutdown")
        await self.vm.shutdown()

    async def reboot(self) -> None:
        self._changing("reboot")
        await self.vm.reboot()

    async def nmi(self) -> None:
        self._changing("nmi")
        await self.vm.nmi()

    async def power_button(self) -> None:
        self._changing("power-button")
        await self.vm.power_button()

    async def resize(self, vcpus: int | None, ram: int | None, balloon: int | None) -> None:
        """As far as there is nothing to do: hotplug of vCPUs and memory is not there yet. A VM that was never booted
        is changed on paper.

        :raises NotSupported: naming what would have to change."""
        self._changing("resize")
        await self.vm.resize(vcpus, ram, balloon)

    # --- migration ---------------------------------------------------------------------------------------------

    async def send_migration(self, url: str, options: SendOptions) -> None:
        """Begin to move the VM away; returns once the request is accepted. The migration is a task of the Vmm nursery:
        its outcome is in :attr:`progress`, on the event bus and in the log.

        :raises ConfigError: / :raises WrongState: / :raises VmMigrating: not accepted; nothing has changed."""
        vm = self.vm
        self._changing("send-migration")
        self._not_leaving("send-migration")
        if self._slot is not None:
            self._slot.url = url
        self._sending = _Result[None]()
        self._watched, self._verdict_read = False, trio.Event()
        try:
            await self._nursery.start(self._send, vm, url, options, name="send-migration")
        except BaseException:
            if self._sending is not None and not self._sending.known:
                self._sending = None  # refused before it began
            raise

    async def _send(
        self,
        vm: Vm,
        url: str,
        options: SendOptions,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        outcome, began = self._sending, False
        assert outcome is not None

        def accepted() -> None:
            nonlocal began
            began = True
            task_status.started()

        try:
            await vm.migrate_to(
                url,
                downtime_ms=options.downtime_ms,
                timeout_s=options.timeout_s,
                timeout_strategy=options.timeout_strategy,
                on_progress=self._note,
                on_accepted=accepted,
                dial=self._dial,
            )
        except Exception as error:
            self._sending = None
            if not began:
                raise
            LOG.warning("send-migration failed: %s", error)
        except BaseException:
            self._sending = None
            raise
        else:
            self._last_progress = vm.migration_progress or self._last_progress
            self._sending = None
            if self.options.stay_after_migration:
                await self._close()
        finally:
            outcome.set(None)

    def _note(self, progress: MigrationProgress) -> None:
        self._last_progress = progress

    async def resolve_migration(self, force: bool) -> Resolution:
        """Ask what became of a migration that ended in doubt. Where the VM runs there, it is gone from here as after
        one that succeeded. :raises WrongState: the VM is not in doubt."""
        self._changing("resolve-migration")
        vm, self._verdict_read = self.vm, trio.Event()
        found = await vm.resolve_migration(force=force)
        self._last_progress = vm.migration_progress or self._last_progress
        if found.verdict == "running" and self.options.stay_after_migration:
            await self._close()
        return found

    async def receive_migration(self, url: str) -> None:
        """Listen at ``url``, take one VM in. One that is not booted gives way to it, as in Cloud Hypervisor; when none
        comes, its configuration is there again.

        :raises WrongState: there is a VM. :raises MigrationError: it failed."""
        self._not_leaving("receive-migration")
        slot = self._take("receive-migration", in_place_of=self._on_paper())
        slot.url, slot.arrival = url, _Result[Vm]()
        self._last_progress = None
        incoming = open_incoming(
            url,
            hypervisor=self.hypervisor,
            deadlines=self.deadlines,
            events=self.events,
            verdicts=self._verdicts,
            refuse=partial(self._refuse_commit, slot),
        )
        received = partial(_received, slot)
        self._nursery.start_soon(self._live, slot, incoming, received, slot.arrival, name="receive-migration")
        await slot.arrival.get()

    def _refuse_commit(self, slot: _Slot) -> str | None:
        """Why a VM whose COMMIT comes now is not run here; None: it is. Who cancelled was told that it is not."""
        why = self._settled_for or self._told_to_end()
        return f"the VMM is shutting down ({why})" if why else "it was cancelled" if slot.cancelled else None

    def _on_paper(self) -> _Slot | None:
        slot = self._slot
        if slot is None or slot.vm is None or slot.moved or not slot.vm.on_paper:
            return None
        LOG.warning("the VM that is here, and not booted, will give way to the one that comes")
        return slot

    def cancel_migration(self) -> None:
        """Ask the migration that runs, in either direction, to roll back.

        :raises PastCommit: it has seen COMMIT. :raises WrongState: none runs."""
        slot = self._slot
        if self._sending is not None and slot is not None and slot.vm is not None and slot.vm.cancel_migration():
            return
        if slot is not None and slot.vm is None and slot.cancel is not None and slot.what == "receive-migration":
            if slot.incoming is not None and slot.incoming.committed:
                raise PastCommit("COMMIT has come")
            slot.cancelled = True
            slot.cancel()
            return
        raise WrongState("cancel-migration", "not migrating", "migrating")

    # --- the VM's task -----------------------------------------------------------------------------------------

    def _take(self, what: str, *, in_place_of: _Slot | None = None) -> _Slot:
        if self._slot is not None and self._slot is not in_place_of:
            raise WrongState(
                what, "there already" if self._slot.vm else f"in the middle of {self._slot.what}", "deleted first"
            )
        self._slot = _Slot(what, aside=in_place_of)
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
        slot: _Slot,
        scope: AbstractAsyncContextManager[Any],
        obtain: Callable[[Any], Any],
        outcome: _Result[Vm],
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
                LOG.critical("the VM's task failed: %s", error, exc_info=error)
                self._finish(VmmEnd("failed"))
            else:
                outcome.fail(error)
        except BaseException:
            if not outcome.known:
                outcome.fail(TrivmmError(f"{slot.what}: the VMM is shutting down"))
            raise
        finally:
            if self._slot is slot:
                self._slot = slot.aside
            if slot.vm is not None and not slot.moved:
                self.events.emit("vm", "deleted")
            slot.gone.set()

    async def _watch(self, slot: _Slot, vm: Vm) -> None:
        """Tells the process what the end of a VM means for it."""
        while True:
            booted = slot.booted
            reason = await vm.wait()
            LOG.info("the VM ended: %s", reason.kind)
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


async def _same(vm: Vm) -> Vm:
    return vm


async def _received(slot: _Slot, incoming: Incoming) -> Vm:
    slot.incoming = incoming
    return await incoming.receive()


@asynccontextmanager
async def open_vmm(
    hypervisor: Hypervisor,
    *,
    deadlines: Deadlines | None = None,
    options: VmmOptions | None = None,
    events: EventBus | None = None,
    dial: Dial = socket_dialer,
    told_to_end: Callable[[], str | None] = lambda: None,
) -> AsyncIterator[Vmm]:
    """The service for the length of the block; at its end a migration rolls back and the VM ends, each bounded.
    ``told_to_end`` says by what the process was told to end, as soon as that is known: no VM is taken in any more.

    ``events`` is closed at the end, after its last event. ``hypervisor`` stays the caller's: it
    closes it. What the block raises leaves it unwrapped."""
    failure: BaseException | None = None
    bus = events or EventBus()
    bus.emit("vmm", "starting")
    try:
        async with trio.open_nursery() as nursery:
            vmm = Vmm(hypervisor, deadlines or Deadlines(), options or VmmOptions(), bus, nursery, dial, told_to_end)
            try:
                yield vmm
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error  # raised again outside the nursery, so that it isn't wrapped in a group
            nursery.cancel_scope.cancel()
    finally:
        bus.emit("vmm", "shutdown")
        bus.close()
    if failure is not None:
        raise failure
