"""A guest's triple fault: a reboot, and a loop of them a crash."""

from __future__ import annotations

import logging
from collections.abc import Generator

import pytest
import trio
import trio.testing

from trivmm import Event, MemoryConfig, PayloadConfig, VmConfig, VmState, open_vm
from trivmm.testing.scripted import Compute, ScriptedHypervisor, ScriptedVcpu, Step, TripleFault
from trivmm.vm.triplefaults import LIMIT, SOON_S, TripleFaults

BARE = VmConfig(PayloadConfig("scripted"), memory=MemoryConfig(4 << 20))


class Guest:
    """Faults ``times`` times, each ``after_s`` after it began to run; then it computes."""

    def __init__(self, times: int, after_s: float) -> None:
        self.left, self.after_s = times, after_s

    def __call__(self, cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
        yield Compute(self.after_s)
        if self.left:
            self.left -= 1
            yield TripleFault()


async def test_a_triple_fault_is_a_reboot_with_its_registers_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Event] = []
    hypervisor = ScriptedHypervisor(Guest(1, 1.0), needs_payload=False)
    with caplog.at_level(logging.WARNING, "trivmm.machine.machine"):
        async with open_vm(BARE, hypervisor=hypervisor) as vm:
            await vm.boot()
            vm.events.listen(seen.append)
            await trio.sleep(100)
            assert (vm.state, vm.reboots) == (VmState.RUNNING, 1)
    assert [(each.event, each.properties) for each in seen][:2] == [
        ("rebooting", {"reason": "triple fault"}),
        ("rebooted", None),
    ]
    (record,) = caplog.records
    assert record.getMessage().startswith("vcpu0: triple fault\n")


async def test_a_guest_that_faults_after_every_boot_has_crashed(autojump_clock: trio.testing.MockClock) -> None:
    hypervisor = ScriptedHypervisor(Guest(1000, 1.0), needs_payload=False)
    async with open_vm(BARE, hypervisor=hypervisor) as vm:
        await vm.boot()
        reason = await vm.wait()
        assert reason.kind == "crash"
        assert reason.crash is not None
        assert (reason.crash.vcpu, reason.crash.reason) == (0, f"triple fault, {LIMIT} in a row")
        assert reason.crash.details
        assert vm.reboots == LIMIT - 1


@pytest.mark.parametrize("times", [LIMIT - 1, LIMIT])
async def test_a_boot_by_its_owner_begins_the_count_anew(autojump_clock: trio.testing.MockClock, times: int) -> None:
    guest = Guest(times, 1.0)
    async with open_vm(BARE, hypervisor=ScriptedHypervisor(guest, needs_payload=False)) as vm:
        await vm.boot()
        await trio.sleep(100)
        before, guest.left = vm.reboots, 1
        assert vm.state is (VmState.SHUTDOWN if times == LIMIT else VmState.RUNNING)
        await (vm.boot() if times == LIMIT else vm.reboot())
        await trio.sleep(100)
        assert vm.state is VmState.RUNNING
        assert vm.reboots - before == (1 if times == LIMIT else 2)


async def test_a_guest_that_gets_further_may_reboot_so_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    hypervisor = ScriptedHypervisor(Guest(4 * LIMIT, SOON_S + 1), needs_payload=False)
    async with open_vm(BARE, hypervisor=hypervisor) as vm:
        await vm.boot()
        await trio.sleep(5 * LIMIT * (SOON_S + 1))
        assert (vm.state, vm.reboots) == (VmState.RUNNING, 4 * LIMIT)


def test_one_that_comes_late_begins_the_count_anew() -> None:
    faults, now = TripleFaults(), 100.0

    def another(after_s: float) -> bool:
        nonlocal now
        faults.booted(now)
        now += after_s
        return faults.loop(now)

    assert not any(another(1.0) for _ in range(LIMIT - 1))
    assert not another(SOON_S)
    assert not any(another(1.0) for _ in range(LIMIT - 2))
    assert another(1.0)
