"""A VM leaves for another process, comes from one, or does not know which of the two it is in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from trivmm.config import VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationCancelled, MigrationInDoubt, PastCommit, WrongState
from trivmm.machine.board import Board
from trivmm.machine.machine import Machine
from trivmm.machine.saved import check_setup
from trivmm.migration.link.transports import Dialer
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.source.doubt import Doubt, Resolution
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.nursery.ownership import MIGRATION
from trivmm.state.stage import Stage
from trivmm.vm.core import ExitReason, VmCore, VmState

__all__ = ["Dial", "Moves"]

Dial = Callable[[str, Deadlines], Dialer]


class Moves(VmCore):
    """The part of a VM's API that is about migration."""

    async def migrate_to(
        self,
        url: str,
        *,
        downtime_ms: float | None = None,
        timeout_s: float | None = None,
        timeout_strategy: TimeoutStrategy | str = TimeoutStrategy.CANCEL,
        on_progress: Callable[[MigrationProgress], None] | None = None,
        on_accepted: Callable[[], None] | None = None,
        dial: Dial = socket_dialer,
    ) -> MigrationReport:
        """Move the VM to the receiver at ``url`` (``unix:PATH``, ``tcp:HOST:PORT``), live.

        Runs in the caller's task. Until COMMIT every failure, cancellation included, leaves the VM running here
        and the next migration possible. Afterwards the VM is SHUTDOWN here and ``wait`` gives ``migrated``.
        ``on_accepted`` is called once, when arguments, state and lease are checked and the migration begins. ``dial``
        is how ``url`` is reached.

        :raises ConfigError: / :raises WrongState: the request makes no sense, or not now.
        :raises MigrationError: failed before COMMIT, the VM runs.
        :raises MigrationInDoubt: the link died in the one moment when nobody can know: the VM is PAUSED here.
        :raises VmMigrating: another migration owns the VM.
        :raises DeadlineError: (quiesce) a device that the guest has ejected is stuck: nothing has begun."""
        options = SendOptions(downtime_ms, timeout_s, timeout_strategy)
        dialer = dial(url, self.deadlines)
        before, told = self._activated, 0

        def note(progress: MigrationProgress) -> None:
            nonlocal told
            progress = attrs.evolve(progress, activations=self._activated - before)
            self.migration_progress = progress
            if progress.rounds and progress.rounds[-1].number > told:
                told = progress.rounds[-1].number
                self._tell("migration-memory-iteration", id=str(told))
            if on_progress is not None:
                on_progress(progress)

        async with self.ownership.lease(MIGRATION), self._devices_held():
            machine = self._machine_in("migrate", VmState.RUNNING, VmState.PAUSED)
            if self.in_doubt:
                raise WrongState("migrate", "Paused, in doubt", "resolved, resumed or shut down by you first")
            machine.describe()  # a device that can't move says so here, and nobody is dialled
            self._tell("migration-started")
            try:
                with trio.CancelScope() as scope:
                    self._migration = scope
                    if on_accepted is not None:
                        on_accepted()
                    report = await send(machine, dialer, options, note)
                if scope.cancelled_caught:
                    raise MigrationCancelled("the migration was cancelled; the VM runs here")
            except MigrationInDoubt as error:
                self._enter(VmState.PAUSED)
                self.doubt = Doubt(url, error.session, str(error), dialer)
                machine.wanted = Stage.PAUSED
                self._tell("migration-failed", outcome="in doubt", reason=str(error))
                raise
            except BaseException as error:
                cancelled = not isinstance(error, Exception) or isinstance(error, MigrationCancelled)
                self._tell("migration-failed", outcome="cancelled" if cancelled else "failed", reason=str(error))
                raise
            finally:
                self._migration = None
            await self.host.end()
            self._finish(ExitReason("migrated"))
            self._tell("migration-finished")
            return report

    @asynccontextmanager
    async def _devices_held(self) -> AsyncIterator[None]:
        """The destination builds the devices that there are at the start. One that is being taken away is waited for.

        :raises DeadlineError: (quiesce) that does not end."""
        if self.host.machine is None:
            yield
            return
        async with self.host.machine.hotplug.ejector.held():
            yield

    async def resolve_migration(self, *, force: bool = False) -> Resolution:
        """Ask the destination what became of a migration that ended in doubt, within ``resolve``.

        It runs the VM: the doubt is over, and the VM SHUTDOWN here, as after a migration that succeeded. It never ran
        it: the doubt is over, the VM stays PAUSED with its image locks, and ``resume`` runs it. Nobody knows: nothing
        changes, unless ``force`` takes the doubt away (see :meth:`resume` for what that risks).

        :raises WrongState: the VM is not in doubt.
        :raises ConfigError: another process has the image locks: the VM stays in doubt."""
        async with self.ownership.lease("resolve-migration"):
            if self.doubt is None:
                raise WrongState("resolve-migration", self.state.value, "in doubt after a migration")
            machine = self._machine_in("resolve-migration", VmState.PAUSED)
            self.doubt = await self.doubt.look(self.deadlines)
            found = self.doubt.resolution(force)
            if found.verdict == "running":
                await self.host.end()
                self._finish(ExitReason("migrated"))
            elif not found.in_doubt:
                await machine.take_locks()
                self.doubt = None
            if found.verdict in ("running", "refused") and self.migration_progress is not None:
                phase = Phase.DONE if found.verdict == "running" else Phase.FAILED
                self.migration_progress = attrs.evolve(self.migration_progress, phase=phase, reason=found.reason)
            self._tell("migration-resolved", verdict=found.verdict, forced=str(found.forced).lower())
            return found

    def cancel_migration(self) -> bool:
        """Ask a running migration to roll back; False when there is none. It ends in ``MigrationCancelled``.

        :raises PastCommit: COMMIT was sent: it is only waited for, ``commit`` seconds at most."""
        if self._migration is None:
            return False
        if self.migration_progress is not None and self.migration_progress.committed:
            raise PastCommit("COMMIT was sent")
        self._migration.cancel()
        return True

    def tell_of_receiving(self, event: str, **properties: str) -> None:
        """``ready``: listening; ``started``: a source came; ``failed``: nothing runs here."""
        self._tell(f"migration-receive-{event}", **properties)

    async def build_for_migration(self, config: VmConfig, setup: dict[str, Any]) -> Machine:
        """Build the machine that a sender describes, parked: RAM, memslots, devices, vCPU threads.

        :raises ConfigError: when this host can't, naming the field."""

        def become(board: Board) -> None:
            self.config = board.config
            check_setup(board, setup)

        self.config = config
        return await self.host.build_incoming(config, become)

    async def abandon(self) -> None:
        """The migration failed before its verdict: what was built goes, the VM never ran."""
        await self.host.end()

    def adopt(self) -> None:
        """The machine that a migration brought runs here now (or stays paused, as it was sent)."""
        assert self.host.machine is not None
        self.config = self.host.machine.board.kept_config
        self._enter(VmState.RUNNING if self.host.machine.wanted is Stage.RUNNING else VmState.PAUSED)
        self._tell("migration-receive-finished")
