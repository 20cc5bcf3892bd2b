"""Disks on their way from one host to the other: what is flushed, dropped and locked, when, by whom, and what fails.

Real image files, the scripted hypervisor, calls to the storage in threads as for a real one, and a storage that hangs
or fails when it is told to. ``test_shared_storage.py`` has what it is for.
"""

from __future__ import annotations

import errno
import fcntl
import os
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
from trivmm.errors import ConfigError, DeadlineError, MigrationError
from trivmm.guest import probe_path
from trivmm.migration.source import disks as flushes
from trivmm.testing.scripted import Compute, ScriptedHypervisor
from trivmm.virtio.block.file import FLOCK, ImageFile
from trivmm.virtio.block.formats import open_image
from trivmm.virtio.block.image import Image

LIMIT_S = 60
LOCKS = {fcntl.F_WRLCK: "lock", fcntl.F_RDLCK: "lock", fcntl.F_UNLCK: "unlock"}


class Storage:
    """What was asked of image files: ``calls`` has (side, what, stage of the side's machine). ``on`` is called in the
    calling thread, before the call; what it raises is the storage's answer."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.on: Callable[[str, str], None] = lambda side, what: None
        self.in_trio: list[str] = []
        self.sides: dict[str, Vm] = {}
        self._trio = threading.current_thread()
        fdatasync, fadvise, flock = os.fdatasync, os.posix_fadvise, fcntl.fcntl

        def seen(fd: int, what: str) -> None:
            side = next((name for name, vm in self.sides.items() if fd in _descriptors(vm)), "")
            if not side:
                return
            machine = self.sides[side].host.machine
            self.calls.append((side, what, "" if machine is None else machine.stage.name))
            if threading.current_thread() is self._trio:
                self.in_trio.append(what)
            self.on(side, what)

        def my_fdatasync(fd: int) -> None:
            seen(fd, "sync")
            fdatasync(fd)

        def my_fadvise(fd: int, offset: int, length: int, advice: int) -> None:
            assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
            seen(fd, "drop")
            fadvise(fd, offset, length, advice)

        def my_fcntl(fd: int, command: int, argument: Any = 0) -> Any:
            if isinstance(argument, bytes) and len(argument) == FLOCK.size:
                seen(fd, LOCKS[FLOCK.unpack(argument)[0]])
            return flock(fd, command, argument)

        patch.setattr(os, "fdatasync", my_fdatasync)
        patch.setattr(os, "posix_fadvise", my_fadvise)
        patch.setattr(fcntl, "fcntl", my_fcntl)


def _descriptors(vm: Vm) -> set[int]:
    board = vm.host.board
    images: list[Any] = [] if board is None else board.storages
    files = [file for image in images for file in image.files]
    return {fd for file in files for fd in (file.fd, file.sync_fd) if fd >= 0}


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    return Storage(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig(str(probe_path())),
        memory=MemoryConfig(8 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(downtime=20, commit=20, kernel=20, rollback=20),
    )


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


@asynccontextmanager
async def source(config: VmConfig, storage: Storage) -> AsyncIterator[Vm]:
    async with open_vm(config, hypervisor=ScriptedHypervisor(beating)) as vm:
        vm.host.storage.threaded = True
        storage.sides["source"] = vm
        await vm.boot()
        storage.calls.clear()
        yield vm


@asynccontextmanager
async def destination(config: VmConfig, storage: Storage, folder: Path) -> AsyncIterator[tuple[str, Vm]]:
    """Its URL, and the VM that arrives there."""
    hypervisor = ScriptedHypervisor(beating)
    async with open_incoming(f"unix:{folder}/m.sock", hypervisor=hypervisor, deadlines=config.deadlines) as incoming:
        incoming.vm.host.storage.threaded = True
        storage.sides["destination"] = incoming.vm
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with trio.CancelScope() as scope:
                    try:
                        await incoming.receive()
                    except Exception:  # the source's error says more
                        scope.cancel()

            nursery.start_soon(receive)
            yield incoming.url, incoming.vm
            nursery.cancel_scope.cancel()


@contextmanager
def hung(storage: Storage, *, side: str, what: str, nth: int) -> Iterator[tuple[trio.Event, threading.Event]]:
    """The nth such call waits until it is let go; gives (it has come, let it go)."""
    came, go, left = trio.Event(), threading.Event(), [nth]
    token = trio.lowlevel.current_trio_token()

    def on(which: str, call: str) -> None:
        if (which, call) == (side, what):
            left[0] -= 1
            if left[0] == 0:
                token.run_sync_soon(came.set)
                assert go.wait(LIMIT_S)

    storage.on = on
    try:
        yield came, go
    finally:
        go.set()


async def test_an_image_is_flushed_dropped_and_unlocked_then_locked_and_dropped(
    config: VmConfig, storage: Storage, tmp_path: Path
) -> None:
    """In this order, and never in the trio thread: these wait for the storage."""
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm, destination(config, storage, tmp_path) as (url, there):
            await vm.migrate_to(url, downtime_ms=10_000)  # one switchover, on a slow machine too: each would be noted
            assert there.state is VmState.RUNNING
            moved = list(storage.calls)
    assert moved == [
        ("source", "sync", "RUNNING"),  # most of it while the guest runs
        ("source", "drop", "RUNNING"),
        ("source", "sync", "FLUSHED"),  # a stage is entered before its work is done
        ("source", "drop", "FLUSHED"),
        ("source", "unlock", "UNLOCKED"),
        ("destination", "lock", "UNLOCKED"),
        ("destination", "drop", "UNLOCKED"),  # after the work on the way up
    ]
    assert storage.in_trio == []


async def test_what_a_destination_had_cached_goes_before_the_guest_waits_for_it(
    config: VmConfig, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At SETUP, and again once it has the locks, when there is little left to drop."""
    refreshed: list[str] = []
    refresh = Image.refresh

    def noted(self: Image) -> None:
        refreshed.append(threading.current_thread().name)
        refresh(self)

    monkeypatch.setattr(Image, "refresh", noted)
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm, destination(config, storage, tmp_path) as (url, _):
            await vm.migrate_to(url)
    assert refreshed == ["looking at the "] * 2


