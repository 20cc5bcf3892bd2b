"""The blocks in which a VM lives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from trivmm.config import VmConfig
from trivmm.events import EventBus
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.unwrapped import unwrapped_nursery
from trivmm.vm.vm import Vm

__all__ = ["open_vm", "vm_scope"]


@asynccontextmanager
async def vm_scope(
    config: VmConfig, hypervisor: Hypervisor, events: EventBus | None = None
) -> AsyncIterator[tuple[Vm, trio.Nursery]]:
    """The VM nursery with its control loop, and the bounded end. What the body raises leaves it unwrapped.

    ``events`` None makes a bus that ends with the VM; one that is given is its owner's to close."""
    bus = EventBus() if events is None else events
    async with unwrapped_nursery() as nursery:
        vm = Vm(config, hypervisor, nursery, bus)
        nursery.start_soon(vm._control, name="control loop")
        try:
            yield vm, nursery
        finally:
            with trio.CancelScope(shield=True):  # bounded inside, see _close
                await vm._close()
            if events is None:
                bus.close()
            nursery.cancel_scope.cancel()


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
