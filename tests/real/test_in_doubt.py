"""A VM in doubt, for its owner and over the API: what asking again finds, what resume makes of it, what force does.

The guests have no disk: no lock keeps two copies apart, only the answer does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trivmm import (
    ConfigError,
    Deadlines,
    DiskConfig,
    MemoryConfig,
    MigrationInDoubt,
    PayloadConfig,
    RunsElsewhere,
    TrivmmError,
    Verdicts,
    Vm,
    VmConfig,
    VmState,
    WrongState,
    open_incoming,
    open_vm,
)
from trivmm.guest import probe_path
from trivmm.machine.machine import Machine
from trivmm.migration.progress import Phase
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.control import command_environment
from trivmm.testing.middlebox import MiddleBox, Strike, middle_box
from trivmm.testing.plugin import FakeVmm
from trivmm.testing.processes import booted, outcome, receiving, state
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.block.file import ImageFile

LIMIT_S = 60
LIMITS = Deadlines(downtime=10, commit=0.4, resolve=0.5)
PATIENT = attrs.evolve(LIMITS, commit=LIMIT_S)  # the destination's: it answers for longer than the test takes
Start = Callable[..., FakeVmm]


@pytest.fixture
def config() -> VmConfig:
    return VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), deadlines=LIMITS)


@attrs.define(eq=False)
class Doubtful:
    """A source in doubt, the destination's VM, the box that can be reached again or not, and the destination's end."""

    source: Vm
    target: Vm
    box: MiddleBox
    leave: trio.Event
    gone: trio.Event


@asynccontextmanager
async def in_doubt(config: VmConfig, folder: Path, at: MessageType) -> AsyncIterator[Doubtful]:
    """``at``: RUNNING is lost, or REFUSED is; then nobody is reached until ``box.down`` is taken back."""
    hypervisor = ScriptedHypervisor()
    with middle_box(f"{folder}/box.sock", f"{folder}/there.sock") as box:

        def cut() -> None:
            box.down = True

        box.strike = Strike(at, "close", first=cut)
        leave, gone = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:

            async def host(*, task_status: trio.TaskStatus[Vm]) -> None:
                async with open_incoming(
                    f"unix:{folder}/there.sock", hypervisor=hypervisor, deadlines=PATIENT, verdicts=Verdicts(nursery)
                ) as incoming:
                    task_status.started(incoming.vm)
                    with suppress(TrivmmError):
                        await incoming.receive()
                    await leave.wait()
                gone.set()

            async with open_vm(config, hypervisor=hypervisor) as source:
                await source.boot()
                target = await nursery.start(host)
                with pytest.raises(MigrationInDoubt):
                    await source.migrate_to(box.url)
                assert (source.state, source.in_doubt) == (VmState.PAUSED, True)
                yield Doubtful(source, target, box, leave, gone)
            nursery.cancel_scope.cancel()


async def test_resume_is_refused_while_the_vm_runs_there_and_asking_again_settles_it(
    config: VmConfig, tmp_path: Path
) -> None:
    with trio.fail_after(LIMIT_S):
        async with in_doubt(config, tmp_path, MessageType.RUNNING) as doubt:
            source, target = doubt.source, doubt.target
            assert target.state is VmState.RUNNING
            told = source.info()["doubt"]
            assert told["destination"] == doubt.box.url
            assert told["session"] == source.migration_progress.session  # type: ignore[union-attr]
            assert told["verdict"] is None
            doubt.box.down = False
            for force in (False, True):  # which is for silence
                with pytest.raises(RunsElsewhere, match=r"box\.sock says that it runs the VM; delete it here"):
                    await source.resume(force=force)
                with pytest.raises(RunsElsewhere):
                    await source.reboot()
                assert (source.state, source.in_doubt) == (VmState.PAUSED, True)
            assert source.info()["doubt"]["verdict"] == "running"
            found = await source.resolve_migration()  # the destination has forgotten it; here it is known
            assert (found.verdict, found.in_doubt, found.forced) == ("running", False, False)
            assert (source.state, source.in_doubt) == (VmState.SHUTDOWN, False)
            assert (await source.wait()).kind == "migrated"
            assert source.migration_progress is not None
            assert source.migration_progress.phase is Phase.DONE
            assert target.state is VmState.RUNNING


async def test_a_vm_that_never_ran_there_is_resumed_without_force(config: VmConfig, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S), pytest.MonkeyPatch.context() as patch:

        async def fails(self: Machine) -> None:
            raise ConfigError("serial.file", "x", "is full", "make room")

        patch.setattr(Machine, "start", fails)
        async with in_doubt(config, tmp_path, MessageType.REFUSED) as doubt:
            doubt.box.down = False
            await doubt.source.resume()
            assert (doubt.source.state, doubt.source.in_doubt) == (VmState.RUNNING, False)
            assert doubt.target.state is not VmState.RUNNING


async def test_asking_again_about_one_that_never_ran_leaves_it_paused_with_its_locks(
    config: VmConfig, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = attrs.evolve(config, disks=(DiskConfig(str(disk)),))
    with trio.fail_after(LIMIT_S), pytest.MonkeyPatch.context() as patch:

        async def fails(self: Machine) -> None:
            for slot in self.board.devices:
                if slot.backend.storage is not None:
                    slot.backend.storage.release_lock()
            raise ConfigError("serial.file", "x", "is full", "make room")

        patch.setattr(Machine, "start", fails)
        async with in_doubt(config, tmp_path, MessageType.REFUSED) as doubt:
            source = doubt.source
            doubt.box.down = False
            other = ImageFile(str(disk), readonly=False, lock=True)
            with pytest.raises(ConfigError, match="in use by another"):
                await source.resolve_migration()
            assert source.in_doubt
            other.close()
            found = await source.resolve_migration()
            assert (found.verdict, found.in_doubt) == ("refused", False)
            assert "serial.file" in found.reason
            assert (source.state, source.in_doubt) == (VmState.PAUSED, False)
            with pytest.raises(ConfigError, match="in use by another"):
                ImageFile(str(disk), readonly=False, lock=True)
            with pytest.raises(WrongState, match="in doubt after a migration"):
                await source.resolve_migration()
            await source.resume()
            assert source.state is VmState.RUNNING


async def test_a_destination_that_is_gone_wants_force(config: VmConfig, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with in_doubt(config, tmp_path, MessageType.RUNNING) as doubt:
            source = doubt.source
            doubt.leave.set()
            await doubt.gone.wait()
            assert not (tmp_path / "there.sock").exists()
            doubt.box.down = False
            with pytest.raises(MigrationInDoubt, match=r"say force: if it does, two copies run"):
                await source.resume()
            found = await source.resolve_migration()
            assert (found.verdict, found.in_doubt, found.forced) == ("unreachable", True, False)
            assert source.in_doubt
            found = await source.resolve_migration(force=True)
            assert (found.verdict, found.in_doubt, found.forced) == ("unreachable", False, True)
            assert (source.state, source.in_doubt) == (VmState.PAUSED, False)
            await source.resume()
            assert source.state is VmState.RUNNING


async def test_another_receiver_at_that_address_does_not_know_and_that_proves_nothing(
    config: VmConfig, tmp_path: Path
) -> None:
    with trio.fail_after(LIMIT_S):
        async with in_doubt(config, tmp_path, MessageType.RUNNING) as doubt:
            doubt.leave.set()
            await doubt.gone.wait()
            doubt.box.down = False
            async with (
                open_incoming(
                    f"unix:{tmp_path}/there.sock", hypervisor=ScriptedHypervisor(), deadlines=LIMITS
                ) as incoming,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(incoming.receive)
                found = await doubt.source.resolve_migration()
                assert (found.verdict, found.in_doubt) == ("unknown", True)
                assert "no such session here" in found.reason
                with pytest.raises(MigrationInDoubt):
                    await doubt.source.resume()
                nursery.cancel_scope.cancel()


async def test_locks_that_went_to_a_third_party_are_no_question_for_the_destination(
    config: VmConfig, tmp_path: Path
) -> None:
    """The doubt that a rolled back switchover can end in."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = attrs.evolve(config, disks=(DiskConfig(str(disk)),))
    hypervisor = ScriptedHypervisor()
    url = f"unix:{tmp_path}/m.sock"
    thieves: list[ImageFile] = []
    release = Machine.release_locks

    async def stolen(self: Machine, at_most_s: float) -> None:
        await release(self, at_most_s)
        thieves.append(ImageFile(str(disk), readonly=False, lock=True))
        raise TrivmmError("and now it fails")

    with trio.fail_after(LIMIT_S), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "release_locks", stolen)
        async with open_vm(config, hypervisor=hypervisor) as source:
            await source.boot()
            async with open_incoming(url, hypervisor=hypervisor, deadlines=LIMITS) as incoming:
                async with trio.open_nursery() as nursery:

                    async def receive() -> None:
                        with pytest.raises(TrivmmError):
                            await incoming.receive()

                    nursery.start_soon(receive)
                    with pytest.raises(MigrationInDoubt, match="locks can't be taken back"):
                        await source.migrate_to(url)
            assert source.info()["doubt"]["session"] is None
            with pytest.raises(ConfigError, match="in use by another"):
                await source.resume()
            thieves.pop().close()
            assert (await source.resolve_migration()).verdict == "refused"
            await source.resume()
            assert source.state is VmState.RUNNING