async def test_a_refused_move_takes_the_locks_back_and_believes_nothing_either(
    config: VmConfig, storage: Storage, tmp_path: Path
) -> None:
    def on(side: str, what: str) -> None:
        if (side, what) == ("destination", "lock"):
            raise OSError(errno.EAGAIN, "somebody has it")

    storage.on = on
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm, destination(config, storage, tmp_path) as (url, there):
            with pytest.raises(MigrationError, match="in use by another VM"):
                await vm.migrate_to(url)
            ours = [what for side, what, _ in storage.calls if side == "source"]
            assert ours == ["sync", "drop", "sync", "drop", "unlock", "lock", "drop"]
            assert vm.state is VmState.RUNNING
            await beats(vm)
            assert there.state is not VmState.RUNNING
    assert storage.in_trio == ["unlock"], "the destination's own: nobody waits for a refusal"


async def test_a_last_flush_that_takes_longer_than_the_downtime_undoes_the_switchover(
    config: VmConfig, storage: Storage, tmp_path: Path
) -> None:
    """The guest runs again at once, with the flush still under way and every lock where it was; the next switchover
    waits for a flush that has ended."""
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, downtime=1.0))
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm, destination(config, storage, tmp_path) as (url, there):
            with hung(storage, side="source", what="sync", nth=2) as (came, go):

                async def let_go() -> None:
                    await came.wait()
                    await beats(vm)
                    assert vm.info()["state"] == "Running"
                    go.set()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(let_go)
                    report = await vm.migrate_to(url)
            assert report.attempts > 1
            assert there.state is VmState.RUNNING
            stages = [stage for side, what, stage in storage.calls if (side, what) == ("source", "sync")]
            assert stages[:3] == ["RUNNING", "FLUSHED", "RUNNING"]
            assert [what for side, what, _ in storage.calls if side == "source"].count("unlock") == 1


