"""The machine as its owner sees it: a built board with its tasks.

:class:`Machine` pauses, resumes, closes the device gate and undoes all of it; so it implements both migration ports
(``trivmm.migration.port``). :func:`open_machine` houses it in the nursery tree (``trivmm.nursery.tree``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs
import trio

from trivmm.bus.space import GuestRequest
from trivmm.deadlines import Deadlines
from trivmm.errors import GuestCrash, HypervisorError, MigrationError, TrivmmError
from trivmm.machine.board import Board
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import DeviceLifecycle
from trivmm.nursery.kernel import KernelCalls
from trivmm.nursery.tree import open_tree
from trivmm.nursery.vcpu import Vcpu
from trivmm.nursery.vcpus import VcpuSet
from trivmm.platform.line import Line
from trivmm.state.machine import MachineState, SavedVcpu

__all__ = ["Machine", "open_machine"]

logger = logging.getLogger(__name__)

DRAIN_SHARE: Final = 0.25  # of the downtime that is left: a sink that stalls must not use up all of it


@attrs.define(eq=False)
class Machine:
    """A built board with its tasks. ``running`` says what the owner wants, not what each vCPU does this moment.

    Interrupts and the dirty log are wanted or not, too: a thread makes the kernel agree (:meth:`_agree`). So one that
    the kernel holds up, and that nobody can wait for any longer, ends with what is wanted by then.

    ``on_guest_request()`` is called in the trio thread when the guest asked for a reset or power-off, or crashed.
    """

    board: Board
    deadlines: Deadlines
    kernel: KernelCalls
    on_guest_request: Callable[[], None]
    vcpu_type: type[Vcpu] = Vcpu
    vcpus: VcpuSet = attrs.field(init=False)
    running: bool = attrs.field(default=False, init=False)
    ending: bool = attrs.field(default=False, init=False)  # its board is closed next, and the kernel's part with it
    guest_request: GuestRequest | None = attrs.field(default=None, init=False)
    crash: GuestCrash | None = attrs.field(default=None, init=False)
    _gate_closed: bool = attrs.field(default=False, init=False)
    _interrupts_wanted: bool = attrs.field(default=False, init=False)
    _interrupts_connected: bool = attrs.field(default=False, init=False)  # the thread's, and so the next
    _log_wanted: bool = attrs.field(default=False, init=False)
    _log_on: bool = attrs.field(default=False, init=False)
    _token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)

    def __attrs_post_init__(self) -> None:
        self.vcpus = VcpuSet(self.board.cpus, self.board.bus, self, self.deadlines, self.vcpu_type)

    # --- what the nursery tree houses ------------------------------------------------------------------------

    @property
    def actors(self) -> Sequence[DeviceLifecycle]:
        return [slot.lifecycle for slot in self.board.devices]

    @property
    def lines(self) -> Mapping[str, Line]:
        return self.board.lines

    def note_stuck(self, why: str, *, in_use: bool = False) -> None:
        self.board.note_stuck(why, in_use=in_use)

    # --- from vCPU threads -----------------------------------------------------------------------------------

    def take_request(self, vcpu: int, request: GuestRequest) -> None:
        self._token.run_sync_soon(self._note_request, request)

    def take_crash(self, error: GuestCrash) -> None:
        if self.crash is None:
            self.crash = error

    def take_failure(self, vcpu: Vcpu, error: Exception) -> None:
        """A vCPU's program ended with an error of ours. The VM can't go on, but its owner's program can."""
        logger.critical("%s: internal error, the VM stops: %s", vcpu.describe_wait(), error, exc_info=error)
        self.take_crash(GuestCrash(vcpu.index, f"internal error: {error}", vcpu.cpu.describe()))
        self._note_request(GuestRequest("crash", str(error)))

    def _note_request(self, request: GuestRequest) -> None:
        if self.guest_request is None or request.kind == "crash":
            self.guest_request = request
        for vcpu in self.vcpus.vcpus:
            vcpu.request_pause()  # the others stop too: the machine waits for its owner
        self.on_guest_request()

    # --- the owner's verbs -----------------------------------------------------------------------------------

    async def pause(self) -> None:
        """:raises PauseTimeout: naming who did not stop; the machine runs again."""
        await self._pause_vcpus(None)
        self.running = False

    async def _pause_vcpus(self, at_most_s: float | None) -> None:
        try:
            await self.vcpus.pause(at_most_s=at_most_s)
        except BaseException:
            self._resume_vcpus()
            raise

    async def resume(self) -> None:
        """Connect interrupts, open the gate, let the vCPUs go. Idempotent.

        :raises DeadlineError: (kernel) the interrupts are not connected: nothing runs."""
        await self._connect_interrupts()
        self.running = True
        self._reopen()

    def _agree(self) -> None:
        """In a thread: it waits for the kernel. Interrupts first, since the guest waits for them."""
        while True:
            if self._interrupts_connected != self._interrupts_wanted:
                wanted = self._interrupts_wanted
                if wanted:
                    self.board.connect_interrupts()
                else:
                    self.board.disconnect_interrupts()
                self._interrupts_connected = wanted
            elif self._log_on != self._log_wanted:
                wanted = self._log_wanted
                if wanted:
                    self.board.start_dirty_log()
                else:
                    self.board.stop_dirty_log()
                self._log_on = wanted
            else:
                return

    async def _connect_interrupts(self) -> None:
        self._interrupts_wanted = True
        if self.kernel.busy or not self._interrupts_connected:
            await self.kernel.call("connecting the interrupts", self._agree)

    async def _disconnect_interrupts(self, at_most_s: float) -> None:
        self._interrupts_wanted = False
        await self.kernel.call("taking the interrupts away", self._agree, at_most_s=at_most_s)

    async def _run_again(self) -> None:
        """Back from a :meth:`stop`, finished or not. The guest first: interrupts that it waits for are kept meanwhile,
        and come with their connection. Never raises; bounded by ``kernel``."""
        self._interrupts_wanted = True
        self._reopen()
        try:
            await self._connect_interrupts()
        except TrivmmError as error:
            logger.critical("the guest runs before its interrupts are connected: %s", error)

    def _reopen(self) -> None:
        self.board.thaw()
        if self._gate_closed:
            self._gate_closed = False
            for slot in self.board.devices:
                slot.lifecycle.reopen()
        self._resume_vcpus()

    def _resume_vcpus(self) -> None:
        """Only where the owner wants it to run and the guest has not asked for a verdict."""
        if self.running and self.guest_request is None:
            self.vcpus.resume()
        else:
            for vcpu in self.vcpus.vcpus:
                vcpu.request_pause()

    async def nmi(self) -> None:
        """Give every vCPU a non-maskable interrupt; a paused machine takes it when it resumes.

        :raises PauseTimeout: naming who did not stop for it; nobody got one, the machine runs."""
        await self._pause_vcpus(None)  # a back end takes it only between two runs
        try:
            for vcpu in self.vcpus.vcpus:
                vcpu.cpu.inject_nmi()
        finally:
            self._resume_vcpus()

    def power_button(self) -> None:
        self.board.power_button()

    async def close_gate(self, at_most_s: float, *, drain_s: float = math.inf) -> None:
        """Switchover step 2: no activation starts or takes effect, no queue takes a chain, in-flight work ends.
        Console output may take ``drain`` or ``drain_s``, whichever is less: what is left is part of the state.

        :raises DeadlineError: ``quiesce``, naming the device; the gate may be half closed: :meth:`undo`."""
        self._gate_closed = True

        def diagnose() -> str:
            late = [slot.lifecycle for slot in self.board.devices if slot.lifecycle.busy]
            names = ", ".join(f"{each.name} ({each.stuck or each.state.value})" for each in late)
            return f"in-flight work did not end: {names or 'console output'}"

        with self.deadlines.enter("quiesce", diagnose, at_most_s=at_most_s):
            async with trio.open_nursery() as nursery:
                for slot in self.board.devices:
                    nursery.start_soon(slot.lifecycle.quiesce)
                for line in self.board.lines.values():
                    nursery.start_soon(line.drain, min(self.deadlines.drain, at_most_s, drain_s))

    # --- migration port: source ------------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        return self.board.memory

    @property
    def live_copy(self) -> bool:
        return self.board.vm.live_copy

    def describe(self) -> dict[str, Any]:
        return self.board.describe()

    async def start_dirty_log(self) -> None:
        self._log_wanted = True
        try:
            await self.kernel.call("switching the dirty log on", self._agree)
        except BaseException:
            self._log_wanted = False
            raise

    async def stop_dirty_log(self) -> None:
        self._log_wanted = False
        if not self.ending and (self.kernel.busy or self._log_on):
            await self.kernel.call("switching the dirty log off", self._agree)

    async def harvest_dirty(self, slot: int, into: Any) -> int:
        work = partial(self.board.harvest_dirty, slot, into)
        if self.vcpus.all_paused:  # no vCPU moves a BAR, which holds the kernel's lock for as long as that waits
            return work()
        return await self.kernel.call("reading the dirty log", work)

    def set_throttle(self, percent: int) -> None:
        self.vcpus.set_throttle(percent)

    def log(self, event: str, **fields: Any) -> None:
        logger.info("migration: %s %s", event, " ".join(f"{key}={value}" for key, value in fields.items()))

    async def stop(self, at_most_s: float) -> None:
        """Switchover steps 1 to 3. Any failure or cancellation undoes what was done, and the machine runs."""
        ends = trio.current_time() + at_most_s
        try:
            await self._pause_vcpus(at_most_s)
            left = max(0.0, ends - trio.current_time())
            await self.close_gate(left, drain_s=left * DRAIN_SHARE)
            await self._disconnect_interrupts(max(0.0, ends - trio.current_time()))
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded: kernel
                await self._run_again()
            raise

    def save(self) -> MachineState:
        """Step 4, after :meth:`stop`. Vcpus are read after the interrupt routes are gone: what the kernel had
        queued is in the LAPIC by now.

        :raises MigrationError: when the guest crashed: that is reported where it happened, and does not travel."""
        request = self.guest_request
        if request is not None and request.kind == "crash":
            raise MigrationError(f"the guest crashed: {request.why}")
        vcpus = tuple(SavedVcpu(vcpu.index, vcpu.cpu.save(), self._barrier_of(vcpu)) for vcpu in self.vcpus.vcpus)
        devices, board = self.board.save()
        return MachineState(
            vcpus=vcpus,
            vmm=self.board.vm.save(),
            devices=devices,
            board=board,
            reset_pending=None if request is None else request.kind,
            run=self.running,
        )

    @staticmethod
    def _barrier_of(vcpu: Vcpu) -> tuple[str, str] | None:
        ticket = vcpu.barrier
        return None if ticket is None or ticket.settled else (ticket.device, ticket.what)

    async def undo(self) -> None:
        """Back from :meth:`stop`: runs again, unless it was paused before. Safe when not stopped."""
        await self._run_again()

    async def release_locks(self) -> None:
        """:raises HypervisorError: while a device thread is stuck in the kernel: it could still write."""
        for slot in self.board.devices:
            if slot.lifecycle.stuck is not None:
                raise HypervisorError("COMMIT", slot.lifecycle.stuck, "wait until the device's storage answers")
        self.board.give_locks()

    async def take_locks(self) -> None:
        """:raises ConfigError: when another process has an image or socket; those taken before are given back."""
        try:
            for slot in self.board.devices:
                slot.backend.take_locks()
            for line in self.board.lines.values():
                line.retake()
        except TrivmmError:
            self.board.give_locks()
            raise

    # --- migration port: destination -------------------------------------------------------------------------

    async def load(self, state: MachineState) -> None:
        """Set everything, with the interrupts connected: after COMMIT nothing is left that waits for the kernel. What
        is pending is in the vCPUs then, and nothing makes more before the gate opens. May be called again after the
        source's undo.

        :raises TrivmmError: / :raises ValueError: when the state makes no sense here."""

        def work() -> None:
            self._interrupts_wanted = False
            self._agree()
            self.board.load(state)
            self._interrupts_wanted = True
            self._agree()

        await self.kernel.call("loading the state", work)
        lifecycles = {slot.lifecycle.name: slot.lifecycle for slot in self.board.devices}
        for vcpu, saved in zip(self.vcpus.vcpus, state.vcpus, strict=True):
            vcpu.barrier = None
            if saved.barrier is not None and saved.barrier[0] in lifecycles:
                ticket = lifecycles[saved.barrier[0]].ticket
                if ticket is not None:
                    vcpu.park_at(ticket)
        self.running = state.run
        self.guest_request = GuestRequest(state.reset_pending, "before migration") if state.reset_pending else None

    async def start(self) -> None:
        """On COMMIT, with the locks taken: the machine runs, or stays paused as its state says.

        Whatever it raises comes before the first guest instruction, with the locks given back: the source, told so,
        takes them at once."""
        try:
            self.board.committed()
            await self._connect_interrupts()  # they are
            self._reopen()
        except BaseException:
            self.board.give_locks()
            raise
        if self.guest_request is not None:
            self.on_guest_request()


@asynccontextmanager
async def open_machine(
    board: Board,
    deadlines: Deadlines,
    *,
    gate_open: bool = True,
    vcpu_type: type[Vcpu] = Vcpu,
    kernel: KernelCalls | None = None,
    on_guest_request: Callable[[], None] = lambda: None,
) -> AsyncIterator[Machine]:
    """Run a board: its actors, lines and parked vCPU threads, see :func:`trivmm.nursery.tree.open_tree`.

    ``gate_open`` False is for a destination: nothing activates before COMMIT."""
    calls = kernel or KernelCalls(deadlines, board.hypervisor.threads)
    machine = Machine(board, deadlines, calls, on_guest_request, vcpu_type)
    if not gate_open:
        machine._gate_closed = True
        for slot in board.devices:
            slot.lifecycle.close_gate()
    async with open_tree(machine):
        yield machine
