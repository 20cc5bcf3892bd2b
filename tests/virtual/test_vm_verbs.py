"""Verbs of a VM on scripted vCPUs: resizing on paper, and the events that each verb tells."""

from __future__ import annotations

import pytest
import trio

from trivmm import ConfigError, NotSupported, Vm


async def test_a_vm_that_was_never_booted_is_resized_on_paper(vm: Vm) -> None:
    await vm.resize(vcpus=3, ram=32 << 20)
    assert (vm.config.cpus.boot_vcpus, vm.config.memory.size) == (3, 32 << 20)
    await vm.boot()
    assert len(vm.info()["vcpus"]) == 3


async def test_a_booted_vm_takes_what_is_so_already_and_refuses_the_rest_by_name(
    vm_booted: Vm, autojump_clock: trio.testing.MockClock
) -> None:
    vm = vm_booted
    await vm.resize()
    await vm.resize(vcpus=2, ram=16 << 20)
    for refused, said in [
        ({"vcpus": 4}, "desired_vcpus = 4: a booted VM can't be resized yet; shut it down first, or give 2"),
        ({"ram": 32 << 20}, "desired_ram = 33554432: a booted VM can't be resized yet"),
        ({"balloon": 0}, "desired_balloon = 0: there is no balloon yet"),
    ]:
        with pytest.raises(NotSupported, match=f"^{said}"):
            await vm.resize(**refused)
    with pytest.raises(ConfigError, match=r"cpus\.boot_vcpus = 99: out of range"):
        await vm.resize(vcpus=99)
    assert (vm.config.cpus.boot_vcpus, vm.config.memory.size) == (2, 16 << 20)


async def test_each_verb_tells_its_events(vm: Vm) -> None:
    with vm.events.subscribe() as events:
        await vm.boot()
        await vm.pause()
        await vm.resume()
        await vm.reboot()
        await vm.resize()
        await vm.shutdown()
        seen: list[str] = []
        async for event in events:
            seen += [event.event] if event.source == "vm" else []
            if event.event == "shutdown":
                assert event.properties == {"reason": "shutdown"}
                break
    pairs = "booting booted pausing paused resuming resumed rebooting rebooted resizing resized"
    assert seen == [*pairs.split(), "shutdown"]
