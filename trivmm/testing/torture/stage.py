"""Where trials happen: a process with the guest, an idle one, and what it takes to have both before each trial."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import TrivmmError
from trivmm.testing.torture.hosts import Host, HostError, guest_config, open_host, until
from trivmm.unwrapped import unwrapped_nursery

__all__ = ["Stage", "listens", "open_stage", "send"]

READY_LIMIT_S: Final = 60.0
EMPTY_LIMIT_S: Final = 10.0
MOVE_LIMIT_S: Final = 60.0
LISTEN_LIMIT_S: Final = 10.0
DOWNTIME_MS: Final = 1000  # a busy host: what is tried here is not the downtime
CONVERGE_S: Final = 10  # then it switches over, however long that takes
LISTENING: Final = "0A"  # TCP_LISTEN as /proc/net/tcp spells it


@attrs.define(eq=False)
class Stage:
    """``source`` has the guest, ``idle`` nothing; None: the next trial needs a new one. ``move_s``: how long an
    undisturbed move takes, lately."""

    folder: Path
    hypervisor: str
    limits: Deadlines
    _nursery: trio.Nursery
    source: Host | None = None
    idle: Host | None = None
    move_s: float = 0.5
    _disk: bool = False
    _hosts: int = 0
    _urls: int = 0
    _leave: dict[Host, trio.Event] = attrs.field(factory=dict)
    _left: dict[Host, trio.Event] = attrs.field(factory=dict)

    async def start(self) -> Host:
        """A new idle process. :raises HostError:"""
        self._hosts += 1
        name = f"h{self._hosts}"
        leave, left = trio.Event(), trio.Event()
        problems: list[HostError] = []

        async def host(*, task_status: trio.TaskStatus[Host | None]) -> None:
            try:
                async with open_host(name, self.folder / name, self.hypervisor, self.limits) as made:
                    task_status.started(made)
                    await leave.wait()
            except HostError as error:
                problems.append(error)
                task_status.started(None)
            finally:
                left.set()

        made: Host | None = await self._nursery.start(host)
        if made is None:
            raise problems[0]
        self._leave[made], self._left[made] = leave, left
        return made

    async def drop(self, *hosts: Host | None) -> None:
        """Kill them."""
        for host in hosts:
            if host is None or host not in self._leave:
                continue
            host.signal(signal.SIGKILL)
            self._leave.pop(host).set()
            await self._left.pop(host).wait()  # bounded by open_host

    async def settle(self, source: Host | None, *others: Host) -> None:
        """After a trial: ``source`` has the guest; of the others one may stay as the idle one."""
        self.source, self.idle = source, None
        for host in others:
            if host is source:
                continue
            if self.idle is None and await host.is_empty(EMPTY_LIMIT_S):
                self.idle = host
            else:
                await self.drop(host)

    async def clear(self) -> None:
        """No guest, no processes: after a broken promise nothing of it is used again."""
        await self.drop(self.source, self.idle)
        self.source = self.idle = None

    async def prepare(self, disk: bool) -> tuple[Host, Host]:
        """(a process with a running guest, an idle one). :raises HostError:"""
        if self.idle is not None and not await self.idle.is_empty(EMPTY_LIMIT_S):
            await self.drop(self.idle)
            self.idle = None
        if self.source is not None and self._disk != disk:
            await self.drop(self.source)
            self.source = None
        if self.source is None:
            host, self.idle = self.idle or await self.start(), None
            self.source, self._disk = host, disk
            with trio.move_on_after(READY_LIMIT_S) as scope:
                try:
                    await host.client.create(guest_config(self.folder, self.hypervisor, disk))
                    await host.client.boot()
                except TrivmmError as error:
                    raise HostError(f"{host.name} can't boot the guest: {error}") from error
                if not await until(lambda: host.report().reports > 0, READY_LIMIT_S):
                    raise HostError(f"the guest did not get ready: {host.last_words()}")
            if scope.cancelled_caught:
                raise HostError(f"{host.name} does not answer: {host.last_words()}")
        if self.idle is None:
            self.idle = await self.start()
        return self.source, self.idle

    def url(self, transport: str) -> str:
        """One that nobody uses."""
        self._urls += 1
        if transport == "unix":
            return f"unix:{self.folder}/m{self._urls}.sock"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{probe.getsockname()[1]}"

    async def plain_move(self) -> None:
        """From ``source`` to ``idle``, which change places. :raises TrivmmError: it failed, or took too long."""
        source, target = self.source, self.idle
        assert source is not None
        if target is None or not await target.is_empty(EMPTY_LIMIT_S):
            await self.drop(target)
            target = await self.start()
            self.idle = target
        target.forget_serial()
        url = self.url("unix")
        problems: list[TrivmmError] = []

        async def receive(host: Host) -> None:
            try:
                await host.client.receive_migration(url)
            except TrivmmError as error:
                problems.append(error)

        began = trio.current_time()
        with trio.move_on_after(MOVE_LIMIT_S) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, target)
                await until(lambda: listens(url), LISTEN_LIMIT_S)
                began = trio.current_time()
                try:
                    await send(source, url)
                    await source.client.migration_outcome()
                except TrivmmError as error:
                    problems.insert(0, error)
                    nursery.cancel_scope.cancel()
        if problems or scope.cancelled_caught:
            raise problems[0] if problems else HostError(f"a plain move took longer than {MOVE_LIMIT_S:g} s")
        self.note_move(trio.current_time() - began)
        self.source, self.idle = target, source

    def note_move(self, seconds: float) -> None:
        self.move_s = (self.move_s + seconds) / 2


async def send(source: Host, url: str) -> None:
    await source.client.send_migration(url, downtime_ms=DOWNTIME_MS, timeout_s=CONVERGE_S, timeout_strategy="Ignore")


def listens(url: str) -> bool:
    kind, _, where = url.partition(":")
    if kind == "unix":
        return os.path.exists(where)
    port = int(where.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == LISTENING for row in rows)


@asynccontextmanager
async def open_stage(folder: Path, hypervisor: str, limits: Deadlines) -> AsyncIterator[Stage]:
    """For the length of the block; then every process is killed."""
    async with unwrapped_nursery() as nursery:
        yield Stage(folder, hypervisor, limits, nursery)
        nursery.cancel_scope.cancel()
