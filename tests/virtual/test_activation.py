"""The activation protocol under virtual time: every failure of the family, and the faulty designs that show it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, PauseTimeout
from trivmm.machine.machine import Machine, open_machine
from trivmm.nursery.vcpu import Vcpu, VcpuRunState
from trivmm.state.virtio import LifeStage
from trivmm.testing.doubles import OwnerScopedDevice, OwnerScopedServicer, WallBarrierVcpu
from trivmm.testing.miniboard import DRIVER_READY, BareDevice, MiniBoard, bus_gpa, status_gpa
from trivmm.testing.scripted import Compute, MmioRead, MmioWrite, Wedge

Guest = Generator[Any, bytes | None, None]
Clock = trio.testing.MockClock


def activate(device: int = 0) -> MmioWrite:
    return MmioWrite(status_gpa(device), bytes([DRIVER_READY]))


def reset(device: int = 0) -> MmioWrite:
    return MmioWrite(status_gpa(device), b"\0")


def activating_guest(cpu: Any) -> Guest:
    """Works for a second, activates device 0, then notes the status that it reads back."""
    yield Compute(1)
    yield activate()
    cpu.registers["status"] = (yield MmioRead(status_gpa(0), 1))[0]
    cpu.registers["seen_at"] = trio.current_time()


def beat(cpu: Any) -> Guest:
    while True:
        yield Compute(0.1)
        cpu.registers["beats"] = cpu.registers.get("beats", 0) + 1


@asynccontextmanager
async def running(board: MiniBoard, deadlines: Deadlines, vcpu_type: type[Vcpu] = Vcpu) -> AsyncIterator[Machine]:
    async with open_machine(board, deadlines, vcpu_type=vcpu_type) as machine:
        await machine.resume()
        yield machine


def nap(seconds: float) -> Callable[..., Awaitable[None]]:
    async def wait(*_: object) -> None:
        await trio.sleep(seconds)

    return wait


def slow(seconds: float) -> BareDevice:
    return BareDevice(on_activate=nap(seconds))


async def test_a_slow_activation_holds_the_vcpu_until_it_is_settled(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([slow(3)], activating_guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        began = trio.current_time()
        await trio.sleep(2)
        assert machine.vcpus.vcpus[0].state is VcpuRunState.AT_BARRIER
        await trio.sleep(3)
        assert board.devices[0].state.stage is LifeStage.ACTIVE
        assert board.cpus[0].registers["status"] == DRIVER_READY
        assert board.cpus[0].registers["seen_at"] - began == pytest.approx(4, abs=0.01)


async def test_a_pause_reaches_a_vcpu_at_the_barrier_and_it_parks_there_again(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([slow(4)], activating_guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        before = trio.current_time()
        await machine.pause()
        assert trio.current_time() - before < 0.1, "an activation longer than the pause limit must not fail the pause"
        await machine.resume()
        await trio.sleep(1)
        assert machine.vcpus.vcpus[0].state is VcpuRunState.AT_BARRIER
        await trio.sleep(3)
        assert board.cpus[0].registers["status"] == DRIVER_READY
        assert board.devices[0].backend.log.count("active 1") == 1


# --- the original deadlock, and the two faulty designs ---------------------------------------------------------


@asynccontextmanager
async def migration_owns_the_vm(servicer: OwnerScopedServicer) -> AsyncIterator[None]:
    """The control loop gives the VM away; with it goes whatever lived in its scope."""
    servicer.stop()
    try:
        yield
    finally:
        with trio.move_on_after(1, shield=True):
            await servicer.restart()


async def test_owner_scoped_servicer_plus_wall_barrier_is_the_original_deadlock(autojump_clock: Clock) -> None:
    deadlines = Deadlines(activation=1000)
    servicer = OwnerScopedServicer()
    board = MiniBoard([OwnerScopedDevice(servicer)], activating_guest, deadlines=deadlines)
    async with trio.open_nursery() as control_loop:
        await servicer.start(control_loop)
        async with running(board, deadlines, WallBarrierVcpu) as machine, migration_owns_the_vm(servicer):
            await trio.sleep(5)  # precopy; the guest activates its device in the middle of it
            with pytest.raises(PauseTimeout, match=r"vcpu0 is at barrier.*activation of _dev0"):
                await machine.pause()
        control_loop.cancel_scope.cancel()


async def test_owner_scoped_servicer_plus_our_barrier_pauses_but_never_activates(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    servicer = OwnerScopedServicer()
    board = MiniBoard([OwnerScopedDevice(servicer)], activating_guest, deadlines=deadlines)
    async with trio.open_nursery() as control_loop:
        await servicer.start(control_loop)
        async with running(board, deadlines) as machine, migration_owns_the_vm(servicer):
            await trio.sleep(2)
            await machine.pause()
            await machine.resume()
            await trio.sleep(deadlines.activation + 1)
            assert ("failed", "_dev0", 1) in board.events, "its deadline expires"
            assert board.devices[0].state.stage is LifeStage.NEEDS_RESET
        control_loop.cancel_scope.cancel()


@pytest.mark.parametrize("seconds", [0, 0.5, 4.5])
async def test_ours_passes_both_scripts(autojump_clock: Clock, seconds: float) -> None:
    deadlines = Deadlines()
    board = MiniBoard([slow(seconds)], activating_guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)  # a migration owns the VM by now; nothing of the servicer is in its scope
        await machine.pause()
        await machine.resume()
        await trio.sleep(5)
        await machine.pause()
        await machine.resume()
        assert board.devices[0].state.stage is LifeStage.ACTIVE
        assert board.cpus[0].registers["status"] == DRIVER_READY


# --- the rest of the family ------------------------------------------------------------------------------------


async def test_after_a_pause_timeout_every_vcpu_runs_again(autojump_clock: Clock) -> None:
    def wedged(cpu: Any) -> Guest:
        yield Compute(1)
        yield Wedge(10)

    deadlines = Deadlines()
    board = MiniBoard([], beat, wedged, beat, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        with pytest.raises(PauseTimeout, match="vcpu1") as caught:
            await machine.pause()
        assert "vcpu0" not in str(caught.value)
        assert caught.value.limit_s == deadlines.pause
        before = [board.cpus[index].registers["beats"] for index in (0, 2)]
        await trio.sleep(1)
        after = [board.cpus[index].registers["beats"] for index in (0, 2)]
        assert all(late >= early + 9 for early, late in zip(before, after, strict=True))
        await trio.sleep(10)
        await machine.pause()
        await machine.resume()


async def test_a_reset_from_another_vcpu_voids_the_activation(autojump_clock: Clock) -> None:
    def resetting(cpu: Any) -> Guest:
        yield Compute(2)
        yield reset()
        cpu.registers["after_reset"] = (yield MmioRead(status_gpa(0), 1))[0]

    deadlines = Deadlines()
    board = MiniBoard([slow(4)], activating_guest, resetting, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(3)
        assert board.devices[0].state.stage is LifeStage.RESET
        assert board.cpus[1].registers["after_reset"] == 0
        assert "status" in board.cpus[0].registers, "its barrier opened: the generation is void"
        await trio.sleep(5)
        assert "active 1" not in board.devices[0].backend.log, "no stale activation"
        assert board.devices[0].backend.active is None


async def test_a_reset_reads_zero_only_when_the_old_generation_is_gone(autojump_clock: Clock) -> None:
    def guest(cpu: Any) -> Guest:
        yield activate()
        yield reset()
        cpu.registers["status"] = (yield MmioRead(status_gpa(0), 1))[0]
        cpu.registers["at"] = trio.current_time()

    def watching(cpu: Any) -> Guest:
        yield Compute(0.5)
        cpu.registers["status"] = (yield MmioRead(status_gpa(0), 1))[0]

    deadlines = Deadlines()
    board = MiniBoard([BareDevice(on_stop=nap(1))], guest, watching, deadlines=deadlines)
    async with running(board, deadlines):
        began = trio.current_time()
        await trio.sleep(3)
        assert board.cpus[0].registers["status"] == 0
        assert board.cpus[0].registers["at"] - began >= 1
        assert board.cpus[1].registers["status"] == DRIVER_READY, "another vCPU sees it still going"


async def test_a_failed_activation_opens_the_barrier(autojump_clock: Clock) -> None:
    async def fail(generation: int) -> None:
        raise OSError("no such back end")

    deadlines = Deadlines()
    board = MiniBoard([BareDevice(on_activate=fail)], activating_guest, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(2)
        slot = board.devices[0]
        assert slot.state.stage is LifeStage.NEEDS_RESET
        assert slot.handles.isr == 2, "the configuration-change interrupt"
        assert board.cpus[0].registers["status"] == DRIVER_READY | 64


async def test_a_guest_cannot_flood_the_log_with_failures(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(generation: int) -> None:
        raise OSError("no such back end")

    def again_and_again(cpu: Any) -> Guest:
        for _ in range(200):
            yield activate()
            yield reset()

    deadlines = Deadlines()
    board = MiniBoard([BareDevice(on_activate=fail)], again_and_again, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(60)
        assert board.devices[0].actor.failures == 200
    assert 1 <= len([record for record in caplog.records if "needs a reset" in record.message]) <= 8


async def test_an_activation_past_its_deadline_needs_a_reset_and_can_be_reset(autojump_clock: Clock) -> None:
    def stubborn(cpu: Any) -> Guest:
        yield activate()
        cpu.registers["first"] = (yield MmioRead(status_gpa(0), 1))[0]
        yield reset()
        yield activate()
        cpu.registers["second"] = (yield MmioRead(status_gpa(0), 1))[0]

    async def first_hangs(generation: int) -> None:
        if generation == 1:
            await trio.sleep_forever()

    deadlines = Deadlines()
    board = MiniBoard([BareDevice(on_activate=first_hangs)], stubborn, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(deadlines.activation + 1)
        assert board.cpus[0].registers == {"first": DRIVER_READY | 64, "second": DRIVER_READY}


async def test_devices_activate_side_by_side(autojump_clock: Clock) -> None:
    def second(cpu: Any) -> Guest:
        yield Compute(1)
        yield activate(1)
        cpu.registers["done"] = True

    deadlines = Deadlines()
    board = MiniBoard([slow(4), BareDevice("_dev1")], activating_guest, second, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(2)
        assert board.cpus[1].registers["done"]
        assert "status" not in board.cpus[0].registers


async def test_the_gate_puts_an_activation_off_and_undo_serves_it(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([slow(3)], activating_guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        await machine.stop(1.0)
        state = board.devices[0].state
        assert state.stage is LifeStage.ACTIVATING
        assert state.save().stage is LifeStage.ACTIVATING
        assert board.devices[0].backend.active is None
        await trio.sleep(100)
        assert "active 1" not in board.devices[0].backend.log
        assert board.interrupts == ["connect", "disconnect"]
        await machine.undo()
        await trio.sleep(4)
        assert state.stage is LifeStage.ACTIVE
        assert board.cpus[0].registers["status"] == DRIVER_READY
        assert board.interrupts == ["connect", "disconnect", "connect"]


async def test_an_activation_that_is_stopped_half_way_goes_on_where_its_queues_stood(autojump_clock: Clock) -> None:
    """A worker that was started may have served chains before the gate closed: they are not served again."""
    given: list[int] = []

    async def serve(number: int) -> None:
        (queue,) = device.queues
        given.append(queue.next_avail)
        if number == 1:
            device.queues = (attrs.evolve(queue, next_avail=2, next_used=2),)
            await trio.sleep(3)

    deadlines = Deadlines()
    device = BareDevice(on_activate=serve, queue_sizes=(8,))
    board = MiniBoard([device], activating_guest, deadlines=deadlines)
    slot = board.devices[0]
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        await machine.stop(1.0)
        assert slot.state.stage is LifeStage.ACTIVATING
        assert slot.state.setup is not None
        assert slot.state.setup.queues[0].next_avail == 2, "which moves, too"
        await machine.undo()
        await trio.sleep(1)
        assert slot.state.stage is LifeStage.ACTIVE
        assert given == [0, 2]
    slot.handles.close()


async def test_a_quiesce_that_takes_too_long_is_undone(autojump_clock: Clock) -> None:
    def guest(cpu: Any) -> Guest:
        yield activate()
        yield from beat(cpu)

    deadlines = Deadlines()
    device = BareDevice(on_stop=nap(1))
    board = MiniBoard([device], guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        with pytest.raises(DeadlineError, match=r"quiesce.*_dev0"):
            await machine.stop(0.3)
        beats = board.cpus[0].registers["beats"]
        await trio.sleep(2)
        assert board.cpus[0].registers["beats"] >= beats + 19
        assert board.devices[0].state.stage is LifeStage.ACTIVE
        assert device.active == 2, "its workers run again"


async def test_a_page_crossing_store_is_finished_before_the_pause(autojump_clock: Clock) -> None:
    def guest(cpu: Any) -> Guest:
        yield Compute(1)
        yield (activate(0), activate(1))
        cpu.registers["done"] = True

    deadlines = Deadlines()
    board = MiniBoard([slow(4), BareDevice("_dev1")], guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(2)
        await machine.pause()
        assert board.devices[1].state.generation == 1, "the second half of the instruction was served"
        await machine.resume()
        await trio.sleep(5)
        assert board.cpus[0].registers == {"done": True}


async def test_cancelling_a_pause_rolls_it_back(autojump_clock: Clock) -> None:
    def wedged(cpu: Any) -> Guest:
        yield Wedge(0.5)
        yield from beat(cpu)

    deadlines = Deadlines()
    board = MiniBoard([], wedged, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(0.01)
        with trio.move_on_after(0.2) as scope:
            await machine.pause()
        assert scope.cancelled_caught
        await trio.sleep(2)
        assert board.cpus[0].registers["beats"] > 10


async def test_cancelling_the_body_ends_everything_in_order(autojump_clock: Clock) -> None:
    deadlines = Deadlines()
    board = MiniBoard([slow(4)], activating_guest, deadlines=deadlines)
    with trio.move_on_after(2) as scope:
        async with running(board, deadlines):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert board.stuck == []
    assert board.devices[0].backend.active is None


async def test_a_vcpu_that_never_stops_is_named(autojump_clock: Clock) -> None:
    def wedged(cpu: Any) -> Guest:
        yield Wedge(1e6)

    deadlines = Deadlines()
    board = MiniBoard([], wedged, deadlines=deadlines)
    async with running(board, deadlines):
        await trio.sleep(1)
    assert "vcpu_stop" in board.stuck[0]
    assert "vcpu0" in board.stuck[0]


# --- bus mastering ---------------------------------------------------------------------------------------------


def master(on: bool) -> MmioWrite:
    return MmioWrite(bus_gpa(0), bytes([on]))


async def test_whoever_clears_bus_mastering_waits_until_nothing_works_and_a_pause_reaches_it(
    autojump_clock: Clock,
) -> None:
    def guest(cpu: Any) -> Guest:
        yield activate()
        yield Compute(1)
        yield master(False)
        cpu.registers["at"] = trio.current_time()
        cpu.registers["active"] = device.active
        yield master(True)
        yield from beat(cpu)

    deadlines = Deadlines()
    device = BareDevice(on_stop=nap(1.5))
    board = MiniBoard([device], guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        began = trio.current_time()
        await trio.sleep(2)
        assert machine.vcpus.vcpus[0].state is VcpuRunState.AT_BARRIER
        await machine.pause()
        assert trio.current_time() - began < 2.1
        await machine.resume()
        await trio.sleep(3)
        assert board.cpus[0].registers["at"] - began == pytest.approx(2.5, abs=0.01)
        assert board.cpus[0].registers["active"] is None
        assert device.active is not None, "the bit is set again: it works again"
        assert board.devices[0].state.stage is LifeStage.ACTIVE
        assert board.devices[0].actor.activations == 1, "which is no activation of the driver's"


async def test_bus_mastering_that_is_cleared_in_mid_activation_settles_it_without_queues(autojump_clock: Clock) -> None:
    def clearing(cpu: Any) -> Guest:
        yield Compute(2)
        yield master(False)
        cpu.registers["cleared_at"] = trio.current_time()
        yield Compute(10)
        yield master(True)

    deadlines = Deadlines()
    board = MiniBoard([slow(4)], activating_guest, clearing, deadlines=deadlines)
    device, state = board.devices[0].backend, board.devices[0].state
    async with running(board, deadlines):
        began = trio.current_time()
        await trio.sleep(3)
        assert board.cpus[1].registers["cleared_at"] - began == pytest.approx(2, abs=0.01)
        assert board.cpus[0].registers["status"] == DRIVER_READY
        assert board.cpus[0].registers["seen_at"] - began == pytest.approx(2, abs=0.01)
        assert (state.stage, device.active) == (LifeStage.ACTIVE, None)
        await trio.sleep(20)
        assert device.active is not None


async def test_setting_the_bit_again_lets_go_whoever_waits_for_its_end(autojump_clock: Clock) -> None:
    def clearing(cpu: Any) -> Guest:
        yield activate()
        yield Compute(1)
        yield master(False)
        cpu.registers["went_on"] = trio.current_time()

    def setting(cpu: Any) -> Guest:
        yield Compute(2)
        yield master(True)

    deadlines = Deadlines(device_stop=100)
    board = MiniBoard([BareDevice(on_stop=nap(10))], clearing, setting, deadlines=deadlines)
    async with running(board, deadlines):
        began = trio.current_time()
        await trio.sleep(3)
        assert board.cpus[0].registers["went_on"] - began == pytest.approx(2, abs=0.01)
        await trio.sleep(20)
        assert board.devices[0].backend.active is not None


async def test_a_switchover_in_mid_end_of_bus_mastering_ends_it(autojump_clock: Clock) -> None:
    def guest(cpu: Any) -> Guest:
        yield activate()
        yield master(False)
        cpu.registers["went_on"] = True

    deadlines = Deadlines()
    board = MiniBoard([BareDevice(on_stop=nap(1))], guest, deadlines=deadlines)
    async with running(board, deadlines) as machine:
        await trio.sleep(0.5)
        assert machine.vcpus.vcpus[0].state is VcpuRunState.AT_BARRIER
        await machine.stop(2)
        assert machine._barrier_of(machine.vcpus.vcpus[0]) is None, "the gate is closed: nothing works"
        assert board.devices[0].backend.active is None
        await machine.undo()
        await trio.sleep(0.1)
        assert board.cpus[0].registers == {"went_on": True}
