"""The verbs of the service, and the block in which it lives."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from trivmm.config import VmConfig
from trivmm.deadlines import Deadlines
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.migration.source.sender import socket_dialer
from trivmm.unwrapped import unwrapped_nursery
from trivmm.virtio.kinds import KINDS
from trivmm.vm import Dial, PciDeviceInfo, Vm, open_vm
from trivmm.vmm.core import VmmEnd, VmmOptions
from trivmm.vmm.moves import VmmMoves
from trivmm.vmm.slot import Result, Slot

__all__ = ["Vmm", "open_vmm"]


class Takeable(Protocol):
    """Open descriptors that are somebody's until they are taken."""

    @property
    def fds(self) -> tuple[int, ...]: ...

    def take(self) -> tuple[int, ...]: ...


class Vmm(VmmMoves):
    """The service. Its methods are the API's verbs; they raise ``TrivmmError`` and never end the nursery."""

    def shut_down(self) -> None:
        """vmm.shutdown: answers at once; the owner of the ``open_vmm`` block ends it."""
        self._finish(VmmEnd("asked"))

    async def create(self, config: VmConfig) -> Vm:
        """:raises WrongState: there is one. :raises ConfigError: / :raises HypervisorError: it can't be."""
        slot = self._take("create")
        outcome: Result[Vm] = Result()
        self._nursery.start_soon(
            self._live, slot, open_vm(config, hypervisor=self.hypervisor, events=self.events), _same, outcome
        )
        return await outcome.get()

    async def delete(self) -> None:
        """End the VM, whatever its state, and forget it. Without one there is nothing to do."""
        if self._slot is None:
            return
        self._changing("delete")
        await self._close()

    async def boot(self) -> None:
        self._changing("boot")
        vm, slot = self.vm, self._slot
        await vm.boot()
        if slot is not None:
            slot.booted.set()
            slot.booted = trio.Event()

    async def pause(self) -> None:
        self._changing("pause")
        await self.vm.pause()

    async def resume(self) -> None:
        self._changing("resume")
        await self.vm.resume()

    async def shutdown(self) -> None:
        self._changing("shutdown")
        await self.vm.shutdown()

    async def reboot(self) -> None:
        self._changing("reboot")
        await self.vm.reboot()

    async def nmi(self) -> None:
        self._changing("nmi")
        await self.vm.nmi()

    async def power_button(self) -> None:
        self._changing("power-button")
        await self.vm.power_button()

    async def add_device(self, config: Any, passed: Takeable | None = None) -> PciDeviceInfo | None:
        """See :meth:`Vm.add_device`. ``passed`` are descriptors that ``config`` names: taken where it is added, and
        kept as long as the VM's configuration has them."""
        self._changing("add-device")
        slot, vm = self._slot, self.vm
        try:
            return await vm.add_device(config)
        finally:
            if passed is not None and slot is not None:
                self._keep(slot, vm, passed)

    @staticmethod
    def _keep(slot: Slot, vm: Vm, passed: Takeable) -> None:
        named = {fd for kind in KINDS for fd in kind.descriptors_of(vm.config)}
        if named.intersection(passed.fds):
            slot.descriptors += passed.take()
        for fd in [fd for fd in slot.descriptors if fd not in named]:  # of devices that were removed
            slot.descriptors.remove(fd)
            os.close(fd)

    async def remove_device(self, name: str) -> None:
        self._changing("remove-device")
        await self.vm.remove_device(name)

    async def resize_disk(self, name: str, size: int) -> None:
        self._changing("resize-disk")
        await self.vm.resize_disk(name, size)

    async def resize(self, vcpus: int | None, ram: int | None, balloon: int | None) -> None:
        """The balloon; else as far as there is nothing to do: hotplug of vCPUs and memory is not there yet. A VM that
        was never booted is changed on paper.

        :raises NotSupported: naming what would have to change."""
        self._changing("resize")
        await self.vm.resize(vcpus, ram, balloon)


async def _same(vm: Vm) -> Vm:
    return vm


@asynccontextmanager
async def open_vmm(
    hypervisor: Hypervisor,
    *,
    deadlines: Deadlines | None = None,
    options: VmmOptions | None = None,
    events: EventBus | None = None,
    dial: Dial = socket_dialer,
    told_to_end: Callable[[], str | None] = lambda: None,
) -> AsyncIterator[Vmm]:
    """The service for the length of the block; at its end a migration rolls back and the VM ends, each bounded.
    ``told_to_end`` says by what the process was told to end, as soon as that is known: no VM is taken in any more.

    ``events`` is closed at the end, after its last event. ``hypervisor`` stays the caller's: it
    closes it. What the block raises leaves it unwrapped."""
    bus = events or EventBus()
    bus.emit("vmm", "starting")
    try:
        async with unwrapped_nursery() as nursery:
            yield Vmm(hypervisor, deadlines or Deadlines(), options or VmmOptions(), bus, nursery, dial, told_to_end)
            nursery.cancel_scope.cancel()
    finally:
        bus.emit("vmm", "shutdown")
        bus.close()
