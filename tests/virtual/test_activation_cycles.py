"""Eight devices that two vCPUs reset and activate without rest, in virtual time, while their owner pauses, stops and
undoes: each activation is settled, whatever came in between, and no vCPU stays at a barrier."""

from __future__ import annotations

import random
from collections.abc import Generator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.machine.machine import Machine, open_machine
from trivmm.testing.miniboard import DRIVER_READY, BareDevice, MiniBoard, status_gpa
from trivmm.testing.scripted import Compute, MmioRead, MmioWrite

DEVICES = 8
NEEDS_RESET = 64
LONGEST_S = 0.08  # of an activation; the deadline is LIMIT_S
LIMIT_S = 0.07


def cycling(
    draw: random.Random, mine: range, others: range, cycles: int, done: trio.Event, cpu: Any
) -> Generator[Any, bytes | None, None]:
    """Cycles the devices ``mine``, one after the other, and now and then resets one of the other vCPU's."""
    seen = cpu.registers
    for number in range(cycles):
        gpa = status_gpa(mine[number % len(mine)])
        yield MmioWrite(gpa, b"\0")
        yield MmioWrite(gpa, bytes([DRIVER_READY]))
        status = (yield MmioRead(gpa, 1))[0]  # type: ignore[index]
        what = {DRIVER_READY: "active", DRIVER_READY | NEEDS_RESET: "failed", 0: "reset"}.get(status, f"{status:#x}")
        seen[what] = seen.get(what, 0) + 1
        if draw.random() < 0.1:
            yield Compute(draw.random() / 100)
        if draw.random() < 0.4:  # few of these come while the other vCPU waits for that very device
            yield MmioWrite(status_gpa(draw.choice(others)), b"\0")
    done.set()


async def disturb(draw: random.Random, machine: Machine, counts: dict[str, int]) -> None:
    """As an owner does: a pause, or a switchover that is undone."""
    while True:
        await trio.sleep(draw.random() / 5)
        if draw.random() < 0.5:
            await machine.pause()
            await trio.sleep(draw.random() / 20)
            await machine.resume()
            counts["pauses"] += 1
        else:
            await machine.stop(5.0)
            await trio.sleep(draw.random() / 20)
            await machine.undo()
            counts["switchovers"] += 1


@pytest.mark.parametrize("cycles", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_no_barrier_is_stuck(autojump_clock: trio.testing.MockClock, cycles: int) -> None:
    draw = random.Random(cycles)

    async def activate(number: int) -> None:
        await trio.sleep(draw.choice((0, 0, 0, 0.001, 0.01, draw.random() * LONGEST_S)))

    deadlines = Deadlines(activation=LIMIT_S)
    devices = [BareDevice(f"_dev{number}", on_activate=activate) for number in range(DEVICES)]
    halves = range(DEVICES // 2), range(DEVICES // 2, DEVICES)
    done = trio.Event(), trio.Event()
    scripts = [
        partial(cycling, random.Random(cycles + at), halves[at], halves[1 - at], cycles // 2, done[at])
        for at in range(2)
    ]
    board = MiniBoard(devices, *scripts, deadlines=deadlines)
    counts = {"pauses": 0, "switchovers": 0}
    async with open_machine(board, deadlines) as machine, trio.open_nursery() as nursery:
        await machine.resume()
        nursery.start_soon(disturb, draw, machine, counts)
        with trio.fail_after(cycles):  # virtual seconds: each cycle takes a hundredth or so
            for each in done:
                await each.wait()
        nursery.cancel_scope.cancel()
    seen = {what: sum(cpu.registers.get(what, 0) for cpu in board.cpus) for what in ("active", "failed", "reset")}
    assert sum(seen.values()) == cycles // 2 * 2, [cpu.registers for cpu in board.cpus]
    assert all(seen.values()), "each way to be settled was met"
    assert all(counts.values())
    assert board.stuck == []