# --- over the API, between processes -------------------------------------------------------------------------------

OPTIONS = ["--deadlines", "commit=1,resolve=1"]


def move(source: FakeVmm, target: FakeVmm, box: MiddleBox) -> tuple[dict[str, Any], int | None]:
    """The source's last progress, and what receive-migration answered."""
    with receiving(target, Path(box.target)) as there:
        request = {"destination_url": box.url, "downtime_ms": 5000}
        assert source.call("PUT", "vm.send-migration", request) == (204, None)
        progress = outcome(source)
    return progress, there.status


@pytest.fixture
def box(tmp_path: Path) -> Any:
    with middle_box(f"{tmp_path}/box.sock", f"{tmp_path}/there.sock") as made:
        yield made


def remote(fake: FakeVmm, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivmm", "remote", "--api-socket", str(fake.socket), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=command_environment()
    )


def test_the_doubt_of_a_process_and_its_operator(fake_vmm: Start, box: MiddleBox) -> None:
    source, target = booted(fake_vmm(options=OPTIONS)), fake_vmm(options=OPTIONS)

    def cut() -> None:
        box.down = True

    box.strike = Strike(MessageType.RUNNING, "close", first=cut)
    progress, received = move(source, target, box)
    assert (progress["phase"], received) == ("IN_DOUBT", 204)
    assert state(source) == "Paused"
    info = source.call("GET", "vm.info")[1]
    assert (info["in_doubt"], info["doubt"]["session"]) == (True, progress["session"])
    status, said = source.call("PUT", "vm.resume")
    assert status == 500
    assert said[:2] == ["Error from API", "The VM could not resume"]
    assert "two copies run" in said[2]
    code, found = source.call("PUT", "vm.resolve-migration")
    assert (code, found["verdict"], found["in_doubt"]) == (200, "unreachable", True)
    assert source.call("PUT", "vm.resolve-migration", {"force": "yes"})[0] == 400
    box.down = False
    assert remote(source, "boot", "--force").returncode == 2
    status, said = source.call("PUT", "vm.resume")
    assert (status, "says that it runs the VM" in said[2]) == (500, True)
    done = remote(source, "resolve-migration", "--force")
    assert json.loads(done.stdout)["verdict"] == "running"  # force does not override it
    assert source.process.wait(LIMIT_S) == 0  # as after any migration
    assert state(target) == "Running"
    assert not Path(box.target).exists()
    assert target.call("PUT", "vm.resolve-migration")[0] == 500


