"""Doubles for migrations: machines that only know whether they run, a disk lock, and a network in memory.

They work in virtual time (no threads) and are real where it matters: RAM is a real
:class:`~trivmm.memory.guest.GuestMemory` with its host dirty log, and the frames are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import attrs
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, PauseTimeout
from trivmm.hypervisor.base import VcpuState, VmBackendState
from trivmm.memory.dirty_log import DirtyLog, HostWriters
from trivmm.memory.guest import GuestMemory
from trivmm.migration.link.halves import Connection, LinkLost
from trivmm.migration.link.streams import stream_connection
from trivmm.state.machine import Barrier, BarrierKind, MachineState, SavedVcpu
from trivmm.state.virtio import LifeStage
from trivmm.testing.states import a_board, a_device

__all__ = ["DiskLock", "FakeDestination", "FakeSource", "MemoryNet", "Tap", "TappedStream"]

T = TypeVar("T")

SMALL_RAM = ((0, 1 << 20), (1 << 32, 1 << 20))


@attrs.define(eq=False)
class DiskLock:
    """An image lock. ``refuse`` makes every later ``take`` fail."""

    owner: object = None
    refuse: bool = False

    def take(self, who: object) -> None:
        if self.refuse or self.owner not in (None, who):
            raise ConfigError("disks[0].path", "disk.img", "locked by another process", "stop it")
        self.owner = who

    def release(self, who: object) -> None:
        if self.owner is who:
            self.owner = None


class _Machine:
    def __init__(self, lock: DiskLock, deadlines: Deadlines, ram: tuple[tuple[int, int], ...]) -> None:
        self.memory = GuestMemory(ram)
        self.deadlines = deadlines
        self.lock = lock
        self.running = False
        self.events: list[str] = []

    def contents(self) -> list[bytes]:
        """The bytes of each region."""
        return [self.memory.read(region.gpa, region.size) for region in self.memory.regions]

    def close(self) -> None:
        self.memory.close()

    async def take_locks(self) -> None:
        await trio.lowlevel.checkpoint()
        self.lock.take(self)


async def _at_once(what: str, work: Callable[[], T]) -> T:
    return work()


class FakeSource(_Machine):
    """Runs from the start, with the lock. ``stop_s`` and ``release_s``: how long these take; ``flushes_s``: how long
    flushes of its disks take, one by one, then none takes any time."""

    def __init__(
        self,
        lock: DiskLock,
        deadlines: Deadlines | None = None,
        ram: tuple[tuple[int, int], ...] = SMALL_RAM,
        live_copy: bool = True,
    ) -> None:
        super().__init__(lock, deadlines or Deadlines(), ram)
        self.live_copy = live_copy
        self.dirty_log = DirtyLog((HostWriters(self.memory), self), _at_once)
        self.stop_s = self.release_s = 0.001
        self.flushes_s: list[float] = []
        self._flushed_at: float | None = None  # of the flush that is under way
        self.on_stopped: Callable[[], None] = lambda: None
        self.logging = False
        self.unlocked = False  # perhaps half way
        self.throttle = 0
        self.stops = 0
        lock.take(self)
        self.running = True

    def describe(self) -> dict[str, Any]:
        return {"ram": self.memory.size}

    def set_dirty_log(self, enabled: bool) -> None:
        """As its guest's dirty log: what is written here is logged by the host's."""
        self.logging = enabled
        self.events.append("log on" if enabled else "log off")

    def harvest_dirty(self, slot: int, into: Any) -> None:
        """A guest that writes by itself overrides this."""

    def set_throttle(self, percent: int) -> None:
        self.throttle = percent

    async def stop(self, at_most_s: float) -> None:
        self.stops += 1
        limit_s = min(at_most_s, self.deadlines.pause)
        await trio.sleep(min(self.stop_s, limit_s))
        if self.stop_s > limit_s:
            raise PauseTimeout("pause", limit_s, "vcpu0: scripted not to stop")
        self.running = False
        self.events.append("stop")
        self.on_stopped()

    def save(self) -> MachineState:
        assert not self.running
        self.memory.write(0x800, b"saving dirties memory")
        vcpu = SavedVcpu(0, VcpuState("fake/1", {"regs": b"\1\2"}), Barrier("rng", BarrierKind.ACTIVATION))
        devices = {"rng": a_device(LifeStage.ACTIVATING, status=15)}
        return MachineState((vcpu,), VmBackendState("fake/1", {}), devices, a_board(), reset_pending=None, run=True)

    async def undo(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.unlocked:
            await self.take_locks()
            self.unlocked = False
        if not self.running:
            assert self.lock.owner is self, "runs without its lock"
            self.running = True
            self.events.append("undo")

    async def flush_disks(self, at_most_s: float) -> bool:
        if self._flushed_at is None:
            self._flushed_at = trio.current_time() + (self.flushes_s.pop(0) if self.flushes_s else 0.0)
        left_s = self._flushed_at - trio.current_time()
        await trio.sleep(max(0.0, min(left_s, at_most_s)))
        if left_s > at_most_s:
            return False
        self._flushed_at = None
        self.events.append("flush")
        return True

    async def release_locks(self, at_most_s: float) -> None:
        self.unlocked = True
        await trio.sleep(self.release_s)
        self.lock.release(self)


class FakeDestination(_Machine):
    """Built by :meth:`factory`. ``start_s``: how long a start takes; ``load_error``, ``start_error``: raised."""

    def __init__(
        self, lock: DiskLock, deadlines: Deadlines | None = None, ram: tuple[tuple[int, int], ...] = SMALL_RAM
    ) -> None:
        super().__init__(lock, deadlines or Deadlines(), ram)
        self.start_s = 0.001
        self.state: MachineState | None = None
        self.loads = 0
        self.build_error: Exception | None = None
        self.load_error: Exception | None = None
        self.start_error: Exception | None = None

    async def factory(self, setup: dict[str, Any]) -> FakeDestination:
        await trio.lowlevel.checkpoint()
        if self.build_error:
            raise self.build_error
        assert setup == {"ram": self.memory.size}
        return self

    async def load(self, state: MachineState) -> None:
        if self.load_error:
            raise self.load_error
        self.state = state
        self.loads += 1

    async def start(self) -> None:
        await trio.sleep(self.start_s)
        if self.start_error:
            raise self.start_error
        assert self.lock.owner is self, "runs without its lock"
        self.running = True


Tap: TypeAlias = Callable[["TappedStream", bytes], Awaitable[bytes | None]]


class TappedStream(trio.abc.Stream):
    """A stream with a tap: ``tap(stream, data)`` sees each frame before it is sent and gives the part that may
    pass; less than the whole kills the link after it, ``None`` loses the frame and the link lives on."""

    def __init__(self, inner: trio.abc.Stream, tap: Tap) -> None:
        self.inner = inner
        self._tap = tap

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        passed = await self._tap(self, bytes(data))
        if passed is None:
            return
        await self.inner.send_all(passed)
        if len(passed) < len(data):
            await self.inner.aclose()
            raise trio.BrokenResourceError("cut")

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def _pass(stream: TappedStream, data: bytes) -> bytes:
    await trio.lowlevel.checkpoint()
    return data


class MemoryNet:
    """A listener, and a dialer to it, in memory. ``source_tap`` and ``destination_tap`` see every frame of the
    streams made from then on; ``bytes_per_s`` slows the source's sending down."""

    url = "memory:"
    transport = "memory"

    def __init__(self, deadlines: Deadlines | None = None) -> None:
        self.deadlines = deadlines or Deadlines()
        self.source_tap: Tap = _pass
        self.destination_tap: Tap = _pass
        self.bytes_per_s = math.inf
        self.dials = 0
        self.down = False
        self.closed = False
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](16)

    async def dial_raw(self) -> trio.abc.Stream:
        """The source's end of a new connection."""
        await trio.lowlevel.checkpoint()
        if self.down or self.closed:
            raise LinkLost("memory: nobody listens")
        self.dials += 1
        here, there = trio.testing.memory_stream_pair()
        self._send.send_nowait(TappedStream(there, self.destination_tap))
        return TappedStream(here, self._paced)

    async def _paced(self, stream: TappedStream, data: bytes) -> bytes | None:
        await trio.sleep(len(data) / self.bytes_per_s)
        return await self.source_tap(stream, data)

    async def dial(self) -> Connection:
        return stream_connection(await self.dial_raw(), "memory", self.deadlines)

    async def accept(self) -> Connection:
        return stream_connection(await self._receive.receive(), "memory (incoming)", self.deadlines)

    def close(self) -> None:
        self.closed = True
