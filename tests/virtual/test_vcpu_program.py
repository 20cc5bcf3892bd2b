"""The vCPU's program driven by hand: what it asks of its driver, step by step."""

from __future__ import annotations

from typing import Any

import trio

from trivmm.bus.space import GuestRequest
from trivmm.errors import GuestCrash
from trivmm.hypervisor.base import InternalError, Interrupted, VcpuExit
from trivmm.nursery.vcpu import PARK_SLICE_S, Vcpu, VcpuRunState
from trivmm.testing.scripted import ScriptedHypervisor

BROKEN = InternalError(0xFFFF, (5,))  # KVM_RUN of a dead VM: -EIO, now and for ever


async def test_a_vcpu_that_can_run_no_more_parks_all_the_same() -> None:
    """Finishing the started instruction fails, again and again: the vCPU must be seen paused, not spin in it."""
    crashes: list[GuestCrash] = []
    requests: list[GuestRequest] = []
    cpu = ScriptedHypervisor().open_vm().create_vcpu(0)
    vcpu = Vcpu(
        0,
        cpu,
        lambda *_: None,
        lambda: None,
        lambda _, request: requests.append(request),
        crashes.append,
        trio.current_time,
    )
    program = vcpu.program()
    answer: VcpuExit | None = None
    asked: list[Any] = []
    for _ in range(10):
        asked.append(program.send(answer))
        answer = BROKEN if asked[-1] == "finish" else None
    assert asked.count("finish") == 1
    assert asked[-1] == PARK_SLICE_S
    assert vcpu.state is VcpuRunState.PAUSED
    assert vcpu.is_paused()
    assert [request.kind for request in requests] == ["crash"]
    assert len(crashes) == 1


async def test_a_started_instruction_is_finished_before_the_vcpu_counts_as_paused() -> None:
    cpu = ScriptedHypervisor().open_vm().create_vcpu(0)
    vcpu = Vcpu(0, cpu, lambda *_: None, lambda: None, lambda *_: None, lambda _: None, trio.current_time)
    program = vcpu.program()
    assert next(program) == "finish"
    assert not vcpu.is_paused()
    assert program.send(Interrupted()) == PARK_SLICE_S
    assert vcpu.is_paused()
