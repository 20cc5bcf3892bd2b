"""Faulty designs, kept to show that the design matters: with them the famous deadlock comes back.

- :class:`OwnerScopedServicer`: activations are served by a task in the scope of whoever owns the VM, as in the VMM
  where the bug was found. When a migration takes the VM, the task is gone.
- :class:`WallBarrierVcpu`: a vCPU that waits for its device without looking at pause requests.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import trio

from trivmm.bus.ticket import Ticket
from trivmm.hypervisor.base import Outcome
from trivmm.nursery.vcpu import PARK_SLICE_S, Operation, Vcpu, VcpuRunState
from trivmm.testing.miniboard import BareDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.setup import DriverSetup

__all__ = ["OwnerScopedDevice", "OwnerScopedServicer", "WallBarrierVcpu"]


class OwnerScopedServicer:
    """Serves activations only while the control loop owns the VM: between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.Event](16)
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    async def start(self, control_loop: trio.Nursery) -> None:
        self._nursery = control_loop
        self._scope = trio.CancelScope()
        await control_loop.start(self._serve)

    async def _serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._scope:
            task_status.started()
            async for done in self._receive:
                done.set()

    def stop(self) -> None:
        """The VM changes hands, and the task that drained activations goes with its owner."""
        self._scope.cancel()

    async def restart(self) -> None:
        assert self._nursery is not None
        await self.start(self._nursery)

    async def activate(self) -> None:
        done = trio.Event()
        await self._send.send(done)
        await done.wait()


class OwnerScopedDevice(BareDevice):
    """A device whose activation needs the owner-scoped servicer."""

    def __init__(self, servicer: OwnerScopedServicer) -> None:
        super().__init__()
        self._servicer = servicer

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        await self._servicer.activate()
        await super().activate(setup, handles, workers)


class WallBarrierVcpu(Vcpu):
    """Waits at the barrier like a wall: neither pause nor stop gets through until the device is settled."""

    def _wait_at_barrier(self, barrier: Ticket) -> Generator[Operation, Outcome | None, None]:
        self._enter(VcpuRunState.AT_BARRIER)
        while not barrier.settled:
            yield PARK_SLICE_S
