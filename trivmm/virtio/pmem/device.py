"""virtio-pmem (virtio 1.2 section 5.19): a file mapped as memory, which the guest reads and stores to by itself.

Its one queue takes flush requests (``ffi/pmem.c``). The mapping is made with the device; it is put into the guest where
the device is plugged in, which waits for the kernel (``trivmm.memory.device_memory``).

**Under a migration** the file does not travel, as a disk's doesn't: both hosts open it, and what the guest stored is
flushed before the source gives up its lock, and so before COMMIT. What is in this process only (``discard_writes``, or
a scratch file in a folder) can't be had at another one: such a VM does not move, and says so.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.bus.space import GuestRequest
from trivmm.errors import ConfigError, MigrationError, reason_of
from trivmm.memory.device_memory import DeviceMemory, FileMapping
from trivmm.memory.guest import GuestMemory
from trivmm.values import U64
from trivmm.virtio.device import RING_FEATURES, DeviceDescription, WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.virtio.pmem.image import FIELD, PmemImage, open_scratch
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.setup import DriverSetup

__all__ = ["PmemDevice"]

logger = logging.getLogger(__name__)

QUEUE_SIZE: Final = 256
EVENTS: Final = 4096  # bytes of them that are read at a time
CONFIG: Final = struct.Struct("<QQ")  # section 5.19.4: start, size


@attrs.frozen
class PmemDescription(DeviceDescription):
    """Where its driver was told that it lies."""

    start: U64
    size: U64


class PmemDevice(WorkerDevice):
    """``lock`` False is for a destination: it takes the file's lock at COMMIT. ``start`` is 0 until it is plugged
    in."""

    device_type = 27
    features = RING_FEATURES
    queue_sizes = (QUEUE_SIZE,)
    description_type = PmemDescription

    def __init__(self, config: PmemConfig, memory: GuestMemory, name: str, *, lock: bool = True) -> None:
        """:raises ConfigError: naming what is wrong with the file."""
        super().__init__(config.id or name, memory)
        self._config = config
        self._image: PmemImage | None = None
        self._scratch = -1
        self.start = 0
        self._room: DeviceMemory | None = None
        self._watching: trio.CancelScope | None = None
        self._counted = {"flush_ops": 0, "errors": 0}  # of the workers that have ended
        if os.path.isdir(config.file):
            self._scratch = open_scratch(config)
        else:
            self._image = PmemImage(config, lock=lock)
        self.storage = self._image
        try:
            size = config.size if self._image is None else self._image.size
            assert size is not None
            what = f"the file behind {self.name} ({config.file})"
            fd = self._scratch if self._image is None else self._image.fd
            self.mapping = FileMapping(fd, size, private=config.discard_writes, what=what)
        except OSError as error:
            self._close_files()
            raise ConfigError(FIELD, config.file, f"cannot map it ({reason_of(error)})", "give another file") from error

    # --- in the guest ------------------------------------------------------------------------------------------

    def plug(self, room: DeviceMemory) -> None:
        self.start = room.add(self.mapping)
        self._room = room

    def unplug(self) -> None:
        if self._room is not None:
            self._room.remove(self.mapping)

    @property
    def resources(self) -> list[dict[str, Any]]:
        return [{"MmioAddressRange": {"base": self.start, "size": self.mapping.size}}]

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_pmem *")
        kept = self._image is not None and not self._config.discard_writes
        native.fd = self._image.fd if kept and self._image is not None else -1
        lib.tv_pmem_init(native)
        return native

    def read_config(self, offset: int, size: int) -> bytes:
        return CONFIG.pack(self.start, self.mapping.size)[offset : offset + size].ljust(size, b"\xff")

    # --- the file under it -------------------------------------------------------------------------------------

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        await super().activate(setup, handles, workers)
        self._watching = trio.CancelScope()
        workers.start_soon(self._watch, self._watching)

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().stop()

    async def _watch(self, scope: trio.CancelScope) -> None:
        """A CPU that touches what somebody has cut off can't go on. Most say so (:attr:`DeviceMemory.fault`); there are
        kernels whose KVM tries again for ever."""
        watch = int(lib.tv_watch_file(self.mapping.fd))
        if watch < 0:
            logger.warning("%s: nobody sees when its file is cut (%s)", self.name, os.strerror(-watch))
            return
        try:
            with scope:
                while (why := self.mapping.cut()) is None:
                    await trio.lowlevel.wait_readable(watch)
                    with suppress(BlockingIOError):
                        os.read(watch, EVENTS)
                self.on_request(GuestRequest("crash", why))
        finally:
            trio.lowlevel.notify_closing(watch)
            os.close(watch)

    # --- moved, and counted ------------------------------------------------------------------------------------

    def describe(self) -> PmemDescription:
        """:raises MigrationError: what the guest has there is nowhere but in this process."""
        if self._config.discard_writes or self._image is None:
            why = "discard_writes=on" if self._config.discard_writes else "a scratch file in a folder"
            raise MigrationError(f"{self.name}: what the guest writes there is in this process only ({why})")
        plain = super().describe()
        return PmemDescription(plain.type, plain.features, plain.queue_sizes, self.start, self.mapping.size)

    def become(self, described: Any) -> None:
        """Where other devices have come and gone at the sender's, it lies elsewhere than here."""
        super().become(described)
        if described.size != self.mapping.size:
            raise MigrationError(
                f"{self.name}: the sender's has {described.size} bytes, here it is {self.mapping.size}"
            )
        if described.start != self.start and self._room is not None:
            self._room.remove(self.mapping)
            self.start = self._room.add(self.mapping, described.start)

    def _count(self, worker: QueueWorker) -> None:
        self._counted["flush_ops"] += int(worker.native.flushes)
        self._counted["errors"] += int(worker.native.errors)

    def counters(self) -> dict[str, int]:
        live = [worker.native for worker in self._workers]
        return {
            "flush_ops": self._counted["flush_ops"] + sum(int(each.flushes) for each in live),
            "errors": self._counted["errors"] + sum(int(each.errors) for each in live),
        }

    def _close_files(self) -> None:
        fd, self._scratch = self._scratch, -1
        if fd >= 0:
            os.close(fd)
        if self._image is not None:
            self._image.close()

    def close(self) -> None:
        """A mapping that the guest still has goes with the VM: a vCPU thread may be stuck, and use it."""
        if self._room is None or not self._room.holds(self.mapping):
            self.mapping.close()
        self.mapping.fd = -1
        self._close_files()
