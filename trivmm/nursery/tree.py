"""The nursery tree of one machine: device actors, vCPU threads, and the order in which they end.

::

    open_tree(tenant)          device nursery     device actors (the activation servicer), queue workers, console lines
    └─ vCPU nursery            one task and one OS thread per vCPU
       └─ the body             whoever owns the VM: the control loop, or a migration

Every task runs under its own shielded scope, since trio cancels nested nurseries all at once; :func:`open_tree` ends
them from the inside out: vCPUs first (nobody then makes new requests), devices next.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError
from trivmm.nursery.kernel import KernelCalls
from trivmm.nursery.vcpus import VcpuSet
from trivmm.unwrapped import unwrapped_nursery

__all__ = ["Actor", "DeviceTasks", "LineTask", "Tenant", "open_tree"]

logger = logging.getLogger(__name__)


class Actor(Protocol):
    """A device's servicer: runs until it is cancelled, and starts its queue workers in ``workers``."""

    @property
    def name(self) -> str: ...

    async def run(self, workers: trio.Nursery) -> None: ...


class LineTask(Protocol):
    """A console line: runs until it is cancelled; ``flush`` then writes what its rings still hold."""

    async def run(self) -> None: ...

    async def flush(self) -> None: ...


class Tenant(Protocol):
    """A machine, as far as its tasks go."""

    deadlines: Deadlines
    vcpus: VcpuSet
    kernel: KernelCalls
    storage: KernelCalls

    @property
    def actors(self) -> Sequence[Actor]: ...

    @property
    def lines(self) -> Mapping[str, LineTask]: ...

    async def close_gate(self, at_most_s: float) -> None:
        """In-flight work of the devices ends. :raises DeadlineError: naming what did not."""

    def note_stuck(self, why: str, *, in_use: bool = False) -> None: ...


@attrs.define(eq=False)
class DeviceTasks:
    """The tasks of the device nursery, each under its own shielded scope. ``closed``: no more may come."""

    _nursery: trio.Nursery
    closed: bool = attrs.field(default=False, init=False)
    _scopes: dict[int, trio.CancelScope] = attrs.field(factory=dict, init=False)  # by the identity of whose it is

    def start_actor(self, actor: Actor) -> None:
        self._start(actor, actor.name, partial(actor.run, self._nursery))

    def start_line(self, name: str, line: LineTask) -> None:
        self._start(line, name, line.run)

    def _start(self, whose: object, name: str, run: Callable[[], Awaitable[None]]) -> None:
        # start_soon, not start: a cancelled start() would wait for tasks that shield themselves.
        scope = self._scopes[id(whose)] = trio.CancelScope(shield=True)
        self._nursery.start_soon(self._run, scope, run, name=name)

    @staticmethod
    async def _run(scope: trio.CancelScope, run: Callable[[], Awaitable[None]]) -> None:
        with scope:
            await run()

    def end_actor(self, actor: Actor) -> None:
        """One that has nothing left to do."""
        self._scopes.pop(id(actor)).cancel()

    def end_all(self) -> None:
        for scope in self._scopes.values():
            scope.cancel()


@asynccontextmanager
async def open_tree(tenant: Tenant) -> AsyncIterator[DeviceTasks]:
    """Actors and lines in the device nursery, parked vCPU threads in the vCPU nursery, the body inside both. Gives what
    the actor of a device that is plugged later is started with.

    Whatever happens in the body, vCPUs end first, then devices, each within its deadline; what did not end is noted by
    name. What the body raises leaves it unwrapped."""
    vcpus, deadlines = tenant.vcpus, tenant.deadlines
    async with unwrapped_nursery() as device_nursery:
        tasks = DeviceTasks(device_nursery)
        try:
            for actor in tenant.actors:
                tasks.start_actor(actor)
            for name, line in tenant.lines.items():
                tasks.start_line(name, line)
            async with unwrapped_nursery() as vcpu_nursery:
                try:
                    await vcpus.start(vcpu_nursery)
                    yield tasks
                finally:
                    with trio.CancelScope(shield=True):  # bounded: vcpu_stop
                        try:
                            await vcpus.stop()
                        except DeadlineError as error:
                            tenant.note_stuck(str(error))
        finally:
            tasks.closed = True
            with trio.CancelScope(shield=True):  # bounded: quiesce, device_stop (twice), drain and kernel
                await trio.lowlevel.checkpoint()  # actors that were only just started get their first step
                try:
                    await tenant.close_gate(deadlines.device_stop)
                except DeadlineError as error:
                    tenant.note_stuck(str(error))
                for calls, limit_s in ((tenant.kernel, deadlines.kernel), (tenant.storage, deadlines.device_stop)):
                    try:
                        await calls.settled(at_most_s=limit_s)
                    except DeadlineError as error:
                        logger.critical("%s", error)
                        tenant.note_stuck(str(error), in_use=True)
                with trio.move_on_after(deadlines.drain):
                    async with trio.open_nursery() as flushing:
                        for line in tenant.lines.values():
                            flushing.start_soon(line.flush)
            tasks.end_all()
