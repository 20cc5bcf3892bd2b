"""virtio-watchdog, as Cloud Hypervisor has it: a guest that stops to ping it is reset.

A driver offers a buffer every 15 seconds; the device (``ffi/watchdog.c``) writes a 1 into it. From the first ping on,
20 seconds without another one reset the VM. (There the clock is looked at every 15 seconds: it takes up to 35.) They
are seconds in which the guest runs: see :mod:`.stopwatch`. A reset of the device disarms it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.bus.space import GuestRequest
from trivmm.memory.guest import GuestMemory
from trivmm.values import U32
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.setup import DriverSetup
from trivmm.virtio.watchdog.stopwatch import Stopwatch

__all__ = ["WatchdogDevice", "WatchdogState"]

QUEUE_SIZE: Final = 8
INTERVAL_S: Final = 15  # of its driver
TIMEOUT_S: Final = INTERVAL_S + 5.0
MAX_MS: Final = (1 << 32) - 1


@attrs.frozen
class WatchdogState:
    """``idle_ms``: how long the guest has run without a ping."""

    armed: bool
    idle_ms: U32


class WatchdogDevice(WorkerDevice):
    device_type = 35
    features = RING_FEATURES
    queue_sizes = (QUEUE_SIZE,)
    state_type = WatchdogState

    def __init__(self, memory: GuestMemory, name: str = "__watchdog") -> None:
        super().__init__(name, memory)
        self._watch = Stopwatch()
        self._seen = 0  # pings of the worker that is there, as far as the watch knows of them
        self._pings = self._errors = self._expired = 0  # of the workers that have ended
        self._changed = trio.Event()  # the guest runs, or stands still
        self._watching: trio.CancelScope | None = None

    # --- in the trio thread ------------------------------------------------------------------------------------

    def guest_runs(self, running: bool) -> None:
        self._look()
        (self._watch.start if running else self._watch.stop)(time.monotonic())
        self._changed.set()
        self._changed = trio.Event()

    def _look(self) -> None:
        """Tell the watch of pings that came in meanwhile."""
        for worker in self._workers:
            self._look_at(worker)

    def _look_at(self, worker: QueueWorker) -> None:
        pings = int(worker.native.pings)
        if pings != self._seen:
            self._seen = pings
            self._watch.ping(int(worker.native.last_ns) / 1e9)

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        await super().activate(setup, handles, workers)
        self._watching = trio.CancelScope()
        workers.start_soon(self._wait_for_the_end, self._watching)

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().stop()

    async def _wait_for_the_end(self, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                self._look()
                watch = self._watch
                left = TIMEOUT_S - watch.idle(time.monotonic()) if watch.armed else TIMEOUT_S
                if left <= 0:
                    break
                # A first ping tells nobody, and what it begins ends no sooner than that.
                with trio.move_on_after(left if watch.running else math.inf):
                    await self._changed.wait()
            self._expired += 1
            self._watch.disarm(time.monotonic())
            self.on_request(GuestRequest("reset", f"the watchdog: no ping for {TIMEOUT_S:g} s"))

    # --- a worker, saved, and counted --------------------------------------------------------------------------

    def _make_worker(self, features: int) -> Any:
        self._seen = 0
        native = ffi.new("struct tv_watchdog *")
        lib.tv_watchdog_init(native)
        return native

    def _count(self, worker: QueueWorker) -> None:
        self._look_at(worker)
        self._pings += int(worker.native.pings)
        self._errors += int(worker.native.errors)

    def counters(self) -> dict[str, int]:
        live = [worker.native for worker in self._workers]
        return {
            "pings": self._pings + sum(int(each.pings) for each in live),
            "errors": self._errors + sum(int(each.errors) for each in live),
            "expired": self._expired,
        }

    def reset(self) -> None:
        super().reset()
        self._watch.disarm(time.monotonic())

    def save(self) -> WatchdogState:
        idle_ms = int(self._watch.idle(time.monotonic()) * 1000)
        return WatchdogState(self._watch.armed, min(idle_ms, MAX_MS))

    def load(self, state: WatchdogState) -> None:
        self._watch.load(armed=state.armed, idle=state.idle_ms / 1000)
