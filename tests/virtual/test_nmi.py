"""An NMI is given to parked vCPUs: a pause, an injection and a resume, or nothing at all."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import HypervisorError, PauseTimeout
from trivmm.machine.machine import Machine, open_machine
from trivmm.testing.miniboard import MiniBoard
from trivmm.testing.scripted import Compute, ScriptedVcpu, Wedge

Guest = Generator[Any, bytes | None, None]
Clock = trio.testing.MockClock


def beat(cpu: ScriptedVcpu) -> Guest:
    while True:
        yield Compute(0.1)
        cpu.registers["beats"] = cpu.registers.get("beats", 0) + 1


def wedged(cpu: ScriptedVcpu) -> Guest:
    yield Compute(1)
    yield Wedge(10)
    yield from beat(cpu)


def beats(board: MiniBoard) -> list[int]:
    return [cpu.registers.get("beats", 0) for cpu in board.cpus]


def all_paused(machine: Machine) -> bool:
    return all(vcpu.is_paused() for vcpu in machine.vcpus.vcpus)


async def test_every_vcpu_gets_one_while_all_are_parked_and_runs_again(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines = Deadlines()
    board = MiniBoard([], beat, beat, deadlines=deadlines)
    async with open_machine(board, deadlines) as machine:
        parked: list[bool] = []

        def inject(cpu: ScriptedVcpu) -> None:
            parked.append(all_paused(machine))
            cpu.calls.append("inject_nmi")

        monkeypatch.setattr(ScriptedVcpu, "inject_nmi", inject)
        await machine.resume()
        await trio.sleep(1)
        await machine.nmi()
        assert [cpu.calls for cpu in board.cpus] == [["inject_nmi"], ["inject_nmi"]]
        assert parked == [True, True]
        before = beats(board)
        await trio.sleep(1)
        assert all(late > early + 5 for early, late in zip(before, beats(board), strict=True))


async def test_a_paused_machine_stays_paused(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([], beat, deadlines=deadlines)
    async with open_machine(board, deadlines) as machine:
        await machine.resume()
        await machine.pause()
        before = beats(board)
        await machine.nmi()
        await trio.sleep(2)
        assert board.cpus[0].calls == ["inject_nmi"]
        assert all_paused(machine)
        assert beats(board) == before


@pytest.mark.parametrize("refusing", [0, 1, 2])
async def test_one_that_fails_at_a_vcpu_has_reached_those_before_it(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, refusing: int
) -> None:
    """The kernel has no way to take one back; whoever asked is told, and the machine runs on."""
    deadlines = Deadlines()
    board = MiniBoard([], beat, beat, beat, deadlines=deadlines)

    def inject(cpu: ScriptedVcpu) -> None:
        if cpu is board.cpus[refusing]:
            raise HypervisorError("KVM_NMI", "refused")
        cpu.calls.append("inject_nmi")

    monkeypatch.setattr(ScriptedVcpu, "inject_nmi", inject)
    async with open_machine(board, deadlines) as machine:
        await machine.resume()
        with pytest.raises(HypervisorError, match="KVM_NMI"):
            await machine.nmi()
        assert [cpu.calls for cpu in board.cpus] == [["inject_nmi"]] * refusing + [[]] * (3 - refusing)
        before = beats(board)
        await trio.sleep(1)
        assert all(late > early + 5 for early, late in zip(before, beats(board), strict=True))


async def test_a_vcpu_that_does_not_stop_for_it_spoils_it_for_all(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([], beat, wedged, deadlines=deadlines)
    async with open_machine(board, deadlines) as machine:
        await machine.resume()
        await trio.sleep(2)
        with pytest.raises(PauseTimeout, match="vcpu1"):
            await machine.nmi()
        assert [cpu.calls for cpu in board.cpus] == [[], []]
        before = beats(board)
        await trio.sleep(11)
        assert all(late > early + 5 for early, late in zip(before, beats(board), strict=True))
