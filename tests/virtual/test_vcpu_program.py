"""The vCPU's program driven by hand: what it asks of its driver, step by step, and which steps its states have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio

from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, Effect, GuestRequest, Range
from trivmm.bus.ticket import Ticket
from trivmm.errors import GuestCrash, IllegalTransition
from trivmm.hypervisor.base import INTERRUPTED, Crashed, Outcome
from trivmm.nursery.vcpu import PARK_SLICE_S, Vcpu, VcpuRunState
from trivmm.testing.scripted import ScriptedHypervisor

BROKEN = Crashed("KVM_RUN failed: Input/output error", "rip=0")  # of a dead VM: now and for ever


@attrs.define(eq=False)
class Owner:
    """A vCPU whose callbacks are noted; states in the order in which it said that it had changed."""

    vcpu: Vcpu = attrs.field(init=False)
    crashes: list[GuestCrash] = attrs.field(factory=list)
    requests: list[GuestRequest] = attrs.field(factory=list)
    states: list[VcpuRunState] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        hypervisor = ScriptedHypervisor()
        self.vcpu = Vcpu(
            hypervisor.open_vm().create_vcpu(0),
            Bus(AddressSpace("pio"), AddressSpace("mmio"), hypervisor.clock),
            lambda: self.states.append(self.vcpu.state),
            lambda _, request: self.requests.append(request),
            self.crashes.append,
        )

    def running(self) -> Any:
        """Its program, asked for guest code."""
        program = self.vcpu.program()
        assert next(program) == "finish"
        self.vcpu.release_pause()
        assert program.send(INTERRUPTED) == "run"
        return program


async def test_a_vcpu_that_can_run_no_more_parks_all_the_same() -> None:
    """Finishing the started instruction fails, again and again: the vCPU must be seen paused, not spin in it."""
    owner = Owner()
    program = owner.vcpu.program()
    answer: Outcome | None = None
    asked: list[Any] = []
    for _ in range(10):
        asked.append(program.send(answer))
        answer = BROKEN if asked[-1] == "finish" else None
    assert asked.count("finish") == 1
    assert asked[-1] == PARK_SLICE_S
    assert owner.vcpu.state is VcpuRunState.PAUSED
    assert owner.vcpu.is_paused()
    assert [request.kind for request in owner.requests] == ["crash"]
    assert [(error.reason, error.details) for error in owner.crashes] == [(BROKEN.reason, BROKEN.details)]


async def test_a_started_instruction_is_finished_before_the_vcpu_counts_as_paused() -> None:
    owner = Owner()
    program = owner.vcpu.program()
    assert next(program) == "finish"
    assert not owner.vcpu.is_paused()
    assert program.send(GuestRequest("reset", "a write of that instruction")) == "finish"
    assert not owner.vcpu.is_paused()
    assert program.send(INTERRUPTED) == PARK_SLICE_S
    assert owner.vcpu.is_paused()
    assert [request.kind for request in owner.requests] == ["reset"]


async def test_a_vcpu_parks_before_anything_runs_even_if_it_is_released_before_it_got_there() -> None:
    owner = Owner()
    owner.vcpu.release_pause()
    program = owner.vcpu.program()
    assert next(program) == "finish"
    assert program.send(INTERRUPTED) == "run"
    assert owner.states == [VcpuRunState.PAUSED]
    assert owner.vcpu.state is VcpuRunState.RUNNING


async def test_a_ticket_parks_the_vcpu_until_it_is_settled_and_a_pause_reaches_it_there() -> None:
    owner = Owner()
    program, ticket = owner.running(), Ticket("_disk0", 1, "activation")
    assert program.send(ticket) == PARK_SLICE_S
    assert owner.vcpu.state is VcpuRunState.AT_BARRIER
    owner.vcpu.request_pause()
    assert program.send(None) == "finish"
    assert program.send(INTERRUPTED) == PARK_SLICE_S
    assert owner.vcpu.is_paused()
    owner.vcpu.release_pause()
    assert program.send(None) == PARK_SLICE_S
    assert owner.vcpu.state is VcpuRunState.AT_BARRIER
    ticket.settle()
    assert program.send(None) == "run"
    assert owner.vcpu.state is VcpuRunState.RUNNING


@pytest.mark.parametrize(
    ("kind", "access", "place"),
    [
        ("mmio", lambda bus: bus.write_mmio(0xD000_1002, b"1234"), "a write of 4 bytes at 0xd0001002 (_disk0 BAR 0)"),
        ("mmio", lambda bus: bus.read_mmio(0xD000_1000, 2), "a read of 2 bytes at 0xd0001000 (_disk0 BAR 0)"),
        ("pio", lambda bus: bus.write_port(0x1_F7, 1, b"12"), "a write of 1 byte at port 0x1f7 (_disk0 BAR 0)"),
        ("pio", lambda bus: bus.read_port(0x1_F0, 2, 3), "a read of 2 bytes at port 0x1f0 (_disk0 BAR 0)"),
    ],
)
async def test_a_late_vcpu_is_told_with_the_access_that_it_waits_for(
    autojump_clock: trio.testing.MockClock, kind: str, access: Callable[[Bus], object], place: str
) -> None:
    """A device that does not answer: who waits for the vCPU must learn which, at which port or address, since when."""
    told: list[str] = []

    class Device:
        def read(self, offset: int, size: int) -> bytes:
            autojump_clock.jump(2)
            told.append(owner.vcpu.describe_wait())
            return bytes(size)

        def write(self, offset: int, data: bytes) -> Effect:
            self.read(offset, len(data))
            return None

    owner = Owner()
    owner.running()
    bus = owner.vcpu.bus
    start = 0xD000_1000 if kind == "mmio" else 0x1F0
    getattr(bus, kind).insert(Range(start, 0x10, Device(), "_disk0 BAR 0"))
    autojump_clock.jump(5)
    access(bus)
    assert told[0] == f"vcpu0 is running, serving {place}, for 2.000 s"
    assert owner.vcpu.describe_wait().startswith("vcpu0 is running, for ")


async def test_a_device_that_raises_stays_in_the_diagnosis() -> None:
    class Broken:
        def read(self, offset: int, size: int) -> bytes:
            raise ZeroDivisionError("a bug of ours")

        def write(self, offset: int, data: bytes) -> Effect:
            return None

    owner = Owner()
    owner.vcpu.bus.mmio.insert(Range(0xD000_0000, 4, Broken(), "_rng"))
    with pytest.raises(ZeroDivisionError):
        owner.vcpu.bus.read_mmio(0xD000_0000, 4)
    assert "serving a read of 4 bytes at 0xd0000000 (_rng)" in owner.vcpu.describe_wait()


async def test_the_states_have_no_step_that_is_wrong() -> None:
    owner = Owner()
    program = owner.running()
    owner.vcpu.request_stop()
    with pytest.raises(StopIteration):
        program.send(INTERRUPTED)
    assert owner.vcpu.state is VcpuRunState.STOPPED
    owner.vcpu.gone()  # told again when its thread has ended
    with pytest.raises(IllegalTransition, match="vcpu0: no step from stopped to starting"):
        owner.vcpu._enter(VcpuRunState.STARTING)
    with pytest.raises(IllegalTransition, match="vcpu0: no step from stopped to running"):
        owner.vcpu._enter(VcpuRunState.RUNNING)
    fresh = Owner().vcpu
    for state in (VcpuRunState.RUNNING, VcpuRunState.AT_BARRIER):
        with pytest.raises(IllegalTransition, match="vcpu0: no step from starting to"):
            fresh._enter(state)
    fresh.gone()
    assert fresh.state is VcpuRunState.STOPPED
