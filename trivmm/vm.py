"""The embedding API: a VM is an object in a trio program, with a scope.

::

    async with open_vm(config) as vm:            # builds nothing yet; checks nothing that boot would not
        await vm.boot()
        await vm.wait_for_console("login:")
        report = await vm.migrate_to("unix:/run/b.sock")

    async with open_incoming("unix:/run/b.sock") as incoming:
        vm = await incoming.receive()
        reason = await vm.wait()

The VM nursery lives from ``open_vm`` to the end of its block. Whatever ends the block (return, error, cancellation),
the owner ends first (a migration is cancelled and rolled back), then the vCPUs, then the devices, each within its
deadline. An error raised in the block leaves it as it is, not wrapped in a group.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from trivmm.config import CpusConfig, VmConfig
from trivmm.console import ConsoleCursor, ConsoleMatch, ConsolePattern, bytes_pattern
from trivmm.deadlines import Deadlines
from trivmm.errors import GuestCrash, MigrationCancelled, MigrationInDoubt, NotSupported, PastCommit, WrongState
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.machine.board import Board, build_board, check_board, close_sinks, open_sinks
from trivmm.machine.machine import Machine, open_machine
from trivmm.migration.doubt import Doubt, Resolution
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.sender import send, socket_dialer
from trivmm.migration.transports import Dialer
from trivmm.nursery.kernel import KernelCalls
from trivmm.nursery.ownership import MIGRATION, Ownership
from trivmm.platform.line import Line
from trivmm.platform.sinks import Sink

__all__ = ["ExitReason", "Vm", "VmState", "open_vm", "vm_scope"]

logger = logging.getLogger(__name__)

Dial = Callable[[str, Deadlines], Dialer]


class VmState(enum.Enum):
    """As Cloud Hypervisor spells them. A VM in doubt is ``PAUSED`` with ``Vm.in_doubt`` set."""

    CREATED = "Created"
    RUNNING = "Running"
    PAUSED = "Paused"
    SHUTDOWN = "Shutdown"


@attrs.frozen
class ExitReason:
    """Why a VM ended: ``kind`` is ``poweroff`` (the guest), ``shutdown`` (you), ``migrated`` or ``crash``."""

    kind: str
    crash: GuestCrash | None = None


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@attrs.define(eq=False)
class Vm:
    """One VM, from :func:`open_vm` (or ``open_incoming``) to the end of that block. Use from one trio program."""

    config: VmConfig
    hypervisor: Hypervisor
    _nursery: trio.Nursery
    events: EventBus = attrs.field(factory=EventBus)
    state: VmState = attrs.field(default=VmState.CREATED, init=False)
    doubt: Doubt | None = attrs.field(default=None, init=False)
    migration_progress: MigrationProgress | None = attrs.field(default=None, init=False)
    ownership: Ownership = attrs.field(
        default=attrs.Factory(lambda self: Ownership(self.deadlines), takes_self=True), init=False
    )
    kernel: KernelCalls = attrs.field(
        default=attrs.Factory(lambda self: KernelCalls(self.deadlines, self.hypervisor.threads), takes_self=True),
        init=False,
    )
    reboots: int = attrs.field(default=0, init=False)
    _activated: int = attrs.field(default=0, init=False)  # device activations so far
    _machine: Machine | None = attrs.field(default=None, init=False)
    _machine_ended: trio.Event = attrs.field(factory=_set_event, init=False)  # everything of it is closed and freed
    _end_machine: trio.Event = attrs.field(factory=trio.Event, init=False)
    _exit: ExitReason | None = attrs.field(default=None, init=False)
    _exited: trio.Event = attrs.field(factory=trio.Event, init=False)
    _asked: trio.Event = attrs.field(factory=trio.Event, init=False)
    _migration: trio.CancelScope | None = attrs.field(default=None, init=False)
    _closing: bool = attrs.field(default=False, init=False)
    _last_board: Board | None = attrs.field(default=None, init=False)
    _console: ConsoleCursor | None = attrs.field(default=None, init=False)  # where wait_for_console goes on
    _new_board: trio.Event = attrs.field(factory=trio.Event, init=False)  # set, and replaced, with every board

    # --- reading: always possible ----------------------------------------------------------------------------

    @property
    def deadlines(self) -> Deadlines:
        return self.config.deadlines

    @property
    def hypervisor_name(self) -> str:
        return self.hypervisor.name

    @property
    def in_doubt(self) -> bool:
        """PAUSED after a migration, and nobody knows whether it runs at the destination (or its image locks are
        gone): see :meth:`resume` and :meth:`resolve_migration`."""
        return self.doubt is not None

    @property
    def migrating(self) -> bool:
        return self.ownership.holder == MIGRATION

    @property
    def on_paper(self) -> bool:
        """Of the VM there is only a configuration: it is not booted, and nobody is about to."""
        return self._machine is None and self._machine_ended.is_set() and self.ownership.holder is None

    @property
    def stuck(self) -> tuple[str, ...]:
        """Threads that outlived their deadline, by name; a process that has some leaves by ``os._exit``."""
        board = () if self._last_board is None else tuple(self._last_board.stuck)
        return board + self.kernel.stuck

    @property
    def console_tail(self) -> bytes:
        """The last mebibyte of serial output."""
        return b"" if self._last_board is None else self._last_board.serial.tail()

    def _tell(self, event: str, **properties: str) -> None:
        self.events.emit("vm", event, **properties)

    def _tell_of_device(self, event: str, device: str, generation: int) -> None:
        self._activated += event == "activated"
        self.events.emit("virtio-device", event, id=device, generation=str(generation))

    def info(self) -> dict[str, Any]:
        """JSON-able: state, RAM in use, vCPU states; while there is a machine, its ``Board.device_tree``."""
        machine = self._machine
        tree = {} if machine is None else {"device_tree": machine.board.device_tree()}
        return {
            "state": self.state.value,
            "in_doubt": self.in_doubt,
            "hypervisor": self.hypervisor.name,
            "memory_actual_size": self.config.memory.size,
            "vcpus": [] if machine is None else [vcpu.state.value for vcpu in machine.vcpus.vcpus],
            **tree,
            **({} if self.doubt is None else {"doubt": self.doubt.told()}),
        }

    def counters(self) -> dict[str, dict[str, int]]:
        return {} if self._machine is None else self._machine.board.counters()

    async def wait_for_console(self, pattern: ConsolePattern, *, rewind: bool = False) -> ConsoleMatch:
        """Wait until the serial console has printed ``pattern``: text, bytes, or a compiled regular expression.

        A wait begins where the last one's match ended: a second identical one waits for a second text. A boot brings a
        new console, read from its start; where the guest reboots by itself, what it had said before comes first.
        ``rewind`` begins at the start of the console that there is now. Only the last mebibyte is kept: what was
        printed before it is not found. An expression matches as soon as it can (``t=[0-9]+`` in the middle of a
        number): end it with what comes after.

        Bounded by the caller. :raises WrongState: when the VM ends without having printed it. :raises ConfigError:
        for a pattern that can't be."""
        wanted = bytes_pattern(pattern)
        await trio.lowlevel.checkpoint()
        cursor = self._newest_console() if rewind or self._console is None else self._console
        if rewind and cursor is not None:
            cursor.at = 0
        at = 0 if cursor is None else cursor.at  # ours: a wait that ends meanwhile takes nothing from this one
        while True:
            found = None if cursor is None else cursor.find(wanted, at)
            if found is not None:
                return found
            newest = self._newest_console()
            if cursor is not newest:
                cursor, at = newest, 0
            elif self._exited.is_set():
                shown = getattr(pattern, "pattern", pattern)
                raise WrongState(f"wait for {shown!r} on the console", self.state.value, "running until it prints that")
            else:
                await self.console_output()

    def _newest_console(self) -> ConsoleCursor | None:
        """The cursor of the console that there is now, from which the next wait goes on."""
        if self._last_board is not None and (
            self._console is None or self._console.console is not self._last_board.serial
        ):
            self._console = ConsoleCursor(self._last_board.serial)
        return self._console

    async def console_output(self) -> None:
        """Wait until the serial console prints something more, or the VM ends. Bounded by the caller."""
        board = self._last_board
        seen = 0 if board is None else board.serial.total

        async with trio.open_nursery() as nursery:

            async def until(wait: Callable[[], Any]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, self._exited.wait)
            nursery.start_soon(until, self._new_board.wait)  # a reboot brings a new console
            if board is not None:
                nursery.start_soon(until, board.serial.subscribe(seen).receive)

    def console_input(self, data: bytes, line: str = "serial") -> int:
        """Type on the serial port, or on the ``console``: as many bytes as find room at once, which it gives; the rest
        is dropped.

        :raises WrongState: when nothing runs, or it has no such line."""
        return self._line(line).push_input(data)

    async def feed_console(self, data: bytes, line: str = "serial") -> None:
        """Type all of ``data``, as the guest makes room for it. Bounded by the caller.

        :raises WrongState: as :meth:`console_input`."""
        await self._line(line).feed(data)

    def _line(self, name: str) -> Line:
        lines = {} if self._machine is None else self._machine.board.lines
        if name not in lines:
            raise WrongState(f"input on the {name} line", self.state.value, "booted, and to have one")
        return lines[name]

    @property
    def pty_paths(self) -> dict[str, str]:
        """Where the lines (``serial``, ``console``) that are pseudo-terminals can be opened: from boot (or, where a
        migration brought the VM, from its COMMIT) to the end, over reboots."""
        return {} if self._last_board is None else self._last_board.pty_paths

    def terminal_resized(self) -> None:
        """The terminal that a virtio console is shown on may have another size now: the guest is told."""
        if self._machine is not None and self._machine.board.console is not None:
            self._machine.board.console.measure()

    async def wait(self) -> ExitReason:
        """Wait until the VM has ended (see :class:`ExitReason`). Bounded by the caller."""
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    # --- verbs: need the lease -------------------------------------------------------------------------------

    def _machine_in(self, operation: str, *states: VmState) -> Machine:
        if self._machine is None or self.state not in states:
            raise WrongState(operation, self.state.value, " or ".join(state.value for state in states))
        return self._machine

    async def boot(self) -> None:
        """Build the machine, load the kernel, start the vCPUs.

        :raises ConfigError: naming the field, the value and the remedy; nothing is left behind."""
        async with self.ownership.lease("boot"):
            if self.state not in (VmState.CREATED, VmState.SHUTDOWN) or self._machine is not None:
                raise WrongState("boot", self.state.value, "Created or Shutdown")
            self._tell("booting")
            await self._end()  # of a machine that ended by itself, if that still goes on
            await self._boot()
            self._console = None
            self._tell("booted")

    async def _reboot(self) -> None:
        """End the machine and build it anew; the sinks of its console lines, and their clients, stay."""
        assert self._machine is not None
        self._tell("rebooting")
        sinks = self._machine.board.keep_sinks()
        try:
            await self._end()
            await self._boot(sinks)
        except BaseException:
            close_sinks(sinks)
            raise

    async def _boot(self, sinks: Mapping[str, Sink] | None = None) -> None:
        board = await self._build(sinks)
        try:
            await self._in_pieces(board.load_payload)  # seconds, where the kernel is to be unpacked
            machine = await self._run(board)
        except BaseException:
            await self._discard(board)  # noqa: ASYNC102 - shields and bounds itself
            raise
        self.config = board.config_as_built()
        try:
            await machine.resume()
        except BaseException:
            await self._end()  # noqa: ASYNC102 - shields and bounds itself
            raise
        self._exit = None
        if self._exited.is_set():  # else somebody may wait on it already: since before boot, or since before a reboot
            self._exited = trio.Event()
        self.state = VmState.RUNNING
        self.doubt = None  # its board took the locks afresh

    async def _build(self, kept: Mapping[str, Sink] | None = None, *, incoming: bool = False) -> Board:
        """A board that this VM has to close. What is ``kept`` of the one before is closed when it fails, too."""
        config = self.config
        check_board(config, self.hypervisor)
        sinks = {} if incoming else open_sinks(config, kept)

        def work() -> Board:
            return build_board(config, self.hypervisor, on_event=self._tell_of_device, incoming=incoming, sinks=sinks)

        try:
            board = await self.kernel.call("building the machine", work, late=Board.close)
        except BaseException:
            close_sinks(sinks)
            raise
        board.own_sinks()
        return board

    async def _discard(self, board: Board) -> None:
        """Close it, in bounded time. Idempotent."""
        board.disconnect()
        with trio.move_on_after(self.deadlines.free, shield=True):
            await self._aside(board.free, abandon=True)  # nothing of the VM looks at the board any more

    async def _run(self, board: Board, *, gate_open: bool = True) -> Machine:
        """Start the machine's task in the VM nursery; it owns ``board`` once this returns."""
        self._end_machine, self._machine_ended = trio.Event(), trio.Event()
        try:
            machine: Machine = await self._nursery.start(self._machine_task, board, gate_open)
        except RuntimeError as error:
            self._machine_ended.set()
            if self._closing:  # its nursery is closed: it ended during the boot
                raise WrongState("boot", "at its end", "there until it has booted") from error
            raise
        except BaseException:
            self._machine_ended.set()
            raise
        self._machine, self._last_board = machine, board
        self._new_board.set()
        self._new_board = trio.Event()
        return machine

    async def _machine_task(
        self, board: Board, gate_open: bool, *, task_status: trio.TaskStatus[Machine] = trio.TASK_STATUS_IGNORED
    ) -> None:
        end, ended = self._end_machine, self._machine_ended
        try:
            async with open_machine(
                board, self.deadlines, gate_open=gate_open, kernel=self.kernel, on_guest_request=self._asked_set
            ) as machine:
                task_status.started(machine)
                # If start() was cancelled meanwhile it waits for this task: leave before the shield, not after.
                await trio.lowlevel.checkpoint_if_cancelled()
                # Shielded: when the VM nursery is cancelled, the owner (a migration) must roll back on a machine
                # that still works; close() then ends it. Bounded by close(), which always sets the event.
                with trio.CancelScope(shield=True):
                    await end.wait()
        finally:
            if ended is self._machine_ended:
                self._machine = None
            try:
                await self._discard(board)  # noqa: ASYNC102 - shields and bounds itself
            finally:
                ended.set()

    async def _aside(self, work: Callable[[], None], *, abandon: bool = False) -> None:
        """Off the trio thread; in it under virtual time, whose clock would jump meanwhile."""
        if self.hypervisor.threads:
            mine = trio.CapacityLimiter(1)  # nobody else's threads in its way
            await trio.to_thread.run_sync(work, limiter=mine, abandon_on_cancel=abandon)
        else:
            work()

    async def _in_pieces(self, work: Callable[[Callable[[], None]], None]) -> None:
        """The same, for work that calls back between two pieces: there a cancellation ends it."""
        between = trio.from_thread.check_cancelled if self.hypervisor.threads else lambda: None
        await self._aside(lambda: work(between))

    async def _end(self) -> None:
        """End the machine, if there is one. Shielded, bounded inside by vcpu_stop, device_stop and quiesce."""
        if self._machine_ended.is_set():
            return
        with trio.CancelScope(shield=True):
            self._end_machine.set()
            with trio.move_on_after(4 * self.deadlines.shutdown_grace) as scope:
                await self._machine_ended.wait()
            if scope.cancelled_caught:
                logger.critical("the machine did not end: %s", "; ".join(self.stuck) or "a thread is stuck")
            self._machine = None

    def _finish(self, reason: ExitReason) -> None:
        ran, self.state = self.state in (VmState.RUNNING, VmState.PAUSED), VmState.SHUTDOWN
        self.doubt = None
        if self._exit is None:
            self._exit = reason
            self._exited.set()
            if ran and reason.kind != "migrated":
                self._tell("shutdown", reason=reason.kind)

    async def pause(self) -> None:
        """Stop the vCPUs. Devices finish what was queued. :raises PauseTimeout: the VM runs."""
        async with self.ownership.lease("pause"):
            machine = self._machine_in("pause", VmState.RUNNING)
            self._tell("pausing")
            await machine.pause()
            self.state = VmState.PAUSED
            self._tell("paused")

    async def resume(self, *, force: bool = False) -> None:
        """Run again. A VM in doubt asks its destination first (at most ``resolve``), then takes its image locks.

        ``force`` runs it although the destination does not answer, or does not know. If the VM runs there after all,
        two copies run: nothing but the image locks is left to keep them apart, and a VM without a writable image, or
        with a copy of it on each side, has none. It never overrides an answer.

        :raises RunsElsewhere: the destination says that it runs the VM.
        :raises MigrationInDoubt: nobody knows, and ``force`` was not said.
        :raises ConfigError: another process has the image locks: the VM runs elsewhere."""
        async with self.ownership.lease("resume"):
            machine = self._machine_in("resume", VmState.PAUSED)
            await self._out_of_doubt(machine, "resume", force)
            self._tell("resuming")
            await machine.resume()
            self.state = VmState.RUNNING
            if machine.guest_request is not None:
                self._asked_set()  # it came while nobody carried it out: in doubt, or in the moment of the pause
            self._tell("resumed")

    async def _out_of_doubt(self, machine: Machine, operation: str, force: bool) -> None:
        if self.doubt is not None:
            self.doubt = await self.doubt.look(self.deadlines)
            self.doubt.check(operation, force)
            await machine.take_locks()
            self.doubt = None

    async def shutdown(self) -> None:
        """Power off: vCPUs, then devices, end. The configuration stays; ``boot`` starts afresh."""
        async with self.ownership.lease("shutdown"):
            self._machine_in("shutdown", VmState.RUNNING, VmState.PAUSED)
            await self._end()
            self._finish(ExitReason("shutdown"))

    async def reboot(self) -> None:
        """Power off and boot afresh, keeping the sinks of the console lines. In doubt as :meth:`resume`."""
        async with self.ownership.lease("reboot"):
            machine = self._machine_in("reboot", VmState.RUNNING, VmState.PAUSED)
            await self._out_of_doubt(machine, "reboot", force=False)
            try:
                await self._reboot()
            except BaseException:
                self._finish(ExitReason("shutdown"))
                raise
            self._console = None  # you asked: what the machine before it said is of the past
            self.reboots += 1
            self._tell("rebooted")

    async def nmi(self) -> None:
        """Give every vCPU a non-maskable interrupt, which a paused VM takes when it resumes.

        :raises PauseTimeout: a vCPU could not be stopped for it; nobody got one, the VM runs."""
        async with self.ownership.lease("nmi"):
            await self._machine_in("nmi", VmState.RUNNING, VmState.PAUSED).nmi()

    async def power_button(self) -> None:
        """Press the ACPI power button. What comes of it is the guest's affair: a usual one powers off."""
        async with self.ownership.lease("power-button"):
            self._machine_in("power-button", VmState.RUNNING, VmState.PAUSED).power_button()

    async def resize(self, vcpus: int | None = None, ram: int | None = None, balloon: int | None = None) -> None:
        """What is None, or what is so already, stays. A VM that was never booted takes the new numbers on paper.

        :raises NotSupported: hotplug of vCPUs and memory, and a balloon, are not there yet.
        :raises ConfigError: a number that can't be."""
        async with self.ownership.lease("resize"):
            cpus, memory = self.config.cpus, self.config.memory
            if balloon is not None:
                raise NotSupported("desired_balloon", balloon, "there is no balloon yet", "leave it out")
            if vcpus is not None and vcpus != cpus.boot_vcpus:
                cpus = CpusConfig(vcpus, max(vcpus, cpus.max_vcpus))
                self._refuse_hotplug("desired_vcpus", vcpus, self.config.cpus.boot_vcpus)
            if ram is not None and ram != memory.size:
                memory = attrs.evolve(memory, size=ram)
                self._refuse_hotplug("desired_ram", ram, self.config.memory.size)
            self._tell("resizing")
            self.config = attrs.evolve(self.config, cpus=cpus, memory=memory)
            self._tell("resized")

    def _refuse_hotplug(self, field: str, wanted: int, have: int) -> None:
        if self._machine is not None:
            raise NotSupported(field, wanted, "a booted VM can't be resized yet", f"shut it down first, or give {have}")

    # --- migration -------------------------------------------------------------------------------------------

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
        :raises VmMigrating: another migration owns the VM."""
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

        async with self.ownership.lease(MIGRATION):
            machine = self._machine_in("migrate", VmState.RUNNING, VmState.PAUSED)
            if self.in_doubt:
                raise WrongState("migrate", "Paused, in doubt", "resolved, resumed or shut down by you first")
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
                self.state, self.doubt = VmState.PAUSED, Doubt(url, error.session, str(error), dialer)
                machine.running = False
                self._tell("migration-failed", outcome="in doubt", reason=str(error))
                raise
            except BaseException as error:
                cancelled = not isinstance(error, Exception) or isinstance(error, MigrationCancelled)
                self._tell("migration-failed", outcome="cancelled" if cancelled else "failed", reason=str(error))
                raise
            finally:
                self._migration = None
            await self._end()
            self._finish(ExitReason("migrated"))
            self._tell("migration-finished")
            return report

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
                await self._end()
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

    # --- the control loop ------------------------------------------------------------------------------------

    def _asked_set(self) -> None:
        self._asked.set()

    async def _control(self) -> None:
        """Carries out what the guest asks for. It needs the lease, so a migration in progress comes first: then the
        request travels with the VM, and the side that ends up running it carries it out."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            async with self.ownership.lease("guest request", wait_for_migration=True):
                machine = self._machine
                if machine is None or machine.guest_request is None or self.in_doubt:
                    continue
                request = machine.guest_request
                if self.state is VmState.PAUSED and request.kind != "crash":
                    continue  # resume() asks again: a paused VM neither reboots nor goes away by itself
                logger.info("the guest asks for %s (%s)", request.kind, request.why)
                crash = machine.crash
                if request.kind == "reset":
                    try:
                        await self._reboot()
                    except Exception as error:
                        logger.error("reboot failed: %s", error)
                        self._finish(ExitReason("crash", GuestCrash(0, f"its reboot failed: {error}", "")))
                    else:
                        self.reboots += 1
                        self._tell("rebooted")
                    continue
                await self._end()
                if request.kind == "crash":
                    self._finish(ExitReason("crash", crash or GuestCrash(0, request.why, "")))
                else:
                    self._finish(ExitReason("poweroff"))

    async def _close(self) -> None:
        """The bounded end: owner, vCPUs, devices. Shielded by the caller."""
        self._closing = True
        if self._machine is not None:
            self._machine.ending = True
        if self._migration is not None:
            self._migration.cancel()  # past COMMIT it does not hear that
            with trio.move_on_after(self.deadlines.rollback + self.deadlines.commit):
                await self.ownership.free()
        await self._end()
        self._finish(ExitReason("shutdown"))

    # --- for open_incoming -----------------------------------------------------------------------------------

    def tell_of_receiving(self, event: str, **properties: str) -> None:
        """``ready``: listening; ``started``: a source came; ``failed``: nothing runs here."""
        self._tell(f"migration-receive-{event}", **properties)

    async def build_for_migration(self, config: VmConfig, setup: dict[str, Any]) -> Machine:
        """Build the machine that a sender describes, parked: RAM, memslots, devices, vCPU threads.

        :raises ConfigError: when this host can't, naming the field."""
        self.config = config
        self.ownership.deadlines = self.kernel.deadlines = config.deadlines
        board = await self._build(incoming=True)
        self.config = board.config_as_built()
        try:
            board.check_setup(setup)
            await self._in_pieces(board.check_payload)
            return await self._run(board, gate_open=False)
        except BaseException:
            await self._discard(board)  # noqa: ASYNC102 - shields and bounds itself
            raise

    async def abandon(self) -> None:
        """The migration failed before its verdict: what was built goes, the VM never ran."""
        await self._end()

    def adopt(self) -> None:
        """The machine that a migration brought runs here now (or stays paused, as it was sent)."""
        assert self._machine is not None
        self.state = VmState.RUNNING if self._machine.running else VmState.PAUSED
        self._tell("migration-receive-finished")


