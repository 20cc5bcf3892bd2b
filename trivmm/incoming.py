"""Receiving a VM: listen, take one in, and own it for the length of the block.

::

    async with open_incoming("unix:/run/b.sock") as incoming:
        vm = await incoming.receive()
        await vm.wait()
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from trivmm.config import PayloadConfig, VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.migration.destination.receiver import Receiver, open_receiver
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.port import DestinationMachine
from trivmm.migration.progress import MigrationProgress
from trivmm.nursery.ownership import MIGRATION
from trivmm.state.setup import config_from_setup
from trivmm.unwrapped import unwrapped_nursery
from trivmm.virtio.kinds import sections
from trivmm.vm import Vm, vm_scope

__all__ = ["Incoming", "open_incoming"]


@attrs.define(eq=False)
class Incoming:
    """A listener that takes one VM in. ``url`` is what to give to the sender (a tcp port 0 is filled in)."""

    hypervisor: Hypervisor
    deadlines: Deadlines
    vm: Vm
    _receiver: Receiver

    @property
    def url(self) -> str:
        return self._receiver.url

    @property
    def committed(self) -> bool:
        """COMMIT was accepted: the VM runs here, or is about to, and cancelling ``receive`` changes nothing."""
        progress = self.vm.migration_progress
        return progress is not None and progress.committed

    async def receive(self) -> Vm:
        """Wait for a sender (``accept``), take its VM in, and give it, running (or paused, as it was sent).

        :raises MigrationError: when it failed: nothing runs here, everything that was built is gone."""
        async with self.vm.ownership.lease(MIGRATION):
            try:
                await self._receiver.receive(self._build, self._note)
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    await self.vm.abandon()  # noqa: ASYNC102 - bounded inside
                self.vm.tell_of_receiving("failed", reason=str(error) or type(error).__name__)
                raise
            self.vm.adopt()
            return self.vm

    def _note(self, progress: MigrationProgress) -> None:
        self.vm.migration_progress = progress

    async def _build(self, setup: dict[str, Any]) -> DestinationMachine:
        self.vm.tell_of_receiving("started")
        if setup.get("hypervisor") != self.hypervisor.name:
            raise ConfigError(
                "hypervisor",
                f"{setup.get('hypervisor')!s:.80}",
                f"this side runs {self.hypervisor.name}",
                "start both sides with the same --hypervisor",
            )
        config = attrs.evolve(config_from_setup(setup.get("config"), sections()), deadlines=self.deadlines)
        return await self.vm.build_for_migration(config, setup)


@asynccontextmanager
async def open_incoming(
    url: str,
    *,
    hypervisor: Hypervisor | None = None,
    deadlines: Deadlines | None = None,
    events: EventBus | None = None,
    verdicts: Verdicts | None = None,
    refuse: Callable[[], str | None] = lambda: None,
) -> AsyncIterator[Incoming]:
    """Listen at ``url`` (``unix:PATH`` or ``tcp:HOST:PORT``) for one migration. ``events`` as for ``open_vm``.
    ``refuse`` is asked when COMMIT comes: what it gives, unless None, is why the source is answered REFUSED.

    The VM that arrives lives until the end of the block, with the same promises as in ``open_vm``.

    A migration that failed when it was ready to run may leave a source that asks what became of it. ``verdicts`` is
    where that is answered, for a little more than twice ``commit``; without it the block ends only then, or when it is
    cancelled. Blocks that share one answer for each other's sessions, and a later one takes over an address at which an
    earlier one only answers any more.

    :raises ConfigError: when the address can't be bound, or others are answered there."""
    limits = deadlines or Deadlines()
    chosen = hypervisor if hypervisor is not None else choose_hypervisor("auto")
    empty = VmConfig(PayloadConfig(""), deadlines=limits)  # until the sender's SETUP says what it is
    try:
        async with (
            unwrapped_nursery(patient=True) as own,
            vm_scope(empty, chosen, events) as (vm, nursery),
            open_receiver(url, limits, nursery, verdicts or Verdicts(own)) as receiver,
        ):
            receiver.refuse = refuse
            vm.tell_of_receiving("ready")
            yield Incoming(chosen, limits, vm, receiver)
    finally:
        if hypervisor is None:
            chosen.close()
