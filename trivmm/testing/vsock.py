"""A guest of a vsock device without a guest: it lays packets into guest RAM and looks at those that come.

For tests of the device's rules, so it sends whatever it is told to. ``packets`` are as virtio 1.2 section 5.10.6 has
them; credit is the caller's business.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from trivmm.memory.guest import GuestMemory
from trivmm.state.virtio import QueueState
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.setup import VERSION_1, DriverSetup
from trivmm.virtio.vsock.device import VsockDevice

__all__ = [
    "CREDIT_REQUEST",
    "CREDIT_UPDATE",
    "REQUEST",
    "RESPONSE",
    "RST",
    "RW",
    "SHUTDOWN",
    "Packet",
    "VsockGuest",
    "serving",
]

REQUEST: Final = 1
RESPONSE: Final = 2
RST: Final = 3
SHUTDOWN: Final = 4
RW: Final = 5
CREDIT_UPDATE: Final = 6
CREDIT_REQUEST: Final = 7
HEADER: Final = struct.Struct("<QQIIIHHIII")
CID: Final = 3
HOST: Final = 2
BUFFER: Final = 4096  # of one packet that comes, header and all, as Linux's drivers offer them
BUFFERS: Final = 32
LIMIT_S: Final = 20.0
INCOMING: Final = 0x400000
OUTGOING: Final = 0x800000


@attrs.frozen
class Packet:
    """``guest`` and ``host`` are ports."""

    op: int
    guest: int
    host: int
    data: bytes = b""
    flags: int = 0
    buf_alloc: int = 1 << 18
    fwd_cnt: int = 0
    type: int = 1
    src_cid: int = CID
    dst_cid: int = HOST
    length: int | None = None  # where it lies

    def to_host(self) -> bytes:
        length = len(self.data) if self.length is None else self.length
        return HEADER.pack(
            *(self.src_cid, self.dst_cid, self.guest, self.host, length),
            *(self.type, self.op, self.flags, self.buf_alloc, self.fwd_cnt),
        ) + self.data  # fmt: skip

    @classmethod
    def to_guest(cls, raw: bytes) -> Packet:
        src_cid, dst_cid, host, guest, length, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack_from(raw)
        data = raw[HEADER.size :]
        assert length == len(data)
        return cls(op, guest, host, data, flags, buf_alloc, fwd_cnt, kind, src_cid, dst_cid)


class VsockGuest:
    """Three queues in 16 MiB of RAM. ``buffers`` are offered for packets at first, and each again once it was read."""

    def __init__(self, *, buffers: int = BUFFERS, buffer: int = BUFFER, event_idx: bool = False) -> None:
        self.memory = GuestMemory([(0, 16 << 20)])
        size = 32
        self.receive = MockDriver(self.memory, size, base=0x10000, event_idx=event_idx)
        self.transmit = MockDriver(self.memory, size, base=0x30000, event_idx=event_idx)
        self.events = MockDriver(self.memory, size, base=0x50000, event_idx=event_idx)
        self.buffer = buffer
        self._sending = 0
        self.listen(buffers)

    def setup(self, features: int = VERSION_1, queues: tuple[object, ...] = ()) -> DriverSetup:
        """``queues`` where another worker left them."""
        mine = tuple(each.queue() for each in (self.receive, self.transmit, self.events))
        return DriverSetup(features, queues or mine)  # type: ignore[arg-type]

    @property
    def handles(self) -> list[QueueHandle]:
        return [each.handle for each in (self.receive, self.transmit, self.events)]

    # --- what comes ------------------------------------------------------------------------------------------

    def listen(self, buffers: int) -> None:
        """Offer so many buffers more, which are not offered yet."""
        for number in range(buffers):
            self._offer(number)
        self.receive.ring()

    def _offer(self, number: int) -> None:
        at = INCOMING + 0x10000 * number
        self.receive.offer(self.receive.chain(Descriptor(at, self.buffer, WRITE), first=number))

    async def packet(self, *, again: bool = True) -> Packet:
        """The next one. ``again``: its buffer is offered again. The caller bounds it."""
        head, length = await self.receive.next_used()
        found = Packet.to_guest(self.memory.read(INCOMING + 0x10000 * head, length))
        if again:
            self._offer(head)
            self.receive.ring()
        return found

    def no_packet(self) -> bool:
        """That nothing has come since the last one."""
        return self.receive.seen == self.receive.used_index

    async def event(self) -> int:
        """Offer a buffer for an event and wait for one: its id."""
        self.events.offer(self.events.chain(Descriptor(0x70000, 4, WRITE)))
        self.events.ring()
        _, length = await self.events.next_used()
        assert length == 4
        return int(struct.unpack("<I", self.memory.read(0x70000, 4))[0])

    # --- what goes -------------------------------------------------------------------------------------------

    def post(self, packet: Packet) -> None:
        """Without waiting until it is taken; at most 16 at a time."""
        self.post_raw(packet.to_host())

    def post_raw(self, raw: bytes) -> None:
        slot = self._sending % 16
        self._sending += 1
        at = OUTGOING + 0x40000 * slot
        self.memory.write(at, raw)
        # Its header by itself, as older drivers have it, every other time.
        parts = [Descriptor(at, 44), Descriptor(at + 44, len(raw) - 44)] if slot % 2 and len(raw) > 44 else []
        self.transmit.offer(self.transmit.chain(*(parts or [Descriptor(at, len(raw))]), first=2 * slot))
        self.transmit.ring()

    async def send(self, packet: Packet) -> None:
        """And wait until the device has taken it."""
        self.post(packet)
        await self.transmit.next_used()

    async def send_raw(self, raw: bytes) -> None:
        self.post_raw(raw)
        await self.transmit.next_used()

    def close(self) -> None:
        for each in (self.receive, self.transmit, self.events):
            each.close()
        self.memory.close()


@asynccontextmanager
async def serving(
    device: VsockDevice, guest: VsockGuest, features: int = VERSION_1, queues: tuple[QueueState, ...] = ()
) -> AsyncIterator[None]:
    """``device`` works for ``guest`` within the block, at most :data:`LIMIT_S` seconds. Not closed."""
    with trio.fail_after(LIMIT_S):
        async with activated(device, guest.setup(features, queues), guest.handles):
            yield
