"""Plugging and unplugging where the kernel hangs: nobody waits for it who need not, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio

from trivmm import DeadlineError, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, Vm, VmConfig
from trivmm.guest import probe_path
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.scripted import ScriptedVm
from trivmm.testing.sides import lock_is_free
from trivmm.testing.told_guest import ToldGuest, eject

from .test_kernel_calls import LIMIT_S, Kernel, impatient, opened

SLOT = 2


@attrs.define(eq=False)
class Sight:
    """A VM without disks, and one to be plugged."""

    config: VmConfig
    disk: DiskConfig
    guest: ToldGuest
    kernel: Kernel

    @property
    def is_free(self) -> bool:
        return lock_is_free(attrs.evolve(self.config, disks=(self.disk,)))

    @property
    def doorbells(self) -> int:
        vm = self.kernel.vms[-1]
        assert isinstance(vm, ScriptedVm)
        return len(vm.doorbells)


@pytest.fixture
async def sight(tmp_path: Path) -> Sight:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(16 << 20), deadlines=Deadlines(kernel=20))
    guest = ToldGuest()
    return Sight(config, DiskConfig(str(image)), guest, Kernel(guest.cpu(0)))


async def settled(vm: Vm) -> None:
    while vm.host.kernel.busy or vm.host.storage.busy:  # noqa: ASYNC110 - threads
        await trio.sleep(0.001)


async def until_gone(vm: Vm) -> None:
    while "_disk0" in vm.info()["device_tree"]:  # noqa: ASYNC110 - the event may have been told already
        await trio.sleep(0.001)


async def test_nothing_of_it_is_called_in_the_trio_thread(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with opened(sight.config, sight.kernel) as vm:
            vm.host.storage.threaded = True
            await vm.boot()
            sight.kernel.made.clear()
            await vm.add_device(sight.disk)
            await vm.remove_device("_disk0")
            await sight.guest.does(eject(1 << SLOT))
            await until_gone(vm)
            assert {("add_doorbell", False), ("remove_doorbell", False)} == set(sight.kernel.made)


async def test_who_is_cancelled_while_the_kernel_hangs_has_it_or_not(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with opened(sight.config, sight.kernel) as vm:
            await vm.boot()
            sight.kernel.hang("add_doorbell")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.add_device, sight.disk)
                await sight.kernel.hanging.wait()
                assert "_disk0" not in vm.info()["device_tree"], "and whoever asks is answered meanwhile"
                nursery.cancel_scope.cancel()
                sight.kernel.let_go()
            assert [disk.id for disk in vm.config.disks] == ["_disk0"]
            assert "_disk0" in vm.info()["device_tree"]
            assert not sight.is_free
        assert sight.is_free


async def test_who_is_cancelled_at_any_await_has_it_or_not(sight: Sight) -> None:
    seen = set()

    async def world(walk: Walk[object]) -> None:
        async with opened(sight.config, sight.kernel) as vm:
            vm.host.storage.threaded = True
            await vm.boot()
            await walk.run(lambda: vm.add_device(sight.disk))
            there = "_disk0" in vm.info()["device_tree"]
            seen.add((there, walk.cancelled))
            assert there is not sight.is_free
            assert [disk.id for disk in vm.config.disks] == ["_disk0"] * there
            if there:
                await walk_away(vm, sight)
            assert await vm.add_device(sight.disk) is not None
        assert sight.is_free

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) >= 2  # opening it, plugging it
    assert (True, False) in seen


async def walk_away(vm: Vm, sight: Sight) -> None:
    await vm.remove_device("_disk0")
    await sight.guest.does(eject(1 << SLOT))
    await until_gone(vm)


async def test_one_that_comes_too_late_is_withdrawn(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with opened(sight.config, sight.kernel) as vm:
            await vm.boot()
            doorbells, spaces = sight.doorbells, vm.host.machine.board.mmio.ranges  # type: ignore[union-attr]
            sight.kernel.hang("add_doorbell")
            with impatient(vm.host.kernel), pytest.raises(DeadlineError, match="plugging _disk0"):
                await vm.add_device(sight.disk)
            assert vm.config.disks == ()
            sight.kernel.let_go()
            await settled(vm)
            assert sight.is_free
            assert sight.doorbells == doorbells
            assert vm.host.machine.board.mmio.ranges == spaces  # type: ignore[union-attr]
            info = await vm.add_device(sight.disk)
            assert info is not None
            assert info.bdf == "0000:00:02.0"


async def test_a_vm_that_ends_in_the_middle_of_it_leaves_nothing(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            async with opened(sight.config, sight.kernel) as vm:
                await vm.boot()
                sight.kernel.hang("add_doorbell")

                async def add() -> None:
                    with pytest.raises(Exception, match="at its end"):
                        await vm.add_device(sight.disk)

                nursery.start_soon(add)
                await sight.kernel.hanging.wait()
                tasks = vm.host.machine.hotplug.tasks  # type: ignore[union-attr]
                assert tasks is not None

                async def let_go_at_the_end() -> None:
                    while not tasks.closed:  # noqa: ASYNC110 - nobody tells of it
                        await trio.sleep(0.001)
                    sight.kernel.let_go()

                nursery.start_soon(let_go_at_the_end)
        assert sight.is_free
        assert ("close",) in sight.kernel.vms[-1].calls


async def test_a_guest_does_not_wait_for_the_kernel_that_unplugs(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with opened(sight.config, sight.kernel) as vm:
            await vm.boot()
            await vm.add_device(sight.disk)
            await vm.remove_device("_disk0")
            sight.kernel.hang("remove_doorbell")
            await sight.guest.does(eject(1 << SLOT))
            await sight.kernel.hanging.wait()
            await sight.guest.does(eject(1 << SLOT))  # it goes on
            await vm.pause()
            assert "_disk0" in vm.info()["device_tree"]
            sight.kernel.let_go()
            await until_gone(vm)
            assert sight.is_free
            await vm.resume()


async def test_an_unplug_that_takes_too_long_is_made_again(sight: Sight) -> None:
    with trio.fail_after(LIMIT_S):
        async with opened(sight.config, sight.kernel) as vm:
            await vm.boot()
            await vm.add_device(sight.disk)
            await vm.remove_device("_disk0")
            sight.kernel.hang("remove_doorbell")
            with impatient(vm.host.kernel):
                await sight.guest.does(eject(1 << SLOT))
                await sight.kernel.hanging.wait()
                ejector = vm.host.machine.hotplug.ejector  # type: ignore[union-attr]
                while ejector.serving:  # noqa: ASYNC110 - it gives up by itself
                    await trio.sleep(0.001)
            assert "_disk0" in vm.info()["device_tree"]
            sight.kernel.let_go()
            await vm.remove_device("_disk0")
            await until_gone(vm)
            assert sight.is_free
