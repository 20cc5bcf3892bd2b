"""A migration's bad ends as the owner of a VM sees them: real board, real sockets, scripted vCPUs.

Whatever fails, crashes or is closed in the middle, the VM is in a named state, its locks are where it runs, and what
the guest asked for is carried out by somebody.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trivmm import (
    Deadlines,
    DiskConfig,
    Event,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    Vm,
    VmConfig,
    VmState,
    open_incoming,
    open_vm,
)
from trivmm.bus.ticket import Ticket
from trivmm.errors import (
    CommitRefused,
    ConfigError,
    MigrationCancelled,
    MigrationError,
    MigrationInDoubt,
    TrivmmError,
    WrongState,
)
from trivmm.guest import probe_path
from trivmm.machine.host import MachineHost
from trivmm.machine.machine import Machine
from trivmm.memory.dirty_log import DirtyLog
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.platform.sinks import GuestOutput
from trivmm.testing.scripted import Compute, Crash, IoOut, ScriptedHypervisor, Step
from trivmm.testing.sides import lock_is_free, two_sides
from trivmm.virtio.block.file import ImageFile
from trivmm.virtio.pci.common_config import DEVICE_STATUS

LIMIT_S = 60
RESET = IoOut(0x600, 1, b"\x01")


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig(str(probe_path())),
        memory=MemoryConfig(8 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(downtime=10, commit=0.3),
    )


class Guest:
    """A vCPU that computes until it is asked, then does one thing, once in all its lives."""

    def __init__(self, then: Step) -> None:
        self.asked = False
        self.then: Step | None = then

    def __call__(self, cpu: Any) -> Generator[Any, bytes | None, None]:
        while not self.asked:
            yield Compute(0.001)
        then, self.then = self.then, None
        if then is not None:
            yield then


async def test_a_destination_that_cannot_start_gives_the_locks_back_before_it_says_so(
    config: VmConfig, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    config = attrs.evolve(config, serial=SerialConfig("File", str(there / "serial.txt")))
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, target, move):
            shutil.move(there, tmp_path / "elsewhere")  # the sink is opened at COMMIT: after the locks are taken
            with pytest.raises(CommitRefused, match=r"serial\.file"):
                await move()
            assert (source.state, source.in_doubt) == (VmState.RUNNING, False)
            assert target.state is not VmState.RUNNING
            assert not lock_is_free(config)


def ask_before(monkeypatch: pytest.MonkeyPatch, guest: Guest, verb: str) -> None:
    """The guest asks, and the machine has heard it, in the very moment in which the machine begins ``verb``."""
    heard = trio.Event()
    note, begin = Machine._note_request, getattr(Machine, verb)

    def noted(self: Machine, request: Any) -> None:
        note(self, request)
        heard.set()

    async def begun(self: Machine, *args: Any) -> None:
        guest.asked = True
        await heard.wait()
        await begin(self, *args)

    monkeypatch.setattr(Machine, "_note_request", noted)
    monkeypatch.setattr(Machine, verb, begun)


def hold_commit(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """A destination that stands still between taking the locks and its verdict, until the event."""
    go = trio.Event()

    async def start(self: Machine) -> None:
        await go.wait()

    monkeypatch.setattr(Machine, "start", start)
    return go


async def in_doubt(source: Vm, move: Callable[..., Any], **options: Any) -> None:
    with pytest.raises(MigrationInDoubt):
        await move(**options)
    assert (source.state, source.in_doubt) == (VmState.PAUSED, True)


async def test_a_start_that_hangs_leaves_the_source_paused_and_resume_needs_force_and_the_locks(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_commit(monkeypatch)
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, target, move):
            await in_doubt(source, move)
            assert set(source.info()["vcpus"]) == {"paused"}
            assert lock_is_free(config)  # both sides gave it up: whoever runs the VM takes it first
            with pytest.raises(TrivmmError, match="in doubt"):
                await source.migrate_to("unix:/nowhere")
            other = ImageFile(config.disks[0].path, readonly=False, lock=True)
            with pytest.raises(MigrationInDoubt, match="the VM is in doubt"):
                await source.resume()
            with pytest.raises(ConfigError, match="in use by another"):
                await source.resume(force=True)
            assert (source.state, source.in_doubt) == (VmState.PAUSED, True)
            other.close()
            await source.resume(force=True)
            assert (source.state, source.in_doubt) == (VmState.RUNNING, False)
            assert not lock_is_free(config)
            assert target.state is not VmState.RUNNING
            await source.pause()
            await source.resume()


async def test_a_reboot_that_the_guest_asked_for_before_the_doubt_is_carried_out_on_resume(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the VM is Running with every vCPU parked for ever."""
    guest = Guest(RESET)
    hold_commit(monkeypatch)
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path, guest) as (source, _, move):
            ask_before(monkeypatch, guest, "stop")
            await in_doubt(source, move)
            assert source.reboots == 0
            rebooted = trio.Event()
            source.events.listen(lambda event: rebooted.set() if event.event == "rebooted" else None)
            await source.resume(force=True)
            await rebooted.wait()
            assert (source.state, source.reboots) == (VmState.RUNNING, 1)


