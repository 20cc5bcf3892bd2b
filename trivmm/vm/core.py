"""What every part of a VM's API stands on: its state, its owner, its machine, and its end."""

from __future__ import annotations

import enum
from typing import Any, Final

import attrs
import trio

from trivmm.config import VmConfig
from trivmm.console import ConsoleCursor
from trivmm.deadlines import Deadlines
from trivmm.errors import GuestCrash, IllegalTransition, WrongState
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.machine.host import MachineHost
from trivmm.machine.machine import Machine
from trivmm.migration.progress import MigrationProgress
from trivmm.migration.source.doubt import Doubt
from trivmm.nursery.ownership import MIGRATION, Ownership
from trivmm.vm.triplefaults import TripleFaults

__all__ = ["ExitReason", "VmCore", "VmState"]


class VmState(enum.Enum):
    """As Cloud Hypervisor spells them. A VM in doubt is ``PAUSED`` with ``Vm.in_doubt`` set."""

    CREATED = "Created"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"


_S = VmState
TRANSITIONS: Final[dict[VmState, frozenset[VmState]]] = {
    _S.CREATED: frozenset({_S.RUNNING, _S.PAUSED, _S.SHUTDOWN}),  # PAUSED: one that came so
    _S.RUNNING: frozenset({_S.RUNNING, _S.PAUSED, _S.SHUTDOWN}),  # RUNNING again: a reboot
    _S.PAUSED: frozenset({_S.RUNNING, _S.PAUSED, _S.SHUTDOWN}),  # PAUSED again: in doubt, or out of it
    _S.SHUTDOWN: frozenset({_S.RUNNING, _S.SHUTDOWN}),
}


@attrs.frozen
class ExitReason:
    """Why a VM ended: ``kind`` is ``poweroff`` (the guest), ``shutdown`` (you), ``migrated`` or ``crash``."""

    kind: str
    crash: GuestCrash | None = None


@attrs.define(eq=False)
class VmCore:
    """State and ownership of one VM. Use from one trio program."""

    config: VmConfig
    hypervisor: Hypervisor
    _nursery: trio.Nursery
    events: EventBus = attrs.field(factory=EventBus)
    state: VmState = attrs.field(default=VmState.CREATED, init=False)
    doubt: Doubt | None = attrs.field(default=None, init=False)
    migration_progress: MigrationProgress | None = attrs.field(default=None, init=False)
    reboots: int = attrs.field(default=0, init=False)
    ownership: Ownership = attrs.field(
        default=attrs.Factory(lambda self: Ownership(self.deadlines), takes_self=True), init=False
    )
    host: MachineHost = attrs.field(default=attrs.Factory(lambda self: self._make_host(), takes_self=True), init=False)
    _activated: int = attrs.field(default=0, init=False)  # device activations so far
    _exit: ExitReason | None = attrs.field(default=None, init=False)
    _exited: trio.Event = attrs.field(factory=trio.Event, init=False)
    _asked: trio.Event = attrs.field(factory=trio.Event, init=False)  # the guest wants something of its owner
    _migration: trio.CancelScope | None = attrs.field(default=None, init=False)
    _triple_faults: TripleFaults = attrs.field(factory=TripleFaults, init=False)
    _console: ConsoleCursor | None = attrs.field(default=None, init=False)  # where wait_for_console goes on

    def _make_host(self) -> MachineHost:
        return MachineHost(
            self.hypervisor,
            self.deadlines,
            self._nursery,
            self._tell_of_device,
            self._ask_owner,
            self._tell_of_removal,
            lambda word: self.events.emit("guest", "panic", event=word),
        )

    @property
    def deadlines(self) -> Deadlines:
        return self.config.deadlines

    @property
    def in_doubt(self) -> bool:
        """PAUSED after a migration, and nobody knows whether it runs at the destination (or its image locks are
        gone): see :meth:`Vm.resume` and :meth:`Vm.resolve_migration`."""
        return self.doubt is not None

    @property
    def migrating(self) -> bool:
        return self.ownership.holder == MIGRATION

    @property
    def on_paper(self) -> bool:
        """Of the VM there is only a configuration: it is not booted, and nobody is about to."""
        return self.host.empty and self.ownership.holder is None

    @property
    def stuck(self) -> tuple[str, ...]:
        """Threads that outlived their deadline, by name; a process that has some leaves by ``os._exit``."""
        return self.host.stuck

    def info(self) -> dict[str, Any]:
        """JSON-able: state, RAM less what the guest says is in its balloon, vCPU states; while there is a machine, its
        ``Board.device_tree``."""
        machine = self.host.machine
        tree = {} if machine is None else {"device_tree": machine.board.device_tree()}
        balloon = None if machine is None else machine.board.balloon
        given = 0 if balloon is None else balloon.given_bytes
        return {
            "state": self.state.value,
            "in_doubt": self.in_doubt,
            "hypervisor": self.hypervisor.name,
            "memory_actual_size": max(0, self.config.memory.size - given),
            "vcpus": [] if machine is None else [vcpu.state.value for vcpu in machine.vcpus.vcpus],
            **tree,
            **({} if self.doubt is None else {"doubt": self.doubt.told()}),
        }

    def counters(self) -> dict[str, dict[str, int]]:
        return {} if self.host.machine is None else self.host.machine.board.counters()

    async def wait(self) -> ExitReason:
        """Wait until the VM has ended (see :class:`ExitReason`). Bounded by the caller."""
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    # --- for the verbs ---------------------------------------------------------------------------------------

    def _tell(self, event: str, **properties: str) -> None:
        self.events.emit("vm", event, **properties)

    def _tell_of_device(self, event: str, device: str, generation: int, **properties: str) -> None:
        self._activated += event == "activated"
        self.events.emit("virtio-device", event, id=device, generation=str(generation), **properties)

    def _tell_of_removal(self, name: str, bdf: str) -> None:
        self._tell("device-removed", id=name, bdf=bdf)

    def _ask_owner(self) -> None:
        self._asked.set()

    def _enter(self, target: VmState) -> None:
        """The one place where the state changes."""
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition("the VM", self.state.value, target.value)
        self.state = target

    def _machine_in(self, operation: str, *states: VmState) -> Machine:
        if self.host.machine is None or self.state not in states:
            raise WrongState(operation, self.state.value, " or ".join(state.value for state in states))
        return self.host.machine

    def _finish(self, reason: ExitReason) -> None:
        ran = self.state in (VmState.RUNNING, VmState.PAUSED)
        self._enter(VmState.SHUTDOWN)
        self.doubt = None
        if self._exit is None:
            self._exit = reason
            self._exited.set()
            if ran and reason.kind != "migrated":
                self._tell("shutdown", reason=reason.kind)