@asynccontextmanager
async def vm_scope(
    config: VmConfig, hypervisor: Hypervisor, events: EventBus | None = None
) -> AsyncIterator[tuple[Vm, trio.Nursery]]:
    """The VM nursery with its control loop, and the bounded end. What the body raises leaves it unwrapped.

    ``events`` None makes a bus that ends with the VM; one that is given is its owner's to close."""
    bus = EventBus() if events is None else events
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        vm = Vm(config, hypervisor, nursery, bus)
        nursery.start_soon(vm._control, name="control loop")
        try:
            yield vm, nursery
        except trio.Cancelled:
            raise
        except BaseException as error:
            failure = error  # raised again outside the nursery, so that it isn't wrapped in a group
        finally:
            with trio.CancelScope(shield=True):  # bounded inside, see _close
                await vm._close()
            if events is None:
                bus.close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def open_vm(
    config: VmConfig,
    *,
    hypervisor: Hypervisor | None = None,
    events: EventBus | None = None,
) -> AsyncIterator[Vm]:
    """A VM for the length of the block, in state CREATED. ``hypervisor`` None chooses by the host.

    What happens is told on ``vm.events``: ``with vm.events.subscribe() as events: async for event in events: …``; it
    ends with the block, unless ``events`` is a bus of yours.

    :raises HypervisorError: / :raises ConfigError: when the host cannot; nothing is left behind."""
    chosen = hypervisor if hypervisor is not None else choose_hypervisor("auto")
    try:
        async with vm_scope(config, chosen, events) as (vm, _):
            yield vm
    finally:
        if hypervisor is None:
            chosen.close()
