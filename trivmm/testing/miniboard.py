"""The smallest board: scripted vCPUs and devices whose only register is device_status, at ``status_gpa(i)``.

For tests of lifetimes, pauses and activation where PCI and rings would only be in the way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import attrs
import trio

from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, Effect, Range
from trivmm.deadlines import Deadlines
from trivmm.nursery.activation import DeviceLifecycle
from trivmm.testing.scripted import Script, ScriptedHypervisor
from trivmm.virtio.port import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Activation

__all__ = ["DRIVER_READY", "BareDevice", "BareTransport", "MiniBoard", "status_gpa"]

DRIVER_READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
STATUS_SPAN = 0x1000


def status_gpa(device: int) -> int:
    return 0xD000_0000 + STATUS_SPAN * device


@attrs.define(eq=False)
class BareDevice:
    """A device without queues. ``on_activate`` runs inside ``activate``; ``log`` keeps what was asked of it."""

    name: str = "_dev0"
    on_activate: Callable[[int], Awaitable[None]] | None = None
    on_stop: Callable[[], Awaitable[None]] | None = None
    device_type: int = 4
    features: int = 1 << 32
    queue_sizes: tuple[int, ...] = ()
    config_size: int = 0
    log: list[str] = attrs.field(factory=list)
    active: int | None = None
    locked: bool = True

    def read_config(self, offset: int, size: int) -> bytes:
        return b"\xff" * size

    def write_config(self, offset: int, data: bytes) -> None:
        return None

    async def activate(self, activation: Activation, workers: trio.Nursery) -> None:
        self.log.append(f"activate {activation.generation}")
        if self.on_activate is not None:
            await self.on_activate(activation.generation)
        self.active = activation.generation
        self.log.append(f"active {activation.generation}")

    async def stop(self) -> None:
        if self.on_stop is not None:
            await self.on_stop()
        self.active = None
        self.log.append("stop")

    def positions(self) -> tuple[tuple[int, int, int], ...]:
        return ()

    def reset(self) -> None:
        self.log.append("reset")

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    def become(self, described: dict[str, Any]) -> None:
        return None

    def release_locks(self) -> None:
        self.locked = False

    def take_locks(self) -> None:
        self.locked = True

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        return None


@attrs.define(eq=False)
class BareTransport:
    config_changes: int = 0
    resets: int = 0

    def reset_registers(self) -> bool:
        self.resets += 1
        return True

    def signal_config_change(self) -> None:
        self.config_changes += 1

    def bump_config_generation(self) -> None:
        return None


@attrs.frozen(eq=False)
class Slot:
    backend: BareDevice
    transport: BareTransport
    lifecycle: DeviceLifecycle


@attrs.frozen(eq=False)
class StatusRegister:
    """A device's only register, as the bus sees it."""

    lifecycle: DeviceLifecycle

    def read(self, offset: int, size: int) -> bytes:
        return self.lifecycle.read_status().to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> Effect:
        return self.lifecycle.write_status(
            data[0], lambda: True, lambda generation: Activation(generation, 1 << 32, ())
        )


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


class MiniBoard:
    """Give it devices and one script per vCPU, and run it with ``open_machine(board, deadlines)``.

    ``interrupts`` and ``stuck`` record what the machine did."""

    def __init__(self, devices: Sequence[BareDevice], *scripts: Script, deadlines: Deadlines) -> None:
        self.hypervisor = ScriptedHypervisor(*scripts)
        self.vm = self.hypervisor.open_vm()
        self.cpus = [self.vm.create_vcpu(index) for index in range(len(scripts))]
        self.lines = {"serial": _Line()}
        self.events: list[tuple[str, str, int]] = []
        self.stuck: list[str] = []
        self.interrupts: list[str] = []
        self.pio, self.mmio = AddressSpace("pio"), AddressSpace("mmio")
        self.devices = []
        for index, device in enumerate(devices):
            transport = BareTransport()
            lifecycle = DeviceLifecycle(device, transport, deadlines, lambda *event: self.events.append(event))
            self.devices.append(Slot(device, transport, lifecycle))
            self.mmio.insert(Range(status_gpa(index), STATUS_SPAN, StatusRegister(lifecycle), device.name))

    def bus(self) -> Bus:
        return Bus(self.pio, self.mmio, self.hypervisor.clock)

    def connect_interrupts(self) -> None:
        self.interrupts.append("connect")

    def disconnect_interrupts(self) -> None:
        self.interrupts.append("disconnect")

    def give_locks(self) -> None:
        for slot in self.devices:
            slot.backend.release_locks()

    def thaw(self) -> None:
        return None

    def note_stuck(self, what: str, *, in_use: bool = False) -> None:
        self.stuck.append(what)