async def test_a_paused_vm_does_not_reboot_before_it_is_resumed(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest asks in the very moment in which it is paused."""
    guest = Guest(RESET)
    rebooted = trio.Event()
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor(guest)) as vm:
            await vm.boot()
            vm.events.listen(lambda event: rebooted.set() if event.event == "rebooted" else None)
            ask_before(monkeypatch, guest, "pause")
            await vm.pause()
            await trio.testing.wait_all_tasks_blocked()
            assert (vm.state, vm.reboots) == (VmState.PAUSED, 0)
            await vm.resume()
            await rebooted.wait()
            assert (vm.state, vm.reboots) == (VmState.RUNNING, 1)


class StalledSink:
    """A terminal that somebody stopped with Ctrl-S."""

    async def take(self, output: GuestOutput) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        pass


async def test_a_stalled_serial_sink_does_not_use_up_the_downtime(config: VmConfig, tmp_path: Path) -> None:
    """What it does not take travels with the VM; waiting for it must leave time for the rest of the switchover."""
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, downtime=1.0))
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, target, move):
            assert source.host.machine is not None
            serial = source.host.machine.board.serial
            serial.attach_sink(StalledSink())
            serial.write(0, b"x")
            reports: list[MigrationProgress] = []
            await move(on_progress=reports.append)
            assert reports[-1].attempts == 1
            assert target.state is VmState.RUNNING
            while target.console_tail != b"x":
                await target.console_output()


def own_kernel(config: VmConfig, folder: Path) -> tuple[VmConfig, Path]:
    kernel = folder / "kernel.elf"
    shutil.copy(probe_path(), kernel)
    return attrs.evolve(config, payload=attrs.evolve(config.payload, kernel=str(kernel))), kernel


async def test_a_reboot_that_fails_leaves_a_vm_that_is_shut_down(config: VmConfig, tmp_path: Path) -> None:
    config, kernel = own_kernel(config, tmp_path)
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
            await vm.boot()
            kernel.unlink()
            with pytest.raises(ConfigError, match=r"kernel\.elf"):
                await vm.reboot()
            assert vm.state is VmState.SHUTDOWN
            assert (await vm.wait()).kind == "shutdown"
            shutil.copy(probe_path(), kernel)
            await vm.boot()
            assert vm.state is VmState.RUNNING


async def test_a_reboot_out_of_doubt_takes_the_locks_and_ends_the_doubt(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_commit(monkeypatch)
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path) as (source, _, move):
            await in_doubt(source, move)
            with pytest.raises(MigrationInDoubt, match="the VM is in doubt"):
                await source.reboot()
            assert (await source.resolve_migration(force=True)).forced
            await source.reboot()
            assert (source.state, source.in_doubt) == (VmState.RUNNING, False)
            assert not lock_is_free(config)


async def test_a_guests_reboot_that_fails_is_the_end_of_the_vm_and_not_an_operators_shutdown(
    config: VmConfig, tmp_path: Path
) -> None:
    """A process that serves nobody but this VM must learn that it has nothing left to do."""
    config, kernel = own_kernel(config, tmp_path)
    guest = Guest(RESET)
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor(guest)) as vm:
            await vm.boot()
            kernel.unlink()
            guest.asked = True
            reason = await vm.wait()
            assert reason.kind == "crash"
            assert reason.crash is not None
            assert "kernel.elf" in str(reason.crash)


async def test_an_observer_that_raises_harms_nobody_else(config: VmConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Events come from device actors too: what an observer raises there would end the servicer of activations."""
    seen: list[str] = []

    def faulty(event: Event) -> None:
        raise ZeroDivisionError("an observer's own bug")

    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
            vm.events.listen(faulty)
            vm.events.listen(lambda event: seen.append(event.event))
            await vm.boot()
            assert vm.host.machine is not None
            for slot in vm.host.machine.board.devices:
                ticket = slot.transport.bar_write(0, DEVICE_STATUS, b"\0")
                assert isinstance(ticket, Ticket)
                reset = trio.Event()
                ticket.on_settled(reset.set)  # by the actor, in this thread
                await reset.wait()
            await vm.shutdown()
    assert seen == ["booting", "booted", "reset", "reset", "shutdown"]
    assert "an observer's own bug" in caplog.text


@pytest.mark.parametrize("where", ["precopy", "switchover"])
async def test_a_guest_that_crashes_in_mid_migration_fails_it_and_is_reported_here(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    guest = Guest(Crash())
    begin = DirtyLog.start

    async def began(self: DirtyLog) -> None:
        guest.asked = where == "precopy"
        await begin(self)

    monkeypatch.setattr(DirtyLog, "start", began)
    ask_before(monkeypatch, guest, "stop")
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path, guest) as (source, target, move):
            with pytest.raises(MigrationError, match="the guest crashed: hypervisor internal error"):
                await move()
            reason = await source.wait()
            assert reason.kind == "crash"
            assert reason.crash is not None
            assert reason.crash.reason == "hypervisor internal error"
            assert source.state is VmState.SHUTDOWN
            assert target.state is not VmState.RUNNING
            assert lock_is_free(config)


async def test_closing_the_source_in_mid_migration_rolls_back_and_ends_it(config: VmConfig, tmp_path: Path) -> None:
    """The VM's block is left while its migration runs in another task: that ends first, cancelled, then the VM."""
    hypervisor = ScriptedHypervisor()
    url = f"unix:{tmp_path}/m.sock"
    ended: list[BaseException] = []
    with trio.fail_after(LIMIT_S):
        async with open_incoming(url, hypervisor=hypervisor, deadlines=config.deadlines) as incoming:
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    with pytest.raises(MigrationError, match="cancelled"):
                        await incoming.receive()

                nursery.start_soon(receive)
                async with open_vm(config, hypervisor=hypervisor) as source:
                    await source.boot()
                    half_way = trio.Event()

                    def note(progress: MigrationProgress) -> None:
                        if progress.phase is Phase.SWITCHOVER:
                            half_way.set()

                    async def move() -> None:
                        try:
                            await source.migrate_to(url, on_progress=note)
                        except MigrationCancelled as error:
                            ended.append(error)
                            assert source.state is VmState.RUNNING

                    nursery.start_soon(move)
                    await half_way.wait()
                assert source.state is VmState.SHUTDOWN
                assert (await source.wait()).kind == "shutdown"
            assert ended, "the migration was not cancelled"
            assert incoming.vm.state is not VmState.RUNNING
        assert all(("close",) in vm.calls for vm in hypervisor.vms)
        assert all(("set_dirty_log", False) not in vm.calls for vm in hypervisor.vms), "it goes with the VM"
        assert lock_is_free(config)


async def test_a_vm_that_is_closed_while_it_boots_says_so(config: VmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, closed = trio.Event(), trio.Event()

    async def slow(self: MachineHost, work: Callable[[], None], *, abandon: bool = False) -> None:
        if not abandon:  # the payload
            loading.set()
            await closed.wait()
        work()

    monkeypatch.setattr(MachineHost, "_aside", slow)
    refused: list[Exception] = []

    async def boot(vm: Vm) -> None:
        try:
            await vm.boot()
        except WrongState as error:
            refused.append(error)

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
                nursery.start_soon(boot, vm)
                await loading.wait()
            closed.set()
    assert [str(error) for error in refused] == ["boot: the VM is at its end; it must be there until it has booted"]
    assert lock_is_free(config)
