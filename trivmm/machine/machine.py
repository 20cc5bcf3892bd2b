"""The machine as its owner sees it: a built board with its tasks.

:class:`Machine` pauses, resumes, closes the device gate and undoes all of it; so it implements both migration ports
(``trivmm.migration.port``). :func:`open_machine` houses it in the nursery tree (``trivmm.nursery.tree``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import trio

from trivmm.bus.space import GuestRequest
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, GuestCrash, HypervisorError, MigrationError, TrivmmError
from trivmm.machine.board import Board
from trivmm.machine.disks import Disks
from trivmm.machine.gate import Gate
from trivmm.machine.hotplug import Hotplug
from trivmm.machine.interrupts import Interrupts
from trivmm.machine.saved import describe, load_state, save_board
from trivmm.memory.dirty_log import DirtyLog, HostWriters
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.kernel import KernelCalls
from trivmm.nursery.tree import Actor, open_tree
from trivmm.nursery.vcpu import Vcpu
from trivmm.nursery.vcpus import VcpuSet
from trivmm.platform.line import Line
from trivmm.state.machine import Barrier, BarrierKind, MachineState, PendingReset, SavedVcpu
from trivmm.state.stage import Ladder, Rung, Stage

__all__ = ["Machine", "open_machine"]

logger = logging.getLogger(__name__)

ATTACH_TRIES: Final = 5  # of the kernel, whose answer may be another one a moment later


@attrs.define(eq=False)
class Machine:
    """A built board with its tasks. ``wanted`` says what the owner wants, ``stage`` how far it is stopped.

    ``on_guest_request()`` is called in the trio thread when the guest asked for a reset or power-off, or crashed;
    ``on_removed(id, bdf)`` when it has ejected a device, and that is gone.
    """

    board: Board
    deadlines: Deadlines
    kernel: KernelCalls
    storage: KernelCalls
    on_guest_request: Callable[[], None] = lambda: None
    vcpu_type: type[Vcpu] = Vcpu
    on_removed: Callable[[str, str], None] = lambda name, bdf: None
    wanted: Stage = attrs.field(default=Stage.PAUSED, init=False)  # by its owner: RUNNING or PAUSED
    guest_request: GuestRequest | None = attrs.field(default=None, init=False)
    crash: GuestCrash | None = attrs.field(default=None, init=False)
    fault: GuestCrash | None = attrs.field(default=None, init=False)  # why the guest asks for a reset unasked
    vcpus: VcpuSet = attrs.field(default=attrs.Factory(lambda self: self._vcpus(), takes_self=True), init=False)
    interrupts: Interrupts = attrs.field(
        default=attrs.Factory(
            lambda self: Interrupts(self.kernel, self.board.connect_interrupts, self.board.disconnect_interrupts),
            takes_self=True,
        ),
        init=False,
    )
    dirty_log: DirtyLog = attrs.field(
        default=attrs.Factory(
            lambda self: DirtyLog((HostWriters(self.board.memory), self.board.vm), self.kernel.call), takes_self=True
        ),
        init=False,
    )
    disks: Disks = attrs.field(
        default=attrs.Factory(lambda self: Disks(lambda: self.board.storages, self.storage), takes_self=True),
        init=False,
    )
    hotplug: Hotplug = attrs.field(
        default=attrs.Factory(
            lambda self: Hotplug(
                self.board, self.deadlines, self.kernel, self.storage, self.interrupts, self.on_removed
            ),
            takes_self=True,
        ),
        init=False,
    )
    gate: Gate = attrs.field(
        default=attrs.Factory(lambda self: Gate(self.board, self.hotplug.ejector, self.deadlines), takes_self=True),
        init=False,
    )
    ladder: Ladder = attrs.field(default=attrs.Factory(lambda self: self._ladder(), takes_self=True), init=False)
    _token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)

    def _vcpus(self) -> VcpuSet:
        return VcpuSet(self.board.cpus, self.board.bus, self, self.deadlines, self.vcpu_type)

    def _ladder(self) -> Ladder:
        async def nothing(at_most_s: float) -> None:
            """:meth:`save` takes the state."""

        async def thaw() -> None:
            self.board.thaw()

        async def stay_flushed() -> None:
            """What the guest writes next is cached again."""

        return Ladder(
            Stage.DETACHED,
            {
                Stage.PAUSED: Rung(self._pause_vcpus, self._resume_vcpus),
                Stage.GATED: Rung(self.gate.down, self.gate.up),
                Stage.DETACHED: Rung(self.interrupts.detach, self._attach),
                Stage.SAVED: Rung(nothing, thaw),
                Stage.FLUSHED: Rung(self._flush_disks, stay_flushed),
                Stage.UNLOCKED: Rung(self._give_locks, self._take_locks),
            },
        )

    @property
    def stage(self) -> Stage:
        return self.ladder.stage

    # --- what the nursery tree houses ------------------------------------------------------------------------

    @property
    def actors(self) -> Sequence[Actor]:
        return [*(slot.actor for slot in self.board.devices), self.hotplug.ejector]

    @property
    def lines(self) -> Mapping[str, Line]:
        return self.board.lines

    async def close_gate(self, at_most_s: float) -> None:
        """See :meth:`Gate.close`."""
        await self.gate.close(at_most_s)

    def note_stuck(self, why: str, *, in_use: bool = False) -> None:
        self.board.note_stuck(why, in_use=in_use)

    # --- from vCPU threads -----------------------------------------------------------------------------------

    def take_request(self, vcpu: int, request: GuestRequest) -> None:
        if request.details:
            self.fault = GuestCrash(vcpu, request.why, request.details)
            logger.warning("vcpu%d: %s\n%s", vcpu, request.why, request.details)
        self._token.run_sync_soon(self._note_request, request)

    def take_crash(self, error: GuestCrash) -> None:
        if self.crash is None:
            self.crash = error

    def take_failure(self, vcpu: Vcpu, error: Exception) -> None:
        """A vCPU's program ended with an error of ours. The VM can't go on, but its owner's program can."""
        logger.critical("%s: internal error, the VM stops: %s", vcpu.describe_wait(), error, exc_info=error)
        self.vcpus.request_pause()  # or the description waits for others of them
        self.take_crash(GuestCrash(vcpu.index, f"internal error: {error}", vcpu.describe_registers()))
        self._note_request(GuestRequest("crash", str(error)))

    def _note_request(self, request: GuestRequest) -> None:
        if self.guest_request is None or request.kind == "crash":
            self.guest_request = request
        self.vcpus.request_pause()  # the others stop too: the machine waits for its owner
        self.on_guest_request()

    # --- the owner's verbs -----------------------------------------------------------------------------------

    async def pause(self) -> None:
        """:raises PauseTimeout: naming who did not stop; the machine runs again."""
        try:
            await self.ladder.down(Stage.PAUSED, lambda: math.inf)
        except BaseException:
            await self.ladder.up(self.wanted)  # noqa: ASYNC102 - lets vCPUs go, and waits for nothing
            raise
        self.wanted = Stage.PAUSED

    async def resume(self) -> None:
        """Connect interrupts, open the gate, let the vCPUs go. Idempotent.

        :raises DeadlineError: (kernel) the interrupts are not connected: nothing runs."""
        await self.interrupts.attach()
        self.wanted = Stage.RUNNING
        await self.ladder.up(Stage.RUNNING)

    async def nmi(self) -> None:
        """Give every vCPU a non-maskable interrupt; a paused machine takes it when it resumes.
        :raises PauseTimeout: naming who did not stop for it; nobody got one, the machine runs.
        :raises HypervisorError: at the first vCPU that could not be given one; those before it have theirs."""
        before = self.stage
        try:
            await self.ladder.down(Stage.PAUSED, lambda: math.inf)  # a back end takes it only between two runs
            for vcpu in self.vcpus.vcpus:
                vcpu.cpu.inject_nmi()
        finally:
            await self.ladder.up(before)  # noqa: ASYNC102 - lets vCPUs go, and waits for nothing

    def power_button(self) -> None:
        self.board.power_button()

    # --- the ladder's rungs (trivmm.state.stage) -------------------------------------------------------------

    async def _pause_vcpus(self, at_most_s: float) -> None:
        await self.vcpus.pause(at_most_s=at_most_s)
        self.board.guest_runs(False)

    async def _resume_vcpus(self) -> None:
        """Only where the guest has not asked for a verdict."""
        runs = self.guest_request is None
        self.board.guest_runs(runs)
        (self.vcpus.resume if runs else self.vcpus.request_pause)()

    async def _attach(self) -> None:
        """Only says so: on the way up the guest comes first. Interrupts that it waits for are kept meanwhile, and come
        with their connection."""
        self.interrupts.wanted = True

    @property
    def _patience_s(self) -> float:
        """How long a call to the storage may take while the other side of a migration waits, whose patience is
        ``commit``: two of them come between COMMIT and the verdict."""
        return min(self.deadlines.storage, self.deadlines.commit / 4)

    async def _flush_disks(self, at_most_s: float) -> None:
        """:raises HypervisorError: while a device thread is stuck in the kernel: it could still write."""
        for slot in self.board.devices:
            if slot.actor.stuck is not None:
                raise HypervisorError("COMMIT", slot.actor.stuck, "wait until the device's storage answers")
        await self.disks.flush(min(at_most_s, self._patience_s))

    async def _give_locks(self, at_most_s: float) -> None:
        """Sockets of console lines are locks too: the side that runs the VM has the path."""
        await self.disks.unlock(min(at_most_s, self._patience_s))
        for line in self.board.lines.values():
            line.release()

    async def _take_locks(self) -> None:
        """:raises ConfigError: when another process has an image or socket; those taken before are given back."""
        await self.disks.lock(self._patience_s)
        try:
            for line in self.board.lines.values():
                line.retake()
        except TrivmmError:
            self.board.give_locks()
            raise

    # --- migration port: source ------------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        return self.board.memory

    @property
    def live_copy(self) -> bool:
        return self.board.vm.live_copy

    def describe(self) -> dict[str, Any]:
        return describe(self.board)

    def set_throttle(self, percent: int) -> None:
        self.vcpus.set_throttle(percent)

    async def stop(self, at_most_s: float) -> None:
        """Switchover steps 1 to 3. Any failure or cancellation undoes what was done, and the machine runs."""
        ends = trio.current_time() + at_most_s
        try:
            await self.ladder.down(Stage.DETACHED, lambda: max(0.0, ends - trio.current_time()))
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded: kernel
                await self.undo()
            raise

    def save(self) -> MachineState:
        """Step 4, after :meth:`stop`. Vcpus are read after the interrupt routes are gone: what the kernel had
        queued is in the LAPIC by now.

        :raises MigrationError: when the guest crashed: that is reported where it happened, and does not travel."""
        self.ladder.fall(Stage.SAVED)
        request = self.guest_request
        if request is not None and request.kind == "crash":
            raise MigrationError(f"the guest crashed: {request.why}")
        vcpus = tuple(SavedVcpu(vcpu.index, vcpu.cpu.save(), self._barrier_of(vcpu)) for vcpu in self.vcpus.vcpus)
        devices, board = save_board(self.board)
        return MachineState(
            vcpus=vcpus,
            vmm=self.board.vm.save(),
            devices=devices,
            board=board,
            reset_pending=None if request is None else PendingReset(request.kind),
            run=self.wanted is Stage.RUNNING,
        )

    @staticmethod
    def _barrier_of(vcpu: Vcpu) -> Barrier | None:
        """Whatever else a vCPU may wait for is over with the gate closed."""
        ticket = vcpu.barrier
        if ticket is None or ticket.settled or ticket.what not in [kind.value for kind in BarrierKind]:
            return None
        return Barrier(ticket.device, BarrierKind(ticket.what))

    async def undo(self) -> None:
        """Back up to where its owner wants it, with its locks held. The guest first, its interrupts after it; safe when
        not stopped. Bounded by ``kernel``.

        :raises TrivmmError: the locks are another's now: it stays UNLOCKED."""
        await self.ladder.up(self.wanted)
        for left in reversed(range(ATTACH_TRIES)):
            try:
                await self.interrupts.attach()
                return
            except DeadlineError as error:  # they will be, by themselves
                logger.critical("the guest runs before its interrupts are connected: %s", error)
                return
            except TrivmmError as error:
                logger.critical("the guest runs without its interrupts: %s; %d tries are left", error, left)

    async def flush_disks(self, at_most_s: float) -> bool:
        """See the port. The guest may run."""
        return await self.disks.try_flush(at_most_s)

    async def release_locks(self, at_most_s: float) -> None:
        """:raises HypervisorError: while a device thread is stuck in the kernel: it could still write.
        :raises DeadlineError: (storage) the disks are not flushed. :raises MigrationError: they can't be."""
        ends = trio.current_time() + at_most_s
        await self.ladder.down(Stage.UNLOCKED, lambda: max(0.0, ends - trio.current_time()))

    async def take_locks(self) -> None:
        """:raises ConfigError: when another process has an image or socket: it stays UNLOCKED."""
        await self.ladder.up(Stage.SAVED)

    # --- migration port: destination -------------------------------------------------------------------------

    async def load(self, state: MachineState) -> None:
        """Set everything, with the interrupts connected: after COMMIT nothing is left that waits for the kernel. What
        is pending is in the vCPUs then, and nothing makes more before the gate opens. May be called again after the
        source's undo.

        :raises TrivmmError: / :raises ValueError: when the state makes no sense here."""

        def work() -> None:
            self.interrupts.wanted = False
            self.interrupts.agree()
            load_state(self.board, state)
            self.interrupts.wanted = True
            self.interrupts.agree()

        await self.kernel.call("loading the state", work)
        states = {slot.actor.name: slot.actor.state for slot in self.board.devices}
        for vcpu, saved in zip(self.vcpus.vcpus, state.vcpus, strict=True):
            vcpu.barrier = None
            ticket = None if saved.barrier is None else states[saved.barrier.device].barrier
            if ticket is not None:
                vcpu.park_at(ticket)
        self.wanted = Stage.RUNNING if state.run else Stage.PAUSED
        self.guest_request = None
        if state.reset_pending is not None:
            self.guest_request = GuestRequest(state.reset_pending.value, "before migration")

    async def start(self) -> None:
        """On COMMIT, with the locks taken: the machine runs, or stays paused as its state says.

        Whatever it raises comes before the first guest instruction, with the locks given back: the source, told so,
        takes them at once."""
        try:
            self.board.committed()
            await self.interrupts.attach()  # they are
            await self.ladder.up(self.wanted)
        except BaseException:
            self.board.give_locks()
            self.ladder.fall(Stage.UNLOCKED)
            raise
        if self.guest_request is not None:
            self.on_guest_request()


@asynccontextmanager
async def open_machine(
    board: Board,
    deadlines: Deadlines,
    *,
    stage: Stage = Stage.DETACHED,
    vcpu_type: type[Vcpu] = Vcpu,
    kernel: KernelCalls | None = None,
    storage: KernelCalls | None = None,
    on_guest_request: Callable[[], None] = lambda: None,
    on_removed: Callable[[str, str], None] = lambda name, bdf: None,
) -> AsyncIterator[Machine]:
    """Run a board: its actors, lines and parked vCPU threads, see :func:`trivmm.nursery.tree.open_tree`.

    Nothing runs or activates before it is walked up; ``stage`` is where it starts: UNLOCKED for a destination."""
    threads = board.hypervisor.threads
    calls = kernel or KernelCalls(deadlines, threads), storage or KernelCalls(deadlines, threads, "storage")
    machine = Machine(board, deadlines, *calls, on_guest_request, vcpu_type, on_removed)
    machine.ladder.fall(stage)
    board.on_request = machine._note_request
    machine.gate.shut()
    async with open_tree(machine) as tasks:
        machine.hotplug.tasks = tasks
        yield machine
