"""Doubles for the control surface: a VM whose every verb is noted, and a client that reads as ch-remote does."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import trio

import trivmm
from trivmm.config import VmConfig
from trivmm.control.routes import Router
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, GuestCrash, HypervisorError, MigrationCancelled, WrongState
from trivmm.hypervisor.base import Hypervisor, VmBackend
from trivmm.migration.source.doubt import Resolution
from trivmm.vm import ExitReason, VmState
from trivmm.vmm import Vmm, VmmOptions, open_vmm


class FakeHypervisor(Hypervisor):
    """Has every limit of a hypervisor and no VM."""

    name: ClassVar[str] = "fake"
    max_vcpus = 8
    needs_payload = False
    threads = False

    def open_vm(self) -> VmBackend:
        raise HypervisorError("fake", "there is nothing to run a VM with")

    def close(self) -> None:
        pass


@attrs.define(eq=False)
class FakeVm:
    """Its migration waits for ``let_migrate`` and then ends as ``migration_ends`` says."""

    config: VmConfig
    state: VmState = VmState.CREATED
    said: list[str] = attrs.field(factory=list)
    let_migrate: trio.Event = attrs.field(factory=trio.Event)
    migration_ends: BaseException | None = None
    migration_progress: Any = None
    boot_fails: BaseException | None = None
    wait_fails: BaseException | None = None
    migrate_options: dict[str, Any] = attrs.field(factory=dict)
    closed: bool = False
    pty_paths: dict[str, str] = attrs.field(factory=dict)
    _exit: ExitReason | None = None
    _exited: trio.Event = attrs.field(factory=trio.Event)
    _scope: trio.CancelScope | None = None

    @property
    def on_paper(self) -> bool:
        return self.state in (VmState.CREATED, VmState.SHUTDOWN)

    def _must(self, operation: str, *states: VmState) -> None:
        self.said.append(operation)
        if self.state not in states:
            raise WrongState(operation, self.state.value, " or ".join(state.value for state in states))

    async def boot(self) -> None:
        self._must("boot", VmState.CREATED, VmState.SHUTDOWN)
        if self.boot_fails is not None:
            raise self.boot_fails
        self.state = VmState.RUNNING
        self._exit = None
        if self._exited.is_set():
            self._exited = trio.Event()

    async def pause(self) -> None:
        self._must("pause", VmState.RUNNING)
        self.state = VmState.PAUSED

    async def resume(self) -> None:
        self._must("resume", VmState.PAUSED)
        self.state = VmState.RUNNING

    async def shutdown(self) -> None:
        self._must("shutdown", VmState.RUNNING, VmState.PAUSED)
        self.end(ExitReason("shutdown"))

    def end(self, reason: ExitReason) -> None:
        self.state = VmState.SHUTDOWN
        self._exit = reason
        self._exited.set()

    def crash(self) -> None:
        self.end(ExitReason("crash", GuestCrash(0, "triple fault", "rip=0x0\nrsp=0x0")))

    async def wait(self) -> ExitReason:
        await self._exited.wait()
        if self.wait_fails is not None:
            raise self.wait_fails
        assert self._exit is not None
        return self._exit

    async def reboot(self) -> None:
        self._must("reboot", VmState.RUNNING, VmState.PAUSED)

    async def nmi(self) -> None:
        self._must("nmi", VmState.RUNNING, VmState.PAUSED)

    async def power_button(self) -> None:
        self._must("power-button", VmState.RUNNING, VmState.PAUSED)

    async def migrate_to(self, url: str, *, on_accepted: Callable[[], None], **options: Any) -> None:
        self._must("migrate", VmState.RUNNING, VmState.PAUSED)
        self.migrate_options = {"url": url, **options}
        on_accepted()
        with trio.CancelScope() as self._scope:
            await self.let_migrate.wait()
        if self._scope.cancelled_caught:
            self._scope = None
            raise MigrationCancelled("cancelled; the VM runs here")
        self._scope = None
        if self.migration_ends is not None:
            raise self.migration_ends
        self.end(ExitReason("migrated"))

    async def resolve_migration(self, *, force: bool) -> Resolution:
        self._must("resolve-migration", VmState.PAUSED)
        self.end(ExitReason("migrated"))
        return Resolution("running", "it says so", "nothing is left to do", in_doubt=False, forced=force)

    def cancel_migration(self) -> bool:
        if self._scope is None:
            return False
        self._scope.cancel()
        return True

    def info(self) -> dict[str, Any]:
        return {"state": self.state.value, "memory_actual_size": self.config.memory.size, "device_tree": {}}

    def counters(self) -> dict[str, dict[str, int]]:
        return {"__rng": {"activations": 3}}


@attrs.define(eq=False)
class FakeIncoming:
    """``guard.shield`` True is what COMMIT does to a receiver: from there a cancellation comes too late."""

    url: str
    config: VmConfig
    arrived: trio.Event = attrs.field(factory=trio.Event)
    fails: BaseException | None = None
    guard: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def committed(self) -> bool:
        return self.guard.shield

    async def receive(self) -> FakeVm:
        with self.guard:
            await self.arrived.wait()
        if self.fails is not None:
            raise self.fails
        vm = FakeVm(self.config)
        vm.state = VmState.RUNNING
        return vm


@attrs.define(eq=False)
class Stage:
    """What a test holds: the service, its socket, and the doubles made so far."""

    vmm: Vmm
    path: str
    vms: list[FakeVm]
    incoming: list[FakeIncoming]


@asynccontextmanager
async def open_stage(
    monkeypatch: Any, folder: Path, config: VmConfig, *, options: VmmOptions | None = None, **limits: float
) -> AsyncIterator[Stage]:
    """A Vmm on doubles behind a real server on a real socket."""
    vms: list[FakeVm] = []
    incoming: list[FakeIncoming] = []

    @asynccontextmanager
    async def fake_open_vm(config: VmConfig, **_: Any) -> AsyncIterator[FakeVm]:
        if config.payload.kernel == "/refused":
            raise ConfigError("payload.kernel", "/refused", "is refused", "give another")
        vm = FakeVm(config)
        vms.append(vm)
        try:
            yield vm
        finally:
            vm.closed = True

    @asynccontextmanager
    async def fake_open_incoming(url: str, **_: Any) -> AsyncIterator[FakeIncoming]:
        made = FakeIncoming(url, config)
        incoming.append(made)
        yield made

    monkeypatch.setattr("trivmm.vmm.service.open_vm", fake_open_vm)
    monkeypatch.setattr("trivmm.vmm.moves.open_incoming", fake_open_incoming)
    path = str(folder / "api.sock")
    deadlines = Deadlines(**limits)
    hypervisor = FakeHypervisor()
    async with (
        open_vmm(hypervisor, deadlines=deadlines, options=options) as vmm,
        open_server(path, Router(vmm), deadlines),
    ):
        yield Stage(vmm, path, vms, incoming)


def command_environment() -> dict[str, str]:
    """For a ``python -m trivmm`` in another folder: the trivmm that this process runs, installed or not."""
    return {**os.environ, "PYTHONPATH": str(Path(trivmm.__file__).parent.parent)}


class ChRemoteError(Exception):
    """What ch-remote reports: the status that it understood and the body's text."""

    def __init__(self, status: int, body: str | None) -> None:
        self.status = status
        self.body = body
        super().__init__(f"{status}: {body}")


