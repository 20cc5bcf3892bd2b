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
from collections.abc import Callable, Generator
from typing import Final, Literal, TypeAlias

import attrs

from trivmm.bus.bus import Bus
from trivmm.bus.space import GuestRequest
from trivmm.bus.ticket import Ticket
from trivmm.errors import GuestCrash, HypervisorError, IllegalTransition
from trivmm.hypervisor.base import AnyVcpu, Crashed, Interrupted, Outcome, TaskVcpu, ThreadVcpu

__all__ = ["PARK_SLICE_S", "Operation", "Vcpu", "VcpuRunState", "drive_task", "drive_thread"]

PARK_SLICE_S: Final = 1.0  # a parked vCPU looks at its request word at least this often, even if a kick were lost
THROTTLE_PERIOD_S: Final = 0.01  # one duty cycle; short against a guest's own timeouts

PAUSE: Final = 1
STOP: Final = 2


class VcpuRunState(enum.Enum):
    """Where a vCPU is. ``RUNNING`` is guest code, or a device serving its access; ``AT_BARRIER`` waits for a device."""

    STARTING = "starting"
    RUNNING = "running"
    AT_BARRIER = "at barrier"
    PAUSED = "paused"
    STOPPED = "stopped"


_S = VcpuRunState
TRANSITIONS: Final[dict[VcpuRunState, frozenset[VcpuRunState]]] = {
    _S.STARTING: frozenset({_S.PAUSED, _S.STOPPED}),  # it is parked before anything runs
    _S.RUNNING: frozenset({_S.AT_BARRIER, _S.PAUSED, _S.STOPPED}),
    _S.AT_BARRIER: frozenset({_S.RUNNING, _S.PAUSED, _S.STOPPED}),
    _S.PAUSED: frozenset({_S.RUNNING, _S.AT_BARRIER, _S.STOPPED}),
    _S.STOPPED: frozenset(),
}

Operation: TypeAlias = Literal["run", "finish"] | float
"""What the program asks of its driver: run guest code, finish the started instruction, or park for so many seconds."""

Program: TypeAlias = Generator[Operation, Outcome | None, str]


