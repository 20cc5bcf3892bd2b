"""The bus-master bit of PCI (command register, bit 2): without it a device touches no guest memory and sends no
interrupt. A kexec or crash kernel relies on that: it clears the bit of devices that it knows nothing else about.

Real devices and worker threads; scripted vCPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm._native import lib
from trivmm.machine.board import Board, DeviceSlot
from trivmm.machine.build import build_board
from trivmm.machine.machine import Machine, open_machine
from trivmm.memory import layout
from trivmm.state.codec import state_from_json, state_to_json
from trivmm.state.stage import Stage
from trivmm.state.virtio import LifeStage
from trivmm.testing.script_driver import BUS_MASTER, MEMORY, ScriptDriver, pci_read, pci_write
from trivmm.testing.scripted import Compute, MmioRead, ScriptedHypervisor

LIMIT_S = 30
BUFFER, LENGTH = 0x200000, 64
MESSAGE = (0xFEE0_0000, 0x51)
BOTH = MEMORY | BUS_MASTER

Script = Callable[["Guest", Any, ScriptDriver], Iterator[Any]]


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig("none"),
        memory=MemoryConfig(8 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(pause=10, quiesce=10, device_stop=10, vcpu_stop=10, activation=10),
    )


class Guest:
    """Runs a script with the driver of its rng, once; in a second life, after a move, ``after``."""

    def __init__(self, script: Script, after: Script | None = None) -> None:
        self.script, self.after = script, after
        self.done = trio.Event()
        self.board: Board | None = None

    @property
    def rng(self) -> DeviceSlot:
        assert self.board is not None
        return self.board.devices[1]

    def works(self) -> bool:
        """Whether a thread of the device exists, which could touch memory."""
        return bool(self.rng.backend._workers)

    def sends(self) -> bool:
        return MESSAGE in {message[1:] for message in self.rng.transport._vm.msi.values()}

    def __call__(self, cpu: Any) -> Iterator[Any]:
        driver = ScriptDriver(2, layout.BAR64_END - 0x80000, 0x100000)
        script = self.script
        if cpu.registers.get("moved"):
            assert self.after is not None
            script, driver.offered = self.after, cpu.registers["offered"]
        yield from script(self, cpu, driver)
        cpu.registers |= {"moved": True, "offered": driver.offered}
        self.done.set()
        while True:
            yield Compute(1)


def house(board: Board, guest: Guest, stage: Stage = Stage.DETACHED) -> AbstractAsyncContextManager[Machine]:
    """The machine; a guest that crashes is done, too."""
    return open_machine(board, board.config.deadlines, stage=stage, on_guest_request=guest.done.set)


async def run(config: VmConfig, guest: Guest) -> tuple[Any, bytes]:
    """The state of the machine after the script, as JSON, and its RAM."""
    board = guest.board = build_board(config, ScriptedHypervisor(guest, needs_payload=False))
    try:
        with trio.fail_after(LIMIT_S):
            async with open_machine(board, config.deadlines, on_guest_request=guest.done.set) as machine:
                await machine.resume()
                await guest.done.wait()
                assert machine.crash is None, machine.crash
                await machine.stop(LIMIT_S)
                state = json.loads(json.dumps(state_to_json(machine.save())))
                return state, board.memory.read(0, config.memory.size)
    finally:
        board.close()


async def run_there(config: VmConfig, guest: Guest, value: Any, ram: bytes) -> None:
    board = guest.board = build_board(config, ScriptedHypervisor(guest, needs_payload=False), incoming=True)
    guest.done = trio.Event()
    try:
        with trio.fail_after(LIMIT_S):
            async with house(board, guest, Stage.UNLOCKED) as machine:
                board.memory.write(0, ram)
                await machine.load(state_from_json(value))
                await machine.take_locks()
                await machine.start()
                await guest.done.wait()
                assert machine.crash is None, machine.crash
    finally:
        board.close()


def set_vector(driver: ScriptDriver) -> Iterator[Any]:
    """Vector 1, unmasked, and MSI-X on."""
    for offset, value in ((0, MESSAGE[0]), (4, 0), (8, MESSAGE[1]), (12, 0)):
        yield from driver.write(0x8000 + 16 + offset, 4, value)
    at = yield from pci_read(driver.slot, 0x34, 1)
    while (yield from pci_read(driver.slot, at, 1)) != 0x11:
        at = yield from pci_read(driver.slot, at + 1, 1)
    yield from pci_write(driver.slot, at + 2, 0x8000, 2)


def filled(cpu: Any) -> bool:
    return bool(cpu.vm.fetch(BUFFER, LENGTH) != bytes(LENGTH))


async def test_nothing_is_served_before_the_bit_is_set_and_everything_after(config: VmConfig) -> None:
    """Set after DRIVER_OK; what was queued meanwhile is served, notified or not."""

    def script(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
        yield from driver.place(MEMORY)
        yield from set_vector(driver)
        assert not guest.sends()
        assert (yield from driver.activate(vector=1)) == 15, "the device is active, as it says"
        assert guest.rng.transport.state.stage is LifeStage.ACTIVE
        assert not guest.works()
        yield from driver.offer(BUFFER, LENGTH)
        assert not guest.works()
        assert not filled(cpu)
        yield from driver.command(BOTH)
        assert guest.sends()
        yield from driver.until_used(cpu, 1)
        assert filled(cpu)

    await run(config, Guest(script))


async def test_a_driver_that_only_adds_the_bit_is_served(config: VmConfig) -> None:
    """One that trusts firmware to have turned memory on (Hermit's)."""

    def script(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
        yield from driver.command(BUS_MASTER)
        assert (yield from driver.activate()) == 15
        yield from driver.offer(BUFFER, LENGTH)
        yield from driver.until_used(cpu, 1)

    await run(config, Guest(script))


def clears_it(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
    yield from driver.place(BOTH)
    yield from set_vector(driver)
    assert guest.sends()
    yield from driver.activate(vector=1)
    yield from driver.offer(BUFFER, LENGTH)
    yield from driver.until_used(cpu, 1)
    yield from driver.command(MEMORY)
    assert (yield from driver.status()) == 15
    assert not guest.works(), "once the write is done, nothing of the device runs"
    assert not guest.sends()
    yield from driver.offer(BUFFER, LENGTH)
    lib.tv_irq_signal(guest.rng.transport.handles.queues[0].irq, lib.TV_ISR_QUEUE)
    pending = int.from_bytes((yield MmioRead(driver.bar + 0x48000, 8)), "little")
    assert pending == 0b10, "its interrupts are kept"
    assert driver.used(cpu) == 1


def sets_it(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
    assert not guest.works()
    assert not guest.sends()
    assert (yield from driver.status()) == 15
    yield from driver.command(BOTH)
    assert guest.sends()
    pending = int.from_bytes((yield MmioRead(driver.bar + 0x48000, 8)), "little")
    assert pending == 0, "the hypervisor has it"
    yield from driver.until_used(cpu, 2)
    yield from driver.offer(BUFFER, LENGTH)
    yield from driver.until_used(cpu, 3)


async def test_clearing_it_stops_queues_and_interrupts_and_setting_it_goes_on_from_there(config: VmConfig) -> None:
    def script(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
        yield from clears_it(guest, cpu, driver)
        yield from sets_it(guest, cpu, driver)

    await run(config, Guest(script))


async def test_it_moves(config: VmConfig) -> None:
    guest = Guest(clears_it, sets_it)
    value, ram = await run(config, guest)
    assert value["devices"]["__rng"]["life"]["stage"] == "active"
    assert value["devices"]["__rng"]["transport"]["msix"]["pending"] == [1]
    await run_there(config, guest, value, ram)


async def test_a_reset_and_a_new_driver_do_not_depend_on_it(config: VmConfig) -> None:
    def script(guest: Guest, cpu: Any, driver: ScriptDriver) -> Iterator[Any]:
        yield from clears_it(guest, cpu, driver)
        assert (yield from driver.reset()) == 0
        assert (yield from driver.activate()) == 15
        yield from driver.command(MEMORY)
        assert not guest.works()
        yield from driver.command(BOTH)
        yield from driver.offer(BUFFER, LENGTH)
        yield from driver.until_used(cpu, 1)

    await run(config, Guest(script))
