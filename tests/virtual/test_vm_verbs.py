"""Verbs of a VM on scripted vCPUs: resizing on paper, and the events that each verb tells."""

from __future__ import annotations

import attrs
import pytest
import trio

from trivmm import ConfigError, NotSupported, Vm, VmConfig, open_vm
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.balloon.device import BalloonState


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


async def test_a_balloon_is_asked_for_more_and_less(
    vm_config: VmConfig, autojump_clock: trio.testing.MockClock
) -> None:
    ram = vm_config.memory.size
    config = attrs.evolve(vm_config, virtio=[BalloonConfig("1M")])
    async with open_vm(config, hypervisor=ScriptedHypervisor(needs_payload=False)) as vm:
        await vm.resize(balloon=2 << 20)  # on paper
        await vm.boot()
        assert vm.host.board is not None
        balloon = vm.host.board.balloon
        assert balloon is not None
        assert (balloon.name, balloon.save()) == ("__balloon", BalloonState(512, 0))
        await vm.resize(balloon=3 << 20)
        assert balloon.save() == BalloonState(768, 0)
        balloon.write_config(4, (700).to_bytes(4, "little"))
        assert vm.info()["memory_actual_size"] == ram - 700 * 4096
        balloon.write_config(4, b"\xff\xff\xff\xff")  # a guest that lies
        assert vm.info()["memory_actual_size"] == 0
        for size in (ram, 1 << 50):
            with pytest.raises(ConfigError, match=f"^desired_balloon = {size}: as much as the VM's memory, or more"):
                await vm.resize(balloon=size)
        await vm.reboot()  # what was asked for last stays so, what was given does not
        assert vm.host.board.balloon is not None
        assert vm.host.board.balloon.save() == BalloonState(768, 0)
        assert [each.size for each in vm.config.virtio] == [3 << 20]


async def test_a_balloon_that_is_not_there(vm: Vm) -> None:
    await vm.resize(balloon=64 << 20)  # on paper that is nothing, as Cloud Hypervisor has it
    await vm.boot()
    with pytest.raises(ConfigError, match=r"^desired_balloon = 0: this VM has no balloon; "):
        await vm.resize(balloon=0)


async def test_two_balloons_are_one_too_many(vm_config: VmConfig) -> None:
    config = attrs.evolve(vm_config, virtio=[BalloonConfig(id="a"), BalloonConfig(id="b")])
    async with open_vm(config, hypervisor=ScriptedHypervisor(needs_payload=False)) as vm:
        with pytest.raises(ConfigError, match=r"^balloon = 2: a VM has one at most; give one"):
            await vm.boot()
