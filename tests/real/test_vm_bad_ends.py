"""A migration's bad ends as the owner of a VM sees them: real board, real sockets, scripted vCPUs.

Whatever fails, crashes or is closed in the middle, the VM is in a named state, its locks are where it runs, and what
the guest asked for is carried out by somebody.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
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
    SerialConfig,
    Vm,
    VmConfig,
    VmState,
    open_incoming,
    open_vm,
)
from trivmm.errors import CommitRefused, ConfigError, TrivmmError
from trivmm.guest import probe_path
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.block.image import Image

LIMIT_S = 60


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig(str(probe_path())),
        memory=MemoryConfig(4 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(downtime=10, commit=0.3),
    )


def lock_is_free(config: VmConfig) -> bool:
    image = Image(config.disks[0].path, readonly=False, lock=False)
    try:
        image.take_lock()
    except ConfigError:
        return False
    finally:
        image.close()
    return True


@asynccontextmanager
async def two_sides(config: VmConfig, folder: Path, *scripts: Any) -> AsyncIterator[tuple[Vm, Vm, Callable[..., Any]]]:
    """A booted source, the VM that a destination would have, and the move (of the source's outcome)."""
    hypervisor = ScriptedHypervisor(*scripts)
    url = f"unix:{folder}/m.sock"
    async with (
        open_vm(config, hypervisor=hypervisor) as source,
        open_incoming(url, hypervisor=hypervisor, deadlines=config.deadlines) as incoming,
    ):
        await source.boot()

        async def receive() -> None:
            try:
                await incoming.receive()
            except TrivmmError:
                return

        async def move(**options: Any) -> None:
            failure: Exception | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                try:
                    await source.migrate_to(url, **options)
                except Exception as error:  # raised below, outside the nursery: not in a group
                    failure = error
                    nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure

        yield source, incoming.vm, move


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
