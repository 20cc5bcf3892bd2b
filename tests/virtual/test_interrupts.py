"""Interrupts are all connected or none: a step of the hypervisor's that fails half way is undone, or made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import ConsoleConfig, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.errors import HypervisorError
from trivmm.machine.board import Board
from trivmm.machine.build import build_board
from trivmm.machine.machine import open_machine
from trivmm.testing.scripted import ScriptedHypervisor, ScriptedVm

LIMIT_S = 30


class BrittleVm(ScriptedVm):
    """Strict about what is connected; the ``fails_at``-th change from now on fails, and so many after it as
    ``then_fails`` says. Such a change changes nothing."""

    def __init__(self) -> None:
        super().__init__(())
        self.lines: dict[int, int] = {}
        self.fails_at = self.then_fails = 0
        self.changes = 0

    def _change(self, fits: bool) -> None:
        assert fits, "connected twice, or disconnected twice"
        self.changes += 1
        if self.fails_at and self.fails_at <= self.changes <= self.fails_at + self.then_fails:
            raise HypervisorError("KVM_IRQFD", "no memory")

    def connect_irq(self, fd: int, gsi: int) -> None:
        self._change(gsi not in self.lines)
        self.lines[gsi] = fd

    def disconnect_irq(self, fd: int, gsi: int) -> None:
        self._change(self.lines.get(gsi) == fd)
        del self.lines[gsi]

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        self._change(fd not in [each for each, _, _ in self.msi.values()])
        return super().connect_msi(fd, address, data)

    def disconnect_msi(self, token: int) -> None:
        self._change(token in self.msi)
        super().disconnect_msi(token)

    def connected(self) -> set[Any]:
        return {*self.lines.items(), *self.msi.values()}


class Brittle(ScriptedHypervisor):
    def open_vm(self) -> ScriptedVm:
        return BrittleVm()


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig("none"),
        memory=MemoryConfig(8 << 20),
        disks=(DiskConfig(str(disk)),),
        console=ConsoleConfig("Null"),
        deadlines=Deadlines(pause=10, quiesce=10),
    )


def unmask_all(board: Board) -> int:
    """As a driver does, with a message of its own for each vector. Gives how many there are."""
    count = 0
    for slot in board.devices:
        transport = slot.transport
        at = transport.config.read(0x34, 1)[0]
        while transport.config.read(at, 1) != b"\x11":
            at = transport.config.read(at + 1, 1)[0]
        transport.config_write(at + 2, b"\x00\x80")
        transport.config_write(4, b"\x06\x00")  # memory, bus master
        for vector in range(len(transport.msix)):
            count += 1
            for offset, value in ((0, 0xFEE0_0000), (8, 0x40 + count), (12, 0)):
                transport.bar_write(0, 0x8000 + 16 * vector + offset, value.to_bytes(4, "little"))
    return count


async def test_after_a_stop_that_fails_half_way_all_interrupts_are_connected(config: VmConfig) -> None:
    at = 0
    while True:
        at += 1
        board = build_board(config, Brittle(needs_payload=False))
        vm = board.vm
        assert isinstance(vm, BrittleVm)
        try:
            with trio.fail_after(LIMIT_S):
                async with open_machine(board, config.deadlines) as machine:
                    await machine.resume()
                    vectors = unmask_all(board)
                    before = vm.connected()
                    assert len(before) == vectors + 2
                    vm.changes, vm.fails_at = 0, at
                    try:
                        await machine.stop(LIMIT_S)
                    except HypervisorError:
                        assert vm.connected() == before, f"change {at} of them failed"
                        assert all(slot.transport.msix.live for slot in board.devices)
                    else:
                        assert at == len(before) + 1, "each change has failed once"
                        assert vm.connected() == set()
                    vm.fails_at = 0
                    await machine.stop(LIMIT_S)
                    assert vm.connected() == set()
                    await machine.undo()
                    assert vm.connected() == before
        finally:
            board.close()
        if at > len(before):
            break


async def test_connecting_that_failed_half_way_is_made_whole_at_the_next_try(config: VmConfig) -> None:
    for at in (1, 2):  # the two lines; a vector that can't be is the guest's mistake, and counted
        board = build_board(config, Brittle(needs_payload=False))
        vm = board.vm
        assert isinstance(vm, BrittleVm)
        try:
            with trio.fail_after(LIMIT_S):
                async with open_machine(board, config.deadlines) as machine:
                    vm.fails_at = at
                    with pytest.raises(HypervisorError, match="no memory"):
                        await machine.resume()
                    await machine.resume()
                    assert len(vm.lines) == 2
        finally:
            board.close()


async def test_an_undo_tries_again_where_connecting_fails_too(config: VmConfig) -> None:
    """A kernel that is short of memory for a moment: the guest does not stay without its interrupts."""
    board = build_board(config, Brittle(needs_payload=False))
    vm = board.vm
    assert isinstance(vm, BrittleVm)
    try:
        with trio.fail_after(LIMIT_S):
            async with open_machine(board, config.deadlines) as machine:
                await machine.resume()
                before = vm.connected()
                await machine.stop(LIMIT_S)
                vm.changes, vm.fails_at, vm.then_fails = 0, 1, 1
                await machine.undo()
                assert vm.connected() == before
    finally:
        board.close()
