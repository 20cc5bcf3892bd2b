"""All vCPUs of a machine: their tasks and threads, and the pause that is bounded and rolls back.

Each vCPU task runs under its own *shielded* scope in the vCPU nursery: a cancellation from outside reaches all
nested nurseries at once, and the order in which a machine ends must be built, not inherited. So nothing but
:meth:`VcpuSet.stop` ends a vCPU, and ``open_vm`` calls that in its bounded ``finally``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import attrs
import trio

from trivmm.bus.bus import Bus
from trivmm.bus.space import GuestRequest
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, GuestCrash
from trivmm.hypervisor.base import AnyVcpu
from trivmm.nursery.vcpu import Vcpu, VcpuRunState, drive_task, drive_thread

__all__ = ["VcpuOwner", "VcpuSet"]

logger = logging.getLogger(__name__)

KICK_BACKOFF_FIRST_S: Final = 0.005  # a kick can be lost to a starved thread: it is repeated until acknowledged
KICK_BACKOFF_MAX_S: Final = 0.2


class VcpuOwner(Protocol):
    """Who hears of what the vCPUs come up against. ``take_request`` and ``take_crash`` are called from their threads:
    thread-safe and quick; ``take_failure`` in the trio thread."""

    def take_request(self, vcpu: int, request: GuestRequest) -> None:
        """The guest asks the board for something; that vCPU waits, parked."""

    def take_crash(self, error: GuestCrash) -> None:
        """A vCPU can't go on; its request comes next."""

    def take_failure(self, vcpu: Vcpu, error: Exception) -> None:
        """A vCPU's program ended with an error of ours."""


async def _drive(vcpu: Vcpu) -> str:
    cpu, program = vcpu.cpu, vcpu.program()
    if not cpu.threads:
        return await drive_task(cpu, program, vcpu.bus)
    mine = trio.CapacityLimiter(1)  # a vCPU holds its token for life
    return await trio.to_thread.run_sync(
        drive_thread, cpu, program, vcpu.bus, limiter=mine, thread_name=vcpu.name, abandon_on_cancel=False
    )


@attrs.define(eq=False)
class VcpuSet:
    """``cpus`` with a bus each, of ``make_bus``. ``vcpu_type`` is for faulty designs (``trivmm.testing.doubles``)."""

    cpus: Sequence[AnyVcpu]
    make_bus: Callable[[], Bus]
    owner: VcpuOwner
    deadlines: Deadlines
    vcpu_type: type[Vcpu] = Vcpu
    vcpus: Sequence[Vcpu] = attrs.field(init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _token: trio.lowlevel.TrioToken | None = attrs.field(default=None, init=False)
    _scopes: list[trio.CancelScope] = attrs.field(factory=list, init=False)
    _left: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        take_request, take_crash = self.owner.take_request, self.owner.take_crash
        self.vcpus = [
            self.vcpu_type(cpu, self.make_bus(), self.on_change, take_request, take_crash) for cpu in self.cpus
        ]

    # --- life ------------------------------------------------------------------------------------------------

    async def start(self, nursery: trio.Nursery) -> None:
        """Start every vCPU, parked. Returns when all of them have reported.

        :raises PauseTimeout: when a thread does not get there."""
        self._token = trio.lowlevel.current_trio_token()
        for vcpu in self.vcpus:
            self._left += 1
            nursery.start_soon(self._run, vcpu, name=vcpu.name)
        with self.deadlines.enter("vcpu_start", self._diagnose):
            await self._until_all_paused()

    async def _run(self, vcpu: Vcpu) -> None:
        try:
            with trio.CancelScope(shield=True) as scope:
                self._scopes.append(scope)
                try:
                    await _drive(vcpu)
                except trio.Cancelled:
                    vcpu.request_stop()  # only stop() cancels this scope, after its deadline
                    raise
                except Exception as error:
                    self.owner.take_failure(vcpu, error)
        finally:
            vcpu.gone()
            self._left -= 1
            self._note_change()

    def on_change(self) -> None:
        """A vCPU paused or stopped. Called from any thread."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):  # the program is over: nobody waits any more
                self._token.run_sync_soon(self._note_change, idempotent=True)

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _diagnose(self) -> str:
        late = [vcpu for vcpu in self.vcpus if not vcpu.is_paused()]
        return "; ".join(vcpu.describe_wait() for vcpu in late) or "every vCPU arrived just after the deadline"

    # --- pause and resume ------------------------------------------------------------------------------------

    async def _until_all_paused(self) -> None:
        backoff_s = KICK_BACKOFF_FIRST_S
        while True:
            changed = self._changed
            late = [vcpu for vcpu in self.vcpus if not vcpu.is_paused()]
            if not late:
                return
            with trio.move_on_after(backoff_s):
                await changed.wait()
                continue
            for vcpu in late:
                vcpu.cpu.kick()
            backoff_s = min(2 * backoff_s, KICK_BACKOFF_MAX_S)

    async def pause(self, *, at_most_s: float | None = None) -> None:
        """Ask all vCPUs at once and wait until each is parked between two instructions.

        :raises PauseTimeout: naming who did not come. The caller rolls back: it knows who may run."""
        self.request_pause()
        with self.deadlines.enter("pause", self._diagnose, at_most_s=at_most_s):
            await self._until_all_paused()

    def request_pause(self) -> None:
        """Ask, and wait for nobody."""
        for vcpu in self.vcpus:
            vcpu.request_pause()

    def resume(self) -> None:
        """Let every vCPU go on; one that stood at a barrier stands there again until it is settled."""
        for vcpu in self.vcpus:
            vcpu.release_pause()

    def set_throttle(self, percent: int) -> None:
        for vcpu in self.vcpus:
            vcpu.throttle_percent = percent
            vcpu.cpu.kick()

    # --- the end ---------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End every vCPU and wait for its thread. Call inside a shield.

        :raises DeadlineError: ``vcpu_stop``, naming those whose thread did not return."""
        for vcpu in self.vcpus:
            vcpu.request_stop()

        def diagnose() -> str:
            stuck = [vcpu for vcpu in self.vcpus if vcpu.state is not VcpuRunState.STOPPED]
            return "; ".join(vcpu.describe_wait() for vcpu in stuck)

        try:
            with self.deadlines.enter("vcpu_stop", diagnose):
                await self._until_all_gone()
        except DeadlineError as error:
            logger.critical("%s", error)
            for scope in self._scopes:
                scope.cancel()  # ends scripted vCPUs; a thread in the kernel is beyond it, and is named above
            raise

    async def _until_all_gone(self) -> None:
        backoff_s = KICK_BACKOFF_FIRST_S
        while self._left:
            changed = self._changed
            with trio.move_on_after(backoff_s):
                await changed.wait()
                continue
            for vcpu in self.vcpus:
                if vcpu.state is not VcpuRunState.STOPPED:
                    vcpu.request_stop()
            backoff_s = min(2 * backoff_s, KICK_BACKOFF_MAX_S)