def test_a_forced_doubt_can_be_resumed_over_the_api(fake_vmm: Start, box: MiddleBox) -> None:
    source, target = booted(fake_vmm(options=OPTIONS)), fake_vmm(options=OPTIONS)

    def cut() -> None:
        box.down = True

    box.strike = Strike(MessageType.RUNNING, "close", first=cut)
    assert move(source, target, box)[0]["phase"] == "IN_DOUBT"
    target.process.kill()  # the operator made sure
    code, found = source.call("PUT", "vm.resolve-migration", {"force": True})
    assert (code, found["verdict"], found["forced"], found["in_doubt"]) == (200, "unreachable", True, False)
    assert state(source) == "Paused"
    assert source.call("PUT", "vm.resume") == (204, None)
    assert state(source) == "Running"


@pytest.mark.parametrize("link", ["pass", "close", "silence"])
def test_a_source_process_that_is_stopped_after_commit_learns_what_became_of_it(
    fake_vmm: Start, box: MiddleBox, link: str
) -> None:
    """SIGSTOP for longer than ``commit``, in the very moment in which COMMIT passes."""
    source, target = booted(fake_vmm(options=OPTIONS)), fake_vmm(options=OPTIONS)

    def stop() -> None:
        os.kill(source.process.pid, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (source.process.pid, signal.SIGCONT)).start()

    box.strike = Strike(MessageType.COMMIT, link, forward=True, first=stop)
    progress, received = move(source, target, box)
    assert box.struck.is_set()
    ran_there = received == 204
    assert list(progress["state"]) == (["Finished"] if ran_there else ["Failed"])
    assert progress["phase"] != "IN_DOUBT"
    if link == "pass":
        assert ran_there
    assert state(target) == "Running" if ran_there else state(source) == "Running"


def test_a_middle_box_that_closes_with_commit_in_flight_brings_the_source_back_and_keeps_the_address_free(
    fake_vmm: Start, box: MiddleBox
) -> None:
    source, target = booted(fake_vmm(options=OPTIONS)), fake_vmm(options=OPTIONS)
    box.strike = Strike(MessageType.COMMIT, "close")
    progress, received = move(source, target, box)
    assert (progress["phase"], received) == ("FAILED", 500)
    assert state(source) == "Running"
    progress, received = move(source, target, box)  # the same receiver, at the same address, at once
    assert (progress["phase"], received) == ("DONE", 204)
    assert state(target) == "Running"
