"""Calls that wait for the kernel: never in the trio thread, bounded by name, and nothing is lost where one hangs.

The scripted hypervisor, with a VM's calls in threads as for a real one, and a kernel that hangs when it is told to.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trivmm import (
    Deadlines,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    Vm,
    VmConfig,
    VmState,
    open_incoming,
    open_vm,
)
from trivmm.errors import ConfigError, DeadlineError, MigrationCancelled, TrivmmError
from trivmm.guest import probe_path
from trivmm.machine.board import Board
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.nursery.kernel import KernelCalls
from trivmm.platform.serial import COM1_IRQ
from trivmm.testing.scripted import Compute, ScriptedHypervisor, ScriptedVm
from trivmm.testing.sides import lock_is_free

LIMIT_S = 60
WAITING = {
    "add_doorbell",
    "add_memory",
    "connect_irq",
    "connect_msi",
    "create_vcpu",
    "disconnect_irq",
    "disconnect_msi",
    "harvest_dirty",
    "load",
    "remove_doorbell",
    "set_dirty_log",
}


class Kernel(ScriptedHypervisor):
    """``made`` is the log of (call, in the trio thread). ``hang(call)`` makes the next such call wait until ``let_go``;
    ``hanging`` is set, in the trio thread, when it does."""

    def __init__(self, *scripts: Any) -> None:
        super().__init__(*scripts)
        self.made: list[tuple[str, bool]] = []
        self.hanging = trio.Event()
        self.on_enter: dict[str, Callable[[], None]] = {}
        self._hang = ""
        self._go = threading.Event()
        self._trio = threading.current_thread()
        self._token = trio.lowlevel.current_trio_token()

    def hang(self, call: str) -> None:
        self._hang, self.hanging, self._go = call, trio.Event(), threading.Event()

    def let_go(self) -> None:
        self._hang = ""
        self._go.set()

    def enter(self, call: str) -> None:
        self.made.append((call, threading.current_thread() is self._trio))
        self.on_enter.get(call, lambda: None)()
        if call == self._hang:
            self._hang = ""
            self._token.run_sync_soon(self.hanging.set)
            assert self._go.wait(LIMIT_S)

    def open_vm(self) -> ScriptedVm:
        self.enter("open_vm")
        vm = _Vm(self.scripts)
        vm.kernel = self
        self.vms.append(vm)
        return vm


def _entered(name: str) -> Callable[..., Any]:
    def call(self: _Vm, *args: Any, **named: Any) -> Any:
        self.kernel.enter(name)
        return getattr(ScriptedVm, name)(self, *args, **named)

    return call


class _Vm(ScriptedVm):
    kernel: Kernel


for each in WAITING:
    setattr(_Vm, each, _entered(each))


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig(str(probe_path())),
        memory=MemoryConfig(8 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(downtime=20, commit=20, kernel=20),
    )


@contextmanager
def impatient(calls: KernelCalls) -> Iterator[None]:
    """For the call that hangs only: on a busy host every other one needs its time."""
    before, calls.deadlines = calls.deadlines, Deadlines(kernel=0.5)
    try:
        yield
    finally:
        calls.deadlines = before


@asynccontextmanager
async def opened(config: VmConfig, kernel: Kernel) -> AsyncIterator[Vm]:
    """A VM whose calls are made in threads; nothing hangs at its end that the test has not let hang."""
    try:
        async with open_vm(config, hypervisor=kernel) as vm:
            vm.host.kernel.threaded = True
            yield vm
    finally:
        kernel.let_go()


@asynccontextmanager
async def destination(config: VmConfig, kernel: Kernel, folder: Path) -> AsyncIterator[tuple[str, Vm]]:
    """Its URL, and the VM that arrives there."""
    async with open_incoming(f"unix:{folder}/m.sock", hypervisor=kernel, deadlines=config.deadlines) as incoming:
        incoming.vm.host.kernel.threaded = True
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                try:
                    await incoming.receive()
                except TrivmmError:
                    return

            nursery.start_soon(receive)
            yield incoming.url, incoming.vm
            nursery.cancel_scope.cancel()


def beating(cpu: Any) -> Any:
    while True:
        yield Compute(0.001)
        cpu.registers["beats"] = cpu.registers.get("beats", 0) + 1


async def beats(vm: Vm) -> None:
    """Wait until the guest has run."""
    assert vm.host.machine is not None
    cpu: Any = vm.host.machine.board.cpus[0]
    before = cpu.registers.get("beats", 0)
    while cpu.registers.get("beats", 0) <= before:  # noqa: ASYNC110 - a script has no event
        await trio.sleep(0.001)


async def test_nothing_that_waits_for_the_kernel_is_called_in_the_trio_thread(config: VmConfig, tmp_path: Path) -> None:
    """Boot, pause, resume, a migration that is cancelled, one that is not, and a reboot where it came to."""
    kernel = Kernel()
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            await vm.boot()
            await vm.pause()
            await vm.resume()
            async with destination(config, kernel, tmp_path) as (url, _):

                def cancel(progress: MigrationProgress) -> None:
                    if progress.phase is Phase.SWITCHOVER:
                        vm.cancel_migration()

                with pytest.raises(MigrationCancelled):
                    await vm.migrate_to(url, on_progress=cancel)
            async with destination(config, kernel, tmp_path) as (url, there):
                await vm.migrate_to(url)
                while there.state is not VmState.RUNNING:  # noqa: ASYNC110 - adopted a moment after the verdict
                    await trio.sleep(0.001)
                await there.reboot()
    paused = {("harvest_dirty", True)}  # with every vCPU stopped: nobody has the kernel's lock
    assert {call for call in kernel.made if call[1]} <= paused
    assert {name for name, _ in kernel.made} >= {
        "open_vm",
        "add_memory",
        "create_vcpu",
        "add_doorbell",
        "connect_irq",
        "disconnect_irq",
        "set_dirty_log",
        "harvest_dirty",
        "load",
    }


async def test_closing_takes_nothing_away_one_by_one(config: VmConfig) -> None:
    """Doorbells and interrupts go with the VM."""
    kernel = Kernel()
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            await vm.boot()
            kernel.made.clear()
        assert kernel.made == []
        assert kernel.vms[0].calls[-1] == ("close",)


async def test_everybody_else_goes_on_while_a_call_waits_and_a_cancellation_waits_for_it(
    config: VmConfig, tmp_path: Path
) -> None:
    kernel = Kernel(beating)
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm, destination(config, kernel, tmp_path) as (url, there):
            await vm.boot()
            kernel.hang("set_dirty_log")
            async with trio.open_nursery() as nursery:

                async def move() -> None:
                    with pytest.raises(MigrationCancelled):
                        await vm.migrate_to(url)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(move)
                await kernel.hanging.wait()
                await beats(vm)
                assert vm.info()["state"] == "Running"
                assert vm.cancel_migration()
                await beats(vm)
                assert vm.migrating, "it would be abandoned in the middle"
                kernel.let_go()
                await trio.sleep_forever()
            assert [call for call in kernel.vms[0].calls if call[0] == "set_dirty_log"] == [
                ("set_dirty_log", True),
                ("set_dirty_log", False),
            ]
            assert there.state is not VmState.RUNNING


async def until_free(vm: Vm) -> None:
    while vm.host.kernel.busy:  # noqa: ASYNC110 - its thread
        await trio.sleep(0.001)


async def test_a_dirty_log_that_does_not_come_on_fails_the_migration_and_goes_off_by_itself(
    config: VmConfig, tmp_path: Path
) -> None:
    kernel = Kernel(beating)
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            await vm.boot()
            with impatient(vm.host.kernel):
                async with destination(config, kernel, tmp_path) as (url, _):
                    kernel.hang("set_dirty_log")
                    with pytest.raises(DeadlineError, match="switching the dirty log on: the kernel has not") as caught:
                        await vm.migrate_to(url)
                assert caught.value.name == "kernel"
                assert vm.state is VmState.RUNNING
                await beats(vm)
                assert "switching the dirty log on: in the kernel for" in vm.stuck[0]
            kernel.let_go()
            await until_free(vm)
            assert vm.stuck == ()
            assert kernel.vms[0].calls[-1] == ("set_dirty_log", False)
            async with destination(config, kernel, tmp_path) as (url, there):
                await vm.migrate_to(url)
                assert there.state is VmState.RUNNING


async def test_interrupts_that_the_kernel_does_not_let_go_of_come_back_and_the_guest_does_not_wait(
    config: VmConfig, tmp_path: Path
) -> None:
    """The switchover's limit passes in the kernel: the guest runs again at once, its interrupts are connected again as
    soon as they can be."""
    kernel = Kernel(beating)
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, downtime=1.0))
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm, destination(config, kernel, tmp_path) as (url, there):
            await vm.boot()
            kernel.hang("disconnect_irq")

            async def release() -> None:
                await kernel.hanging.wait()
                await beats(vm)  # with the call still there
                kernel.let_go()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(release)
                report = await vm.migrate_to(url)
            assert report.attempts > 1
            calls = [call[0] for call in kernel.vms[0].calls if call[-1] == COM1_IRQ]
            assert calls[:4] == ["connect_irq", "disconnect_irq", "connect_irq", "disconnect_irq"]
            assert there.state is VmState.RUNNING


async def test_a_machine_that_the_kernel_does_not_build_is_no_boot_and_leaves_nothing(config: VmConfig) -> None:
    kernel = Kernel()
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            kernel.hang("create_vcpu")  # the last step: by then it has the disk
            with impatient(vm.host.kernel):
                with pytest.raises(DeadlineError, match="building the machine: the kernel has not returned"):
                    await vm.boot()
                assert vm.state is VmState.CREATED
                assert "building the machine" in vm.stuck[0]
                with pytest.raises(DeadlineError, match="building the machine, after building the machine"):
                    await vm.boot()
            kernel.let_go()
            await until_free(vm)
            assert vm.stuck == ()
            assert kernel.vms[0].calls[-1] == ("close",)
            assert lock_is_free(config)
            await vm.boot()
            assert vm.state is VmState.RUNNING


async def test_a_vm_that_ends_while_the_kernel_has_it_keeps_what_the_thread_works_on(
    config: VmConfig, tmp_path: Path
) -> None:
    kernel = Kernel()
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            await vm.boot()
            assert vm.host.machine is not None
            board = vm.host.machine.board
            kernel.hang("set_dirty_log")
            with impatient(vm.host.kernel):
                async with destination(config, kernel, tmp_path) as (url, _):
                    with pytest.raises(DeadlineError, match="kernel"):
                        await vm.migrate_to(url)
                await vm.shutdown()
                assert vm.state is VmState.SHUTDOWN
                assert any("switching the dirty log on" in each for each in vm.stuck)
            assert ("close",) not in kernel.vms[0].calls
            assert lock_is_free(config), "the disk is not the thread's"
            kernel.let_go()
            await until_free(vm)
            forget(board)


async def test_a_boot_that_gets_no_interrupts_runs_nothing(config: VmConfig) -> None:
    kernel = Kernel(beating)
    with trio.fail_after(LIMIT_S):
        async with opened(config, kernel) as vm:
            kernel.hang("connect_irq")
            # The last step of the build, whose limit runs already: the next call's is short.
            kernel.on_enter["create_vcpu"] = lambda: setattr(vm.host.kernel, "deadlines", Deadlines(kernel=0.1))
            with pytest.raises(DeadlineError, match="connecting the interrupts"):
                await vm.boot()
            assert vm.state is VmState.CREATED
            assert vm.host.board is not None
            cpu: Any = vm.host.board.cpus[0]
            assert cpu.registers == {}
            kernel.let_go()
            await until_free(vm)
            forget(vm.host.board)


def forget(board: Board) -> None:
    """A test's own cleaning up: a process leaves by os._exit."""
    board.in_use = board._closed = board._freed = False
    board.stuck.clear()
    board.close()


async def test_what_a_call_raises_is_raised_and_a_late_one_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = KernelCalls(Deadlines(kernel=LIMIT_S), threaded=True)
    go = threading.Event()

    def fail() -> None:
        raise ConfigError("disks", "x", "no such disk", "give another")

    def fail_late() -> None:
        go.wait(LIMIT_S)
        fail()

    with trio.fail_after(LIMIT_S):
        with pytest.raises(ConfigError, match="no such disk"):
            await calls.call("looking", fail)
        calls.deadlines = Deadlines(kernel=0.05)
        with pytest.raises(DeadlineError, match=r"kernel \(0.05 s\) expired: looking: "):
            await calls.call("looking", fail_late)
        with pytest.raises(DeadlineError, match="looking"):
            await calls.settled()
        calls.deadlines = Deadlines(kernel=LIMIT_S)
        go.set()
        await calls.settled()
        assert await calls.call("adding", lambda: 1 + 1) == 2
    assert "looking: failed after" in caplog.text
