"""The service's migrations: tasks of the Vmm nursery, whose outcome is a value."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial

import trio

from trivmm.errors import PastCommit, TrivmmError, WrongState
from trivmm.incoming import Incoming, open_incoming
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.migration.source.doubt import Resolution
from trivmm.vm import Vm
from trivmm.vmm.core import VmmCore
from trivmm.vmm.slot import Result, Slot

__all__ = ["VmmMoves"]

logger = logging.getLogger(__name__)


class VmmMoves(VmmCore):
    """The verbs that are about migration, and the end of a process in the middle of one."""

    async def send_migration(self, url: str, options: SendOptions) -> None:
        """Begin to move the VM away; returns once the request is accepted. The migration is a task of the Vmm nursery:
        its outcome is in :attr:`progress`, on the event bus and in the log.

        :raises ConfigError: / :raises WrongState: / :raises VmMigrating: not accepted; nothing has changed."""
        vm = self.vm
        self._changing("send-migration")
        self._not_leaving("send-migration")
        if self._slot is not None:
            self._slot.url = url
        self._sending = Result[None]()
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
            logger.warning("send-migration failed: %s", error)
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
        slot.url, slot.arrival = url, Result[Vm]()
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

    def _refuse_commit(self, slot: Slot) -> str | None:
        """Why a VM whose COMMIT comes now is not run here; None: it is. Who cancelled was told that it is not."""
        why = self._settled_for or self._told_to_end()
        return f"the VMM is shutting down ({why})" if why else "it was cancelled" if slot.cancelled else None

    def _on_paper(self) -> Slot | None:
        slot = self._slot
        if slot is None or slot.vm is None or slot.moved or not slot.vm.on_paper:
            return None
        logger.warning("the VM that is here, and not booted, will give way to the one that comes")
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


async def _received(slot: Slot, incoming: Incoming) -> Vm:
    slot.incoming = incoming
    return await incoming.receive()