@attrs.define(eq=False)
class Vcpu:
    """State, request word and program of one vCPU, whose accesses go to ``bus``.

    ``on_change()`` is called from the vCPU's thread after it paused or stopped, ``on_request(index, request)`` when
    the guest asks the board for a reset or power-off, ``on_crash(error)`` when it cannot go on; all must be
    thread-safe and quick. A vCPU starts with PAUSE requested: its thread exists, parked, before anything runs.
    """

    cpu: AnyVcpu
    bus: Bus
    on_change: Callable[[], None]
    on_request: Callable[[int, GuestRequest], None]
    on_crash: Callable[[GuestCrash], None]
    state: VcpuRunState = attrs.field(default=VcpuRunState.STARTING, init=False)
    since: float = attrs.field(default=0.0, init=False)
    barrier: Ticket | None = attrs.field(default=None, init=False)
    throttle_percent: int = attrs.field(default=0, init=False)
    _request: int = attrs.field(default=PAUSE, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _slice_began: float = attrs.field(default=0.0, init=False)

    @property
    def index(self) -> int:
        return self.cpu.index

    @property
    def name(self) -> str:
        return f"vcpu{self.index}"

    def describe_registers(self) -> str:
        """For a report: what can't be told is said there, and raises nothing."""
        try:
            return self.cpu.describe()
        except HypervisorError as error:
            return f"no registers: {error}"

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
        where, since = f"{self.name} is {self.state.value}", self.since
        access = self.bus.serving()
        if access is not None:
            where, since = f"{where}, serving {access}", access.since
        barrier = self.barrier
        if barrier is not None and not barrier.settled:
            where += f", waiting for the {barrier.what} of {barrier.device} (generation {barrier.generation})"
        return f"{where}, for {self.bus.clock() - since:.3f} s"

    # --- the program: the vCPU's own thread or task ----------------------------------------------------------

    def _enter(self, target: VcpuRunState) -> None:
        """The one place that assigns the state. Staying where it is, is no step."""
        if target is self.state:
            return
        if target not in TRANSITIONS[self.state]:
            raise IllegalTransition(self.name, self.state.value, target.value)
        self.state = target
        self.since = self.bus.clock()

    def gone(self) -> None:
        """Its thread or task has ended, whatever it said last."""
        self._enter(_S.STOPPED)

    def program(self) -> Program:
        """Runs the vCPU until it is asked to stop; gives the reason."""
        self.since = self.bus.clock()
        yield from self._pause()
        while True:
            asked = self._request or self.barrier is not None or self.throttle_percent
            if asked and not (yield from self._checkpoint()):
                self._enter(_S.STOPPED)
                self.on_change()
                return "stopped"
            self._enter(_S.RUNNING)
            self._take((yield "run"))

    def _checkpoint(self) -> Generator[Operation, Outcome | None, bool]:
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

    def _pause(self) -> Generator[Operation, Outcome | None, None]:
        # A started instruction is finished first, so that the saved registers lie between two instructions
        # (a page-crossing MMIO store is two accesses). Whatever it asks for is honoured after the pause.
        while not isinstance(outcome := (yield "finish"), Interrupted):
            self._take(outcome)
            if isinstance(outcome, Crashed):
                break  # a vCPU that can't go on may say so for ever: there is nothing left to finish
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

    def _wait_at_barrier(self, barrier: Ticket) -> Generator[Operation, Outcome | None, None]:
        self._enter(_S.AT_BARRIER)
        while not barrier.settled and not self._request:
            yield PARK_SLICE_S

    def _throttle(self) -> Generator[Operation, Outcome | None, None]:
        """Looked at whenever the vCPU comes back from guest code: whoever throttles kicks it once a period."""
        now = self.bus.clock()
        share = self.throttle_percent / 100
        if now - self._slice_began < THROTTLE_PERIOD_S * (1 - share):
            return
        wake = now + THROTTLE_PERIOD_S * share
        while self.throttle_percent and not self._request and (left := wake - self.bus.clock()) > 0:
            yield left
        self._slice_began = self.bus.clock()

    def _take(self, outcome: Outcome | None) -> None:
        match outcome:
            case Ticket():
                self.park_at(outcome)
            case GuestRequest():
                self._ask(outcome)
            case Crashed(reason, details):
                self.on_crash(GuestCrash(self.index, reason, details))
                self._ask(GuestRequest("crash", reason))
            case _:  # a kick: the request word says why
                pass

    def _ask(self, request: GuestRequest) -> None:
        with self._lock:
            self._request |= PAUSE  # it waits, parked, for the board's verdict
        self.on_request(self.index, request)


def drive_thread(cpu: ThreadVcpu, program: Program, bus: Bus) -> str:
    """Run a vCPU's program on this thread until it ends. Blocks, but only in calls that a kick ends."""
    cpu.attach_thread()
    try:
        answer: Outcome | None = None
        while True:
            try:
                operation = program.send(answer)
            except StopIteration as end:
                return str(end.value)
            answer = None
            if operation == "run":
                answer = cpu.run(bus)
            elif operation == "finish":
                answer = cpu.finish(bus)
            else:
                cpu.park(operation)
    finally:
        cpu.detach_thread()


async def drive_task(cpu: TaskVcpu, program: Program, bus: Bus) -> str:
    """The same in this task."""
    answer: Outcome | None = None
    while True:
        try:
            operation = program.send(answer)
        except StopIteration as end:
            return str(end.value)
        answer = None
        if operation == "run":
            answer = await cpu.run(bus)
        elif operation == "finish":
            answer = await cpu.finish(bus)
        else:
            await cpu.park(operation)
