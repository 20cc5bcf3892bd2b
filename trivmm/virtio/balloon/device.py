"""virtio-balloon (virtio 1.2 section 5.5): pages that the guest gives back, whose memory returns to the host.

The guest is told how many pages it is wanted to give (``num_pages``) and says how many it has given (``actual``); the
lists of them are served in C (``ffi/balloon.c``). Queues are numbered as Linux and Cloud Hypervisor do it, without gaps
for those that are not offered: inflate, deflate and, with ``free_page_reporting``, reports. Statistics, free page
hints and page poisoning are not offered, as there.

A page that was given back and is touched again reads as zero: here, and where a migration brings it. What the guest
says it has given is its own word, and is believed nowhere but in what ``vm.info`` shows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError
from trivmm.memory.guest import PAGE_SIZE, GuestMemory
from trivmm.values import U32
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.queue import QueueWorker

__all__ = ["BalloonDevice", "BalloonState"]

F_DEFLATE_ON_OOM: Final = 1 << 2
F_PAGE_REPORTING: Final = 1 << 5
QUEUE_SIZE: Final = 128
REPORTING_QUEUE_SIZE: Final = 32
CONFIG: Final = struct.Struct("<II")  # section 5.5.4: num_pages, actual
ACTUAL: Final = 4  # its offset
COUNTERS: Final = ("inflated", "deflated", "reported", "released", "ranges", "refused", "failed")


@attrs.frozen
class BalloonState:
    """``wanted`` pages the driver is asked for, of which it has said ``actual``."""

    wanted: U32
    actual: U32


class BalloonDevice(WorkerDevice):
    device_type = 5
    state_type = BalloonState

    def __init__(self, config: BalloonConfig, memory: GuestMemory, name: str) -> None:
        """:raises ConfigError: when it is to be as large as RAM."""
        super().__init__(config.id or name, memory)
        self.features = RING_FEATURES
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)
        if config.deflate_on_oom:
            self.features |= F_DEFLATE_ON_OOM
        if config.free_page_reporting:
            self.features |= F_PAGE_REPORTING
            self.queue_sizes += (REPORTING_QUEUE_SIZE,)
        self._wanted = self._pages(config.size, "balloon.size")
        self._actual = 0
        self._counted = dict.fromkeys(COUNTERS, 0)  # of the workers that have ended

    def _pages(self, size: int, field: str) -> int:
        if not 0 <= size < self.memory.size:
            remedy = f"give less than {self.memory.size}"
            raise ConfigError(field, size, "as much as the VM's memory, or more", remedy)
        return size // PAGE_SIZE

    def _shared_out(self, queues: Sequence[int]) -> list[Sequence[int]]:
        return [tuple(queues)] if queues else []

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_balloon *")
        lib.tv_balloon_init(native)
        return native

    # --- what the guest is asked for, and what it says ---------------------------------------------------------

    def resize(self, size: int) -> None:
        """Ask for ``size`` bytes. The guest gives or takes them in its own time. In the trio thread.

        :raises ConfigError: when that is as much as RAM."""
        self._wanted = self._pages(size, "desired_balloon")
        self.on_config_change()

    @property
    def given_bytes(self) -> int:
        """What the guest says it has given; anything, if it lies."""
        return self._actual * PAGE_SIZE

    def read_config(self, offset: int, size: int) -> bytes:
        return CONFIG.pack(self._wanted, self._actual)[offset : offset + size].ljust(size, b"\xff")

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == ACTUAL and len(data) == CONFIG.size - ACTUAL:
            self._actual = int.from_bytes(data, "little")

    def reset(self) -> None:
        """The driver that gave them is gone, and knows of none any more."""
        super().reset()
        self._actual = 0

    # --- saved, and counted ------------------------------------------------------------------------------------

    def save(self) -> BalloonState:
        return BalloonState(self._wanted, self._actual)

    def load(self, state: BalloonState) -> None:
        self._wanted, self._actual = state.wanted, state.actual

    def _count(self, worker: QueueWorker) -> None:
        for name in COUNTERS:
            self._counted[name] += int(getattr(worker.native, name))

    def counters(self) -> dict[str, int]:
        """Pages, since the machine was built: ``inflated``, ``deflated`` and ``reported`` as the guest named them,
        ``released`` whose memory was given back in so many ``ranges``; ``refused`` are no RAM, or parts of lists that
        no driver makes, ``failed`` those that the kernel would not take."""
        live = [worker.native for worker in self._workers]
        return {name: self._counted[name] + sum(int(getattr(each, name)) for each in live) for name in COUNTERS}
