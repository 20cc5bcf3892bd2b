"""Moving a VM again and again inside one program, each side in a task of its own.

Scopes of trio nest, so a chain of ``open_incoming`` blocks in one task would keep every VM of the chain; here each
block is a task that ends when its VM has moved on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from trivmm.config import VmConfig
from trivmm.hypervisor.base import Hypervisor
from trivmm.incoming import Incoming, open_incoming
from trivmm.machine.board import Board
from trivmm.migration.progress import MigrationReport
from trivmm.unwrapped import unwrapped_nursery
from trivmm.virtio.console.device import ConsoleDevice
from trivmm.vm import Vm, open_vm

__all__ = ["Road", "console_of", "open_road"]


@attrs.define(eq=False)
class Road:
    """``vm`` is where the VM is now."""

    nursery: trio.Nursery
    vm: Vm
    hypervisor: Hypervisor | None
    _leave: trio.Event
    reports: list[MigrationReport] = attrs.field(factory=list)

    async def listen(self, url: str) -> tuple[Incoming, trio.Event]:
        """A receiver in a task of its own, and the event that lets it go."""
        leave = trio.Event()

        async def host(*, task_status: trio.TaskStatus[Incoming]) -> None:
            limits = self.vm.deadlines
            async with open_incoming(url, hypervisor=self.hypervisor, deadlines=limits) as incoming:
                task_status.started(incoming)
                await leave.wait()

        return await self.nursery.start(host), leave

    async def move(self, url: str, **options: Any) -> MigrationReport:
        """To a new receiver at ``url``; ``vm`` is the one there afterwards. :raises: what ``migrate_to`` raises."""
        incoming, leave = await self.listen(url)
        problems: list[Exception] = []

        async def receive() -> None:
            try:
                await incoming.receive()
            except Exception as error:  # the sender's error says more; this one is there for when it has none
                problems.append(error)

        report: MigrationReport | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                try:
                    report = await self.vm.migrate_to(incoming.url, **options)
                except Exception as error:  # raised below, outside the nursery, so that it isn't wrapped in a group
                    problems.insert(0, error)
            if problems or report is None:
                raise problems[0]
        except BaseException:
            leave.set()
            raise
        self.reports.append(report)
        self._leave.set()
        self._leave, self.vm = leave, incoming.vm
        return report


@asynccontextmanager
async def open_road(config: VmConfig, *, hypervisor: Hypervisor | None = None) -> AsyncIterator[Road]:
    """A booted VM that can be moved within the block."""
    async with unwrapped_nursery() as nursery:
        leave = trio.Event()

        async def first(*, task_status: trio.TaskStatus[Vm]) -> None:
            async with open_vm(config, hypervisor=hypervisor) as vm:
                await vm.boot()
                task_status.started(vm)
                await leave.wait()

        road = Road(nursery, await nursery.start(first), hypervisor, leave)
        try:
            yield road
        finally:
            road._leave.set()


def console_of(board: Board) -> ConsoleDevice:
    """The virtio console of a board that has one."""
    return next(slot.backend for slot in board.devices if isinstance(slot.backend, ConsoleDevice))
