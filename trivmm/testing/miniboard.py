"""The smallest board: scripted vCPUs and devices whose only registers are device_status, at ``status_gpa(i)``, and the
bus-master bit, set at first, at ``bus_gpa(i)``.

For tests of lifetimes, pauses and activation where PCI and rings would only be in the way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs
import trio

from trivmm.bus.bus import Bus
from trivmm.bus.lock import BoundedLock
from trivmm.bus.space import AddressSpace, Effect, Range
from trivmm.deadlines import Deadlines
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import ActivationActor
from trivmm.state.virtio import QueueState
from trivmm.testing.scripted import Script, ScriptedHypervisor
from trivmm.virtio.device import DeviceDescription, NoState
from trivmm.virtio.handles import DeviceHandles, QueueHandle
from trivmm.virtio.life import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, DeviceState
from trivmm.virtio.port import Storage
from trivmm.virtio.setup import VERSION_1, DeviceLimits, DriverSetup
from trivmm.virtio.status import StatusRegister

__all__ = ["DRIVER_READY", "BareDevice", "MiniBoard", "bus_gpa", "status_gpa"]

DRIVER_READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
STATUS_SPAN = 0x1000


def status_gpa(device: int) -> int:
    return 0xD000_0000 + STATUS_SPAN * device


def bus_gpa(device: int) -> int:
    return status_gpa(device) + 4


@attrs.define(eq=False)
class BareDevice:
    """A device whose queues nobody serves. ``on_activate(number)`` runs inside the so-manieth ``activate``; ``log``
    keeps what was asked of it; ``active`` is the activation that it works for."""

    name: str = "_dev0"
    on_activate: Callable[[int], Awaitable[None]] | None = None
    on_stop: Callable[[], Awaitable[None]] | None = None
    device_type: int = 4
    features: int = VERSION_1
    queue_sizes: tuple[int, ...] = ()
    state_type: type = NoState
    description_type: type = DeviceDescription
    log: list[str] = attrs.field(factory=list)
    active: int | None = None
    activations: int = 0
    queues: tuple[QueueState, ...] = ()
    storage: Storage | None = None

    def read_config(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write_config(self, offset: int, data: bytes) -> None:
        return None

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        self.activations += 1
        number = self.activations
        self.queues = setup.queues
        self.log.append(f"activate {number}")
        if self.on_activate is not None:
            await self.on_activate(number)
        self.active = number
        self.log.append(f"active {number}")

    async def stop(self) -> None:
        if self.on_stop is not None:
            await self.on_stop()
        self.active = None
        self.log.append("stop")

    def reset(self) -> None:
        self.log.append("reset")

    def save(self) -> Any:
        return NoState()

    def load(self, state: Any) -> None:
        return None

    def describe(self) -> Any:
        return DeviceDescription(self.device_type, self.features, self.queue_sizes)

    def become(self, described: Any) -> None:
        return None

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        return None


@attrs.frozen(eq=False)
class Slot:
    """On the bus it is the status register, and at offset 4 whether it is a bus master. ``queues`` are what the driver
    has set up."""

    queues: tuple[QueueState, ...]
    backend: BareDevice
    state: DeviceState
    register: StatusRegister
    handles: DeviceHandles
    actor: ActivationActor

    def read(self, offset: int, size: int) -> bytes:
        with self.state.lock:
            return self.register.read().to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> Effect:
        with self.state.lock:
            if offset:
                return self.register.set_bus_master(bool(data[0]))
            return self.register.write(data[0], DriverSetup(VERSION_1, self.queues))


class _Line:
    async def run(self) -> None:
        await trio.sleep_forever()

    async def drain(self, at_most_s: float) -> None:
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def release(self) -> None:
        return None

    def retake(self) -> None:
        return None


class _NoHotplug:
    """Nothing is ever ejected."""

    ejected: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None


class MiniBoard:
    """Give it devices and one script per vCPU, and run it with ``open_machine(board, deadlines)``.

    ``interrupts`` and ``stuck`` record what the machine did."""

    def __init__(self, devices: Sequence[BareDevice], *scripts: Script, deadlines: Deadlines) -> None:
        self.hypervisor = ScriptedHypervisor(*scripts)
        self.vm = self.hypervisor.open_vm()
        self.memory = GuestMemory(())
        self.cpus = [self.vm.create_vcpu(index) for index in range(len(scripts))]
        self.lines = {"serial": _Line()}
        self.events: list[tuple[str, str, int]] = []
        self.stuck: list[str] = []
        self.interrupts: list[str] = []
        self.pio, self.mmio = AddressSpace("pio"), AddressSpace("mmio")
        self.hotplug = _NoHotplug()
        self.devices = []
        for index, device in enumerate(devices):
            state = DeviceState(device.name, BoundedLock(f"the registers of {device.name}", deadlines.lock))
            state.bus_master = True
            register = StatusRegister(state, DeviceLimits(device.features, device.queue_sizes, vectors=1))
            handles = DeviceHandles(len(device.queue_sizes))
            actor = ActivationActor(
                device, state, handles, deadlines, lambda: None, lambda *event: self.events.append(event)
            )
            queues = tuple(attrs.evolve(QueueState.unused(size), enabled=True) for size in device.queue_sizes)
            slot = Slot(queues, device, state, register, handles, actor)
            self.devices.append(slot)
            self.mmio.insert(Range(status_gpa(index), STATUS_SPAN, slot, device.name))

    def bus(self) -> Bus:
        return Bus(self.pio, self.mmio, self.hypervisor.clock)

    def connect_interrupts(self) -> None:
        self.interrupts.append("connect")

    def disconnect_interrupts(self) -> None:
        self.interrupts.append("disconnect")

    @property
    def storages(self) -> list[Storage]:
        return []

    def guest_runs(self, running: bool) -> None:
        return None

    def give_locks(self) -> None:
        return None

    def thaw(self) -> None:
        return None

    def note_stuck(self, what: str, *, in_use: bool = False) -> None:
        self.stuck.append(what)
