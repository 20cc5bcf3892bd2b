"""Where a VM's machines live: builds one, houses it in the VM nursery, ends it. One at a time.

A machine is built at boot and torn down at shutdown; a guest's reboot is a teardown and a fresh build. Building and
freeing wait for the kernel and for files, so both happen in threads. Whatever fails, nothing is left behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import attrs
import trio

from trivmm.config import VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import WrongState
from trivmm.hypervisor.base import Hypervisor
from trivmm.machine.board import Board, Kept
from trivmm.machine.build import build_board, check_board, close_sinks, open_sinks
from trivmm.machine.disks import Disks
from trivmm.machine.machine import Machine, open_machine
from trivmm.nursery.kernel import KernelCalls
from trivmm.platform.sinks import Sink
from trivmm.state.stage import Stage

__all__ = ["MachineHost"]

logger = logging.getLogger(__name__)


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@attrs.define(eq=False)
class MachineHost:
    """``machine`` is the one that is there, ``board`` that one's, or the last one's. ``on_event(kind, device,
    generation)`` tells of devices, ``on_guest_request()`` that the guest wants something of its owner, ``on_removed(id,
    bdf)`` that it has let go of a device, ``on_panic(word)`` what it says of itself; all in the trio thread."""

    hypervisor: Hypervisor
    deadlines: Deadlines
    nursery: trio.Nursery
    on_event: Callable[..., None]
    on_guest_request: Callable[[], None]
    on_removed: Callable[[str, str], None]
    on_panic: Callable[[str], None] = lambda word: None
    kernel: KernelCalls = attrs.field(
        default=attrs.Factory(lambda self: KernelCalls(self.deadlines, self.hypervisor.threads), takes_self=True),
        init=False,
    )
    storage: KernelCalls = attrs.field(
        default=attrs.Factory(
            lambda self: KernelCalls(self.deadlines, self.hypervisor.threads, "storage"), takes_self=True
        ),
        init=False,
    )
    machine: Machine | None = attrs.field(default=None, init=False)
    board: Board | None = attrs.field(default=None, init=False)
    new_board: trio.Event = attrs.field(factory=trio.Event, init=False)  # set, and replaced, with every board
    closing: bool = attrs.field(default=False, init=False)  # the nursery's owner ends it
    _token: trio.lowlevel.TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)
    _ended: trio.Event = attrs.field(factory=_set_event, init=False)  # everything of the machine is closed and freed
    _end: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def empty(self) -> bool:
        """No machine is there, and none is being ended."""
        return self.machine is None and self._ended.is_set()

    @property
    def stuck(self) -> tuple[str, ...]:
        """Threads that outlived their deadline, by name."""
        return (() if self.board is None else tuple(self.board.stuck)) + self.kernel.stuck + self.storage.stuck

    async def boot(self, config: VmConfig, kept: Kept | None = None) -> Machine:
        """A machine with its payload loaded, its vCPUs parked. The sinks that are ``kept`` of the one before are closed
        when it fails.

        :raises ConfigError: naming the field, the value and the remedy; nothing is left behind."""
        board = await self._build(config, None if kept is None else kept.sinks)
        try:
            if kept is not None:
                board.fixed["cmos"].after_reset(kept.cmos)
            await self._in_pieces(board.load_payload)  # seconds, where the kernel is to be unpacked
            return await self._house(board)
        except BaseException:
            await self._discard(board)  # noqa: ASYNC102 - shields and bounds itself
            raise

    async def build_incoming(self, config: VmConfig, prepare: Callable[[Board], None]) -> Machine:
        """A machine that a migration fills, parked. ``prepare`` makes its board the sender's.

        :raises TrivmmError: when it can't be; nothing is left behind."""
        board = await self._build(config, None, incoming=True)
        try:
            prepare(board)
            # Cached when the VM was here before, perhaps: gone by COMMIT, when the guest waits for that.
            await Disks(lambda: board.storages, self.storage).refresh(self.deadlines.handshake / 2)
            await self._in_pieces(board.check_payload)
            return await self._house(board, stage=Stage.UNLOCKED)
        except BaseException:
            await self._discard(board)  # noqa: ASYNC102 - shields and bounds itself
            raise

    async def _build(self, config: VmConfig, kept: Mapping[str, Sink] | None, *, incoming: bool = False) -> Board:
        check_board(config, self.hypervisor)
        sinks = {} if incoming else open_sinks(config, kept)

        def work() -> Board:
            return build_board(
                config,
                self.hypervisor,
                on_event=self.on_event,
                on_panic=lambda word: self._token.run_sync_soon(self.on_panic, word),
                incoming=incoming,
                sinks=sinks,
            )

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

    async def _house(self, board: Board, *, stage: Stage = Stage.DETACHED) -> Machine:
        """Start the machine's task in the VM nursery; it owns ``board`` once this returns."""
        self._end, self._ended = trio.Event(), trio.Event()
        try:
            machine: Machine = await self.nursery.start(self._machine_task, board, stage)
        except RuntimeError as error:
            self._ended.set()
            if self.closing:  # its nursery is closed: it ended during the boot
                raise WrongState("boot", "at its end", "there until it has booted") from error
            raise
        except BaseException:
            self._ended.set()
            raise
        self.machine, self.board = machine, board
        self.new_board.set()
        self.new_board = trio.Event()
        return machine

    async def _machine_task(
        self, board: Board, stage: Stage, *, task_status: trio.TaskStatus[Machine] = trio.TASK_STATUS_IGNORED
    ) -> None:
        end, ended = self._end, self._ended
        try:
            async with open_machine(
                board,
                self.deadlines,
                stage=stage,
                kernel=self.kernel,
                storage=self.storage,
                on_guest_request=self.on_guest_request,
                on_removed=self.on_removed,
            ) as machine:
                task_status.started(machine)
                # If start() was cancelled meanwhile it waits for this task: leave before the shield, not after.
                await trio.lowlevel.checkpoint_if_cancelled()
                # Shielded: when the VM nursery is cancelled, the owner (a migration) must roll back on a machine
                # that still works; its scope then ends it. Bounded by that scope, which always sets the event.
                with trio.CancelScope(shield=True):
                    await end.wait()
        finally:
            if ended is self._ended:
                self.machine = None
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

    async def end(self) -> None:
        """End the machine, if there is one. Shielded, bounded inside by vcpu_stop, device_stop and quiesce."""
        if self._ended.is_set():
            return
        with trio.CancelScope(shield=True):
            self._end.set()
            with trio.move_on_after(4 * self.deadlines.shutdown_grace) as scope:
                await self._ended.wait()
            if scope.cancelled_caught:
                logger.critical("the machine did not end: %s", "; ".join(self.stuck) or "a thread is stuck")
            self.machine = None
