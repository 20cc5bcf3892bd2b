"""One vCPU: its states, its request word, and the program that runs it.

The *program* is a generator that never blocks: it yields what to do next (run guest code, finish the started
instruction, park) and is sent the result. Two drivers execute it: :func:`drive_thread` on the vCPU's own OS thread
(``kvm``, ``soft``), :func:`drive_task` as a trio task (``trivmm.testing.scripted``, virtual time). So the rules that
decide whether a migration deadlocks are the same code in production and under the autojump clock.

The activation barrier is a *checkpoint, not a wall*: a vCPU parked there sees a pause, a stop and a kick at once,
and parks again after resume until its ticket is settled. Every parked wait is the back end's ``park``, one primitive
that a kick always ends.

A :class:`Vcpu` belongs to the vCPU nursery of its machine, from start to ``stop``.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Generator
from typing import Final, Literal, Protocol, TypeAlias

import attrs

from trivmm.bus.space import Effect, GuestRequest
from trivmm.bus.ticket import Ticket
from trivmm.errors import GuestCrash, IllegalTransition
from trivmm.hypervisor.base import (
    AnyVcpu,
    FailEntry,
    Halted,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    SystemEvent,
    TaskVcpu,
    ThreadVcpu,
    TripleFault,
    VcpuExit,
)

__all__ = ["PARK_SLICE_S", "ExitHandler", "Operation", "Vcpu", "VcpuRunState", "drive_task", "drive_thread"]

PARK_SLICE_S: Final = 1.0  # a parked vCPU looks at its request word at least this often, even if a kick were lost
THROTTLE_PERIOD_S: Final = 0.01  # one duty cycle; short against a guest's own timeouts

FATAL: Final = (TripleFault, InternalError, FailEntry, Halted)
PAUSE: Final = 1
STOP: Final = 2


class VcpuRunState(enum.Enum):
    """Where a vCPU is. ``IN_EXIT`` is our code serving its access; ``AT_BARRIER`` waits for a device."""

    STARTING = "starting"
    RUNNING = "running"
    IN_EXIT = "in exit"
    AT_BARRIER = "at barrier"
    PAUSED = "paused"
    STOPPED = "stopped"


_S = VcpuRunState
TRANSITIONS: Final[dict[VcpuRunState, frozenset[VcpuRunState]]] = {
    _S.STARTING: frozenset({_S.RUNNING, _S.AT_BARRIER, _S.PAUSED, _S.IN_EXIT, _S.STOPPED}),
    _S.RUNNING: frozenset({_S.IN_EXIT, _S.AT_BARRIER, _S.PAUSED, _S.STOPPED}),
    _S.IN_EXIT: frozenset({_S.RUNNING, _S.AT_BARRIER, _S.PAUSED, _S.STOPPED}),
    _S.AT_BARRIER: frozenset({_S.RUNNING, _S.IN_EXIT, _S.PAUSED, _S.STOPPED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.AT_BARRIER, _S.STOPPED}),
    _S.STOPPED: frozenset(),
}

Operation: TypeAlias = Literal["run", "finish"] | float
"""What the program asks of its driver: run guest code, finish the started instruction, or park for so many seconds."""

Program: TypeAlias = Generator[Operation, VcpuExit | None, str]


class ExitHandler(Protocol):
    """The board: answers a read with its bytes, a write with what the vCPU must do next."""

    def __call__(self, vcpu: int, reason: VcpuExit) -> bytes | Effect: ...


@attrs.define(eq=False)
class Vcpu:
    """State, request word and program of one vCPU.

    ``on_change()`` is called from the vCPU's thread after it paused or stopped, ``on_request(index, request)`` when
    the guest asks the board for a reset or power-off, ``on_crash(error)`` when it cannot go on; all must be
    thread-safe and quick. A vCPU starts with PAUSE requested: its thread exists, parked, before anything runs.
    """

    index: int
    cpu: AnyVcpu
    handle: ExitHandler
    on_change: Callable[[], None]
    on_request: Callable[[int, GuestRequest], None]
    on_crash: Callable[[GuestCrash], None]
    clock: Callable[[], float] = time.monotonic
    state: VcpuRunState = attrs.field(default=VcpuRunState.STARTING, init=False)
    since: float = attrs.field(default=0.0, init=False)
    barrier: Ticket | None = attrs.field(default=None, init=False)
    throttle_percent: int = attrs.field(default=0, init=False)
    exits: int = attrs.field(default=0, init=False)
    _request: int = attrs.field(default=PAUSE, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _serving: VcpuExit | None = attrs.field(default=None, init=False)
    _slice_began: float = attrs.field(default=0.0, init=False)

    @property
    def name(self) -> str:
        return f"vcpu{self.index}"

    # --- requests: any thread --------------------------------------------------------------------------------

    def request_pause(self) -> None:
        with self._lock:
            self._request |= PAUSE
        self.cpu.kick()

    def release_pause(self) -> None:
        with self._lock:
            self._request &= ~PAUSE
        self.cpu.kick()

    def request_stop(self) -> None:
        with self._lock:
            self._request |= STOP
        self.cpu.kick()

    def is_paused(self) -> bool:
        """True when the vCPU is parked for a pause *and* cannot leave before the pause is released."""
        with self._lock:
            return self.state is _S.STOPPED or (self.state is _S.PAUSED and bool(self._request & PAUSE))

    def park_at(self, ticket: Ticket) -> None:
        """Make the vCPU wait for ``ticket`` before it runs again."""
        self.barrier = ticket
        ticket.on_settled(self.cpu.kick)

    def describe_wait(self) -> str:
        """For a diagnosis: who, in what state, in which access, for how long."""
        where = f"{self.name} is {self.state.value}"
        serving = self._serving
        match serving:
            case MmioWrite() | MmioRead():
                where += f", serving {type(serving).__name__} at {serving.gpa:#x}"
            case IoOut() | IoIn():
                where += f", serving {type(serving).__name__} at port {serving.port:#x}"
            case _:
                pass
        barrier = self.barrier
        if barrier is not None and not barrier.settled:
            where += f", waiting for the {barrier.what} of {barrier.device} (generation {barrier.generation})"
        return f"{where}, for {self.clock() - self.since:.3f} s"

    # --- the program: the vCPU's own thread or task ----------------------------------------------------------

    def _enter(self, target: VcpuRunState) -> None:
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.name, self.state.value, target.value)
        self.state = target
        self.since = self.clock()

    def program(self) -> Program:
        """Runs the vCPU until it is asked to stop or the guest crashes; gives the reason."""
        self.since = self.clock()
        while True:
            asked = self._request or self.barrier is not None or self.throttle_percent
            if asked and not (yield from self._checkpoint()):
                self._enter(_S.STOPPED)
                self.on_change()
                return "stopped"
            if self.state is not _S.RUNNING:
                self._enter(_S.RUNNING)
            reason = yield "run"
            if type(reason) is Interrupted or reason is None:
                continue
            self._serve(reason)

    def _checkpoint(self) -> Generator[Operation, VcpuExit | None, bool]:
        """Serve every request and every open barrier; False when asked to stop."""
        while True:
            request = self._request
            if request & STOP:
                return False
            if request & PAUSE:
                yield from self._pause()
                continue
            barrier = self.barrier
            if barrier is not None:
                if barrier.settled:
                    self.barrier = None
                    continue
                yield from self._wait_at_barrier(barrier)
                continue
            if self.throttle_percent:
                yield from self._throttle()
                if self._request:
                    continue
            return True

    def _pause(self) -> Generator[Operation, VcpuExit | None, None]:
        # A started instruction is finished first, so that the saved registers lie between two instructions
        # (a page-crossing MMIO store returns a second exit). Whatever it asks for is honoured after the pause.
        while type(reason := (yield "finish")) is not Interrupted and reason is not None:
            self._serve(reason)
            if isinstance(reason, FATAL):
                break  # a vCPU that can't go on may say so for ever: there is nothing left to finish
        if self.state is not _S.PAUSED:
            self._enter(_S.PAUSED)
        self.on_change()
        while True:
            with self._lock:
                if self._request & STOP:
                    return
                if not self._request & PAUSE:
                    # Leaving PAUSED and the look at the request are one step: see is_paused().
                    waits = self.barrier is not None and not self.barrier.settled
                    self._enter(_S.AT_BARRIER if waits else _S.RUNNING)
                    return
            yield PARK_SLICE_S

    def _wait_at_barrier(self, barrier: Ticket) -> Generator[Operation, VcpuExit | None, None]:
        self._enter_barrier()
        while not barrier.settled and not self._request:
            yield PARK_SLICE_S

    def _enter_barrier(self) -> None:
        if self.state is not _S.AT_BARRIER:
            self._enter(_S.AT_BARRIER)

    def _throttle(self) -> Generator[Operation, VcpuExit | None, None]:
        now = self.clock()
        share = self.throttle_percent / 100
        if now - self._slice_began < THROTTLE_PERIOD_S * (1 - share):
            return
        wake = now + THROTTLE_PERIOD_S * share
        while self.throttle_percent and not self._request and (left := wake - self.clock()) > 0:
            yield left
        self._slice_began = self.clock()

    def _serve(self, reason: VcpuExit) -> None:
        self._serving = reason
        if self.state is not _S.IN_EXIT and self.state is not _S.PAUSED:
            self._enter(_S.IN_EXIT)
        self.exits += 1
        answer: bytes | Effect
        match reason:
            case IoIn() | MmioRead() | IoOut() | MmioWrite():
                answer = self.handle(self.index, reason)
            case SystemEvent(kind):
                answer = GuestRequest("poweroff" if kind == "shutdown" else kind, "system event")
            case TripleFault() | InternalError() | FailEntry() | Halted():  # FATAL
                answer = self._crash(reason)
            case _:
                answer = None
        self._serving = None
        if answer is None:
            return
        if type(answer) is bytes:
            self.cpu.complete_read(answer)
        elif isinstance(answer, Ticket):
            self.park_at(answer)
        elif isinstance(answer, GuestRequest):
            with self._lock:
                self._request |= PAUSE  # it waits, parked, for the board's verdict
            self.on_request(self.index, answer)

    def _crash(self, reason: VcpuExit) -> GuestRequest:
        match reason:
            case TripleFault():
                what = "triple fault"
            case InternalError(suberror, data):
                words = " ".join(f"{word:#x}" for word in data)
                what = f"hypervisor internal error {suberror}{' (instruction emulation)' if suberror == 1 else ''}"
                what += f" [{words}]" if words else ""
            case FailEntry(code):
                what = f"the hardware refused the guest state ({code:#x})"
            case _:
                what = "halted for ever: no interrupt can wake it"
        self.on_crash(GuestCrash(self.index, what, self.cpu.describe()))
        return GuestRequest("crash", what)


def drive_thread(cpu: ThreadVcpu, program: Program) -> str:
    """Run a vCPU's program on this thread until it ends. Blocks, but only in calls that a kick ends."""
    cpu.attach_thread()
    try:
        answer: VcpuExit | None = None
        while True:
            try:
                operation = program.send(answer)
            except StopIteration as end:
                return str(end.value)
            answer = None
            if operation == "run":
                answer = cpu.run()
            elif operation == "finish":
                answer = cpu.run_immediate()
            else:
                cpu.park(operation)
    finally:
        cpu.detach_thread()


async def drive_task(cpu: TaskVcpu, program: Program) -> str:
    """The same in this task."""
    answer: VcpuExit | None = None
    while True:
        try:
            operation = program.send(answer)
        except StopIteration as end:
            return str(end.value)
        answer = None
        if operation == "run":
            answer = await cpu.run()
        elif operation == "finish":
            answer = await cpu.run_immediate()
        else:
            await cpu.park(operation)
