"""A migration in virtual time: a source, a destination and the wire between them, and what must hold after any end.

The taps do something bad to frames of one kind (``MemoryNet.source_tap``, ``destination_tap``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationInDoubt
from trivmm.migration.destination.receiver import Receiver
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.source.sender import send
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource, MemoryNet, TappedStream

__all__ = ["LIMITS", "World", "breaker", "cutter", "late_once", "silent_from"]

# Shorter than the defaults, and all different: the name in an error then says which one it was.
LIMITS = Deadlines(stall=8.0, intake=150.0, handshake=3.0, commit=5.0, accept=20.0, connect=2.0)


@attrs.define(eq=False)
class World:
    """A source, a destination and the wire between them. ``sent`` and ``taken`` are the outcomes: a report, an
    exception, or None after a cancellation."""

    lock: DiskLock
    net: MemoryNet
    source: FakeSource
    destination: FakeDestination
    options: SendOptions = attrs.field(factory=lambda: SendOptions(timeout_s=30))
    sent: MigrationReport | BaseException | None = None
    taken: MigrationReport | BaseException | None = None
    seen: list[MigrationProgress] = attrs.field(factory=list)
    began: float = attrs.field(factory=trio.current_time)
    receiver: Receiver | None = None
    refuse: Callable[[], str | None] = lambda: None

    @classmethod
    def make(cls, limits: Deadlines = LIMITS, **more: Any) -> World:
        lock = DiskLock()
        world = cls(lock, MemoryNet(limits), FakeSource(lock, limits, **more), FakeDestination(lock, limits))
        for page in (0, 3, 4, 250):
            world.source.memory.write(page * 4096, bytes([page + 1]) * 4096)
        world.source.memory.write((1 << 32) + 4096, b"high")
        return world

    async def send(self) -> None:
        try:
            self.sent = await send(self.source, self.net, self.options, self.seen.append)
        except Exception as error:
            self.sent = error

    async def receive(self, nursery: trio.Nursery) -> None:
        self.receiver = receiver = Receiver(self.net, LIMITS, nursery)
        receiver.refuse = self.refuse
        try:
            _, self.taken = await receiver.receive(self.destination.factory)
        except Exception as error:
            self.taken = error
        finally:
            receiver.close()

    async def run(self) -> None:
        """Both sides to their ends, lingering included."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.receive, nursery)
            await self.send()
            if isinstance(self.sent, MigrationInDoubt):
                await trio.sleep(3 * LIMITS.commit)
                assert self.net.closed or self.destination.running, "it answers although nothing runs there"
                nursery.cancel_scope.cancel()  # the end of the machine that came
            if self.destination.running:  # and answers for its life where the box took DONE
                nursery.cancel_scope.deadline = trio.current_time() + 3 * LIMITS.commit
        self.check()

    def check(self) -> None:
        """What must hold after any end."""
        source, destination = self.source, self.destination
        if not isinstance(self.sent, MigrationReport):  # else it is closed next: nobody waits for the kernel first
            assert source.throttle == 0
            assert not source.logging
            if "undo" in source.events:
                assert source.events.index("log off") > source.events.index("undo"), "the guest first"
        assert self.net.closed, "the listener was left open"
        assert not (source.running and destination.running), "two copies run"
        if not isinstance(self.sent, MigrationInDoubt):
            assert source.running or destination.running, "no copy runs"
            assert self.lock.owner is (source if source.running else destination)
        if destination.running:
            assert source.contents() == destination.contents()
            assert destination.state is not None
        if isinstance(self.sent, MigrationReport):
            assert destination.running
            assert self.sent.outcome is Phase.DONE
        phases = [each.phase for each in self.seen]
        assert phases[-1] in (Phase.DONE, Phase.FAILED, Phase.CANCELLED, Phase.IN_DOUBT) or not phases

    def close(self) -> None:
        self.source.close()
        self.destination.close()


def late_once(world: World) -> None:
    """The last pages' ROUND_ACK of the first attempt comes only after the limit, and after UNDO."""
    asked = 0

    async def delay(stream: TappedStream, data: bytes) -> bytes:
        nonlocal asked
        if data[6] == MessageType.ROUND_ACK and not world.source.running:
            asked += 1
            if asked == 1:
                await trio.sleep(0.35)
                assert world.source.running  # first it runs again, then the peer hears of it
        return data

    world.net.destination_tap = delay


def breaker(kind: MessageType, how: str) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    """A tap that does something bad at the first frame of a kind."""
    struck = False

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        nonlocal struck
        if struck and how == "silence":
            await trio.sleep_forever()
        if struck or data[6] != kind:
            return data
        struck = True
        if how == "close":
            return b""
        if how == "half":
            return data[: len(data) // 2]
        if how == "silence":
            await trio.sleep_forever()
        if how == "garbage":
            await stream.inner.send_all(b"\xde\xad" * 40)
            return data
        if how == "damaged":
            await stream.inner.send_all(data[:-1] + bytes([data[-1] ^ 1]))
            return b""
        assert how == "repeat"
        await stream.inner.send_all(data)
        return data

    return tap


def cutter(kind: MessageType, place: int) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    async def tap(stream: TappedStream, data: bytes) -> bytes:
        return data[:place] if data[6] == kind else data

    return tap


def silent_from(kind: MessageType) -> Callable[[TappedStream, bytes], Awaitable[bytes]]:
    """The link that carries the first frame of a kind carries nothing any more, that frame included; later ones do."""
    silent: TappedStream | None = None

    async def tap(stream: TappedStream, data: bytes) -> bytes:
        nonlocal silent
        if silent is None and data[6] == kind:
            silent = stream
        if silent is stream:
            await trio.sleep_forever()
        return data

    return tap