def ch_remote(path: str, method: str, command: str, body: str | None = None, *, read: int = 256) -> str | None:
    """One request as Cloud Hypervisor's own client sends it and reads its answer: several writes, a plain search for
    ``HTTP/1.1``, for the header spelled ``Content-Length: ``, up to the next CR, text decoded read by read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # Blocking, as its own: with a timeout of Python's a backlog that is full for a moment is EAGAIN.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 20, 0))
        sock.connect(path)
        sock.settimeout(20)
        sock.sendall(f"{method} /api/v1/{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n".encode())
        if body is not None:
            sock.sendall(f"Content-Length: {len(body)}\r\n".encode())
        sock.sendall(b"\r\n")
        if body is not None:
            sock.sendall(body.encode())
        return _ch_answer(lambda: sock.recv(read))


def _ch_answer(read: Callable[[], bytes]) -> str | None:
    text, start, length = "", None, None
    while True:
        piece = read()
        if not piece:
            break
        text += piece.decode()  # strict: a character cut in two is a panic there
        if (end := text.find("\r\n\r\n")) >= 0:
            start = end + 4
            at = text.find("Content-Length: ")
            if at < 0:
                break
            length = int(text[at + 16 : text.index("\r", at)].strip())
        if start is not None and length is not None and len(text) >= start + length:
            break
    body = None if length is None or start is None else text[start:]
    at = text.index("HTTP/1.1")
    status = int(text[at + 9 : text.index("\r", at)].strip())
    if status not in (100, 200, 204):
        raise ChRemoteError(status, body)
    return body