async def test_a_storage_that_does_not_answer_fails_the_migration_by_name(
    config: VmConfig, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushes, "PATIENCE_S", 0.01)
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, storage=0.5))
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm:
            with hung(storage, side="source", what="sync", nth=1) as (_, go):
                async with destination(config, storage, tmp_path) as (url, _):
                    with pytest.raises(DeadlineError, match=r"storage \(0.5 s\) .*flushing the disks: in the storage"):
                        await vm.migrate_to(url)
                assert vm.state is VmState.RUNNING
                await beats(vm)
                assert "flushing the disks: in the storage for" in vm.stuck[0]
                go.set()
                while vm.host.storage.busy:  # noqa: ASYNC110 - its thread
                    await trio.sleep(0.001)
            assert vm.stuck == ()
            async with destination(config, storage, tmp_path) as (url, there):
                await vm.migrate_to(url)
                assert there.state is VmState.RUNNING


@pytest.mark.parametrize("nth", [1, 2], ids=["while the guest runs", "in the switchover"])
async def test_data_that_the_storage_lost_keeps_the_vm_where_it_is(
    config: VmConfig, storage: Storage, tmp_path: Path, nth: int
) -> None:
    """The kernel says so once; here it is said at every later try, and the guest's own flush hears of it on another
    descriptor."""
    left = [nth]

    def on(side: str, what: str) -> None:
        if what == "sync":
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    storage.on = on
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm:
            for _ in range(2):
                async with destination(config, storage, tmp_path) as (url, _):
                    with pytest.raises(
                        MigrationError, match=r"disk\.img: what the guest wrote can't be flushed \(Input"
                    ):
                        await vm.migrate_to(url)
                await beats(vm)
            assert "unlock" not in [what for _, what, _ in storage.calls]


async def test_a_vm_that_ends_while_its_storage_hangs_keeps_the_image_open(
    config: VmConfig, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on with its descriptors when it comes back. The lock is not needed for that."""
    monkeypatch.setattr(flushes, "PATIENCE_S", 0.01)
    config = attrs.evolve(config, deadlines=attrs.evolve(config.deadlines, storage=0.3, device_stop=0.5))
    with trio.fail_after(LIMIT_S):
        async with source(config, storage) as vm:
            with hung(storage, side="source", what="sync", nth=1) as (_, go):
                async with destination(config, storage, tmp_path) as (url, _):
                    with pytest.raises(DeadlineError, match="storage"):
                        await vm.migrate_to(url)
                await vm.shutdown()
                assert any("flushing the disks" in each for each in vm.stuck)
                board = vm.host.board
                assert board is not None
                (image,) = board.storages
                assert isinstance(image, Image)
                os.fstat(image.files[0].sync_fd)
                ImageFile(config.disks[0].path, readonly=False, lock=True).close()
                go.set()
                while vm.host.storage.busy:  # noqa: ASYNC110 - its thread
                    await trio.sleep(0.001)
            board.in_use = board._closed = board._freed = False  # a test's own cleaning up
            board.stuck.clear()
            board.close()


def test_an_image_that_has_less_than_the_guest_was_told_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    image = open_image(DiskConfig(str(path)), lock=True)
    image.refresh()
    os.truncate(path, 1 << 19)
    with pytest.raises(ConfigError, match=r"disks\.path = .*has shrunk to 524288 bytes, the guest was told of 1048576"):
        image.refresh()
    image.close()
    image.release_lock()


def test_nothing_is_left_of_an_image_that_was_replaced_while_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    real, opened = os.open, list[int]()

    def replaced(*arguments: Any, **more: Any) -> int:
        opened.append(real(*arguments, **more))
        path.unlink()
        path.write_bytes(bytes(512))
        return opened[-1]

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", replaced)
        with pytest.raises(ConfigError, match="was replaced in this moment"):
            ImageFile(str(path), readonly=False, lock=True)
    assert len(opened) == 2
    assert os.listdir("/proc/self/fd") == before
