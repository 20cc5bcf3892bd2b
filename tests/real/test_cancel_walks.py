"""Cancelling at every await of the embedding API: a named state, exactly one copy, nothing left, and it works again.

Real board, real sockets, scripted vCPUs: quick enough to be cancelled a few hundred times. Each walk is walked twice:
with the calls that wait for the kernel or for storage made where they stand, and in threads, as with a real hypervisor,
where the await that is cancelled is one of a call that goes on.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, Vm, VmConfig, VmState, open_incoming, open_vm
from trivmm.errors import PastCommit, TrivmmError
from trivmm.guest import probe_path
from trivmm.migration.progress import MigrationReport
from trivmm.nursery.kernel import KernelCalls
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.scripted import ScriptedHypervisor

LIMIT_S = 240


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # the listing's own
    return found


@pytest.fixture(
    params=[pytest.param(False, id="inline", marks=pytest.mark.slow), pytest.param(True, id="threads")], autouse=True
)
def threaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether such calls are made in threads, though vCPUs are scripted."""
    make = KernelCalls.__init__

    def in_threads(self: KernelCalls, deadlines: Any, threaded: bool, *more: Any) -> None:
        make(self, deadlines, True, *more)

    if request.param:
        monkeypatch.setattr(KernelCalls, "__init__", in_threads)
    return bool(request.param)


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), disks=(DiskConfig(str(disk)),))


def all_closed(hypervisor: ScriptedHypervisor) -> bool:
    return all(("close",) in vm.calls for vm in hypervisor.vms)


async def test_a_vms_life_cancelled_at_every_await(config: VmConfig) -> None:
    before = open_files()

    async def world(walk: Walk[None]) -> None:
        hypervisor = ScriptedHypervisor()
        seen: list[VmState] = []

        async def life() -> None:
            async with open_vm(config, hypervisor=hypervisor) as vm:
                try:
                    await vm.boot()
                    await vm.pause()
                    await vm.resume()
                    await vm.reboot()
                    await vm.shutdown()
                    await vm.boot()
                finally:
                    seen.append(vm.state)

        await walk.run(life)
        assert all_closed(hypervisor)
        assert all(isinstance(state, VmState) for state in seen)
        assert open_files() == before

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) > 5
    async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
        await vm.boot()


def exactly_one(source: Vm, target: Vm) -> bool:
    return [source.state, target.state].count(VmState.RUNNING) == 1


async def test_migrate_to_cancelled_at_every_await(config: VmConfig, tmp_path: Path) -> None:
    before = open_files()
    numbers = itertools.count()
    outcomes = set()

    async def world(walk: Walk[MigrationReport]) -> None:
        url = f"unix:{tmp_path}/{next(numbers)}.sock"
        hypervisor = ScriptedHypervisor()
        async with open_vm(config, hypervisor=hypervisor) as source:
            await source.boot()
            async with open_incoming(url, hypervisor=hypervisor, deadlines=config.deadlines) as incoming:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_receive, incoming)
                    await walk.run(lambda: source.migrate_to(url))
                    if source.state is VmState.RUNNING:
                        nursery.cancel_scope.cancel()  # nobody may have come yet
                assert exactly_one(source, incoming.vm)
                outcomes.add(source.state)
            if source.state is VmState.RUNNING and walk.step % 10 == 1:
                again = f"{url}.again"
                async with open_incoming(again, hypervisor=hypervisor, deadlines=config.deadlines) as incoming:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(incoming.receive)
                        await source.migrate_to(again)
                    assert exactly_one(source, incoming.vm)
        assert all_closed(hypervisor)
        assert open_files() == before
        assert not list(tmp_path.glob("*.sock*"))

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) > 20
    assert outcomes == {VmState.RUNNING, VmState.SHUTDOWN}


async def _receive(incoming: object) -> None:
    try:
        await incoming.receive()  # type: ignore[attr-defined]
    except TrivmmError:
        return


async def test_receive_cancelled_at_every_await(config: VmConfig, tmp_path: Path) -> None:
    before = open_files()
    numbers = itertools.count()
    outcomes = set()

    async def world(walk: Walk[Vm]) -> None:
        url = f"unix:{tmp_path}/{next(numbers)}.sock"
        hypervisor = ScriptedHypervisor()
        async with open_vm(config, hypervisor=hypervisor) as source:
            await source.boot()
            async with open_incoming(url, hypervisor=hypervisor, deadlines=config.deadlines) as incoming:
                async with trio.open_nursery() as nursery:

                    async def send() -> None:
                        try:
                            await source.migrate_to(url)
                        except TrivmmError:
                            return

                    nursery.start_soon(send)
                    await walk.run(incoming.receive)
                    if incoming.vm.state is not VmState.RUNNING:
                        with suppress(PastCommit):  # nobody listens any more; or it is refused, and goes on there
                            source.cancel_migration()
                assert exactly_one(source, incoming.vm)
                outcomes.add(source.state)
        assert all_closed(hypervisor)
        assert open_files() == before
        assert not list(tmp_path.glob("*.sock*"))

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) > 10
    assert outcomes == {VmState.RUNNING, VmState.SHUTDOWN}
