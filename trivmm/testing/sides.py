"""The two ends of a move in one process: a booted VM on scripted vCPUs, and the one that it would be elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from trivmm.config import VmConfig
from trivmm.errors import ConfigError, TrivmmError
from trivmm.incoming import open_incoming
from trivmm.testing.scripted import Script, ScriptedHypervisor
from trivmm.unwrapped import unwrapped_nursery
from trivmm.virtio.block.file import ImageFile
from trivmm.vm import Vm, open_vm

__all__ = ["lock_is_free", "two_sides"]


@asynccontextmanager
async def two_sides(
    config: VmConfig, folder: Path, *scripts: Script
) -> AsyncIterator[tuple[Vm, Vm, Callable[..., Awaitable[None]]]]:
    """A booted source, the VM that a destination would have, and the move: ``migrate_to`` with its options, and with
    the source's outcome."""
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
            async with unwrapped_nursery() as nursery:
                nursery.start_soon(receive)
                await source.migrate_to(url, **options)

        yield source, incoming.vm, move


def lock_is_free(config: VmConfig) -> bool:
    """Whether nobody holds the first disk's image."""
    image = ImageFile(config.disks[0].path, readonly=False, lock=False)
    try:
        image.take_lock()
    except ConfigError:
        return False
    finally:
        image.close()
    return True
