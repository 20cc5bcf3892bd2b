"""The rules of a split virtqueue, device side, written down as plainly as can be (virtio 1.2 section 2.7).

An oracle for ``ffi/ring.c``: on the same memory both must take the same chains, publish the same used entries, decide
alike whom to notify, and give up for the same reason (``tests/unit/test_ring_model.py``). Nothing here is fast, and
nothing is shared with the C but the numbers of :class:`Verdict`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from trivmm._native import lib

__all__ = ["Broken", "Chain", "PlainRam", "RingModel", "Segment", "Verdict", "cannot_be"]

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
AVAIL_NO_INTERRUPT: Final = 1
USED_NO_NOTIFY: Final = 1
LARGEST_QUEUE: Final = 1024  # what our devices offer at most; also the segments that a chain may have
LARGEST_CHAIN: Final = 1 << 30  # bytes


class Verdict(enum.Enum):
    """Why a queue is given up."""

    AVAIL_JUMP = int(lib.TV_BROKEN_AVAIL_JUMP)
    HEAD = int(lib.TV_BROKEN_HEAD)
    NEXT = int(lib.TV_BROKEN_NEXT)
    LOOP = int(lib.TV_BROKEN_LOOP)
    ADDRESS = int(lib.TV_BROKEN_ADDRESS)
    INDIRECT = int(lib.TV_BROKEN_INDIRECT)
    ORDER = int(lib.TV_BROKEN_ORDER)
    TOO_LONG = int(lib.TV_BROKEN_TOO_LONG)


class Broken(Exception):
    """The driver has made a mistake that nothing can be made of."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict)
        self.verdict = verdict


class PlainRam:
    """Guest RAM as regions of bytes. ``written``: pages that the device wrote to."""

    def __init__(self, regions: Mapping[int, bytes]) -> None:
        """``regions``: what is in each, by its guest physical address."""
        self.regions = {gpa: bytearray(data) for gpa, data in regions.items()}
        self.written: set[int] = set()

    def _find(self, gpa: int, length: int) -> tuple[bytearray, int] | None:
        for start, data in self.regions.items():
            if start <= gpa and gpa + length <= start + len(data):
                return data, gpa - start
        return None

    def holds(self, gpa: int, length: int) -> bool:
        """All of it, in one region."""
        return self._find(gpa, length) is not None

    def read(self, gpa: int, length: int) -> bytes:
        found = self._find(gpa, length)
        assert found is not None
        data, at = found
        return bytes(data[at : at + length])

    def number(self, gpa: int, length: int) -> int:
        return int.from_bytes(self.read(gpa, length), "little")

    def guest_writes(self, gpa: int, new: bytes) -> None:
        found = self._find(gpa, len(new))
        assert found is not None
        data, at = found
        data[at : at + len(new)] = new

    def device_writes(self, gpa: int, number: int, length: int) -> None:
        self.guest_writes(gpa, number.to_bytes(length, "little"))
        self.mark(gpa, length)

    def mark(self, gpa: int, length: int) -> None:
        self.written |= {(gpa + at) // 4096 for at in range(length)}


@attrs.frozen
class Segment:
    gpa: int
    length: int


@attrs.frozen
class Chain:
    """Segments that the device may read, then those that it may write."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


@attrs.frozen
class _Descriptor:
    gpa: int
    length: int
    flags: int
    next: int


def cannot_be(ram: PlainRam, size: int, desc: int, avail: int, used: int) -> bool:
    """Whether a queue of these registers can't be worked on at all."""
    sizes = [1 << bits for bits in range(11)]
    if size not in sizes or desc % 16 or avail % 2 or used % 4:
        return True
    return not (ram.holds(desc, 16 * size) and ram.holds(avail, 6 + 2 * size) and ram.holds(used, 6 + 8 * size))


@attrs.define(eq=False)
class RingModel:
    """One queue. ``taken`` chains have been popped and neither published nor given back; ``pushed`` of them are in the
    used ring, where the driver does not look yet."""

    ram: PlainRam
    size: int
    desc: int
    avail: int
    used: int
    event_idx: bool
    indirect: bool
    next_avail: int
    next_used: int
    taken: int = 0
    pushed: int = 0
    broken: Verdict | None = None
    _has_published: bool = False
    _silent: bool | None = None  # what the driver was asked for: None when nobody knows

    # --- the driver's half of memory -------------------------------------------------------------------------

    @property
    def _avail_index(self) -> int:
        return self.ram.number(self.avail + 2, 2)

    @property
    def _used_event(self) -> int:
        return self.ram.number(self.avail + 4 + 2 * self.size, 2)

    def _descriptor(self, table: int, index: int) -> _Descriptor:
        at = table + 16 * index
        return _Descriptor(
            self.ram.number(at, 8), self.ram.number(at + 8, 4), self.ram.number(at + 12, 2), self.ram.number(at + 14, 2)
        )

    # --- chains ----------------------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """The next chain that the driver offers; None when there is none. :raises Broken: now and for ever."""
        if self.broken is not None:
            raise Broken(self.broken)
        try:
            return self._pop()
        except Broken as error:
            self.broken = error.verdict
            raise

    def _pop(self) -> Chain | None:
        offered = (self._avail_index - self.next_avail) % 0x10000
        if offered == 0:
            return None
        if offered + self.taken > self.size:  # it offers what it has not got back
            raise Broken(Verdict.AVAIL_JUMP)
        head = self.ram.number(self.avail + 4 + 2 * (self.next_avail % self.size), 2)
        if head >= self.size:
            raise Broken(Verdict.HEAD)
        chain = self._chain(head)
        self.next_avail = (self.next_avail + 1) % 0x10000
        self.taken += 1
        return chain

    def _chain(self, head: int) -> Chain:
        readable: list[Segment] = []
        writable: list[Segment] = []
        for each in self._linked(head):
            if not each.flags & WRITE and writable:
                raise Broken(Verdict.ORDER)
            if each.length == 0:
                continue  # no buffer at all
            if not self.ram.holds(each.gpa, each.length):
                raise Broken(Verdict.ADDRESS)
            if len(readable) + len(writable) == LARGEST_QUEUE:
                raise Broken(Verdict.LOOP)
            (writable if each.flags & WRITE else readable).append(Segment(each.gpa, each.length))
            if sum(segment.length for segment in readable + writable) > LARGEST_CHAIN:
                raise Broken(Verdict.TOO_LONG)
        return Chain(head, tuple(readable), tuple(writable))

    def _linked(self, head: int) -> Iterator[_Descriptor]:
        """The chain's descriptors in order; those of an indirect table stand for the one that names it, which is the
        last one of the queue's own table (section 2.7.5.3). No chain has more of either kind than there are."""
        table, entries, index, left, nested = self.desc, self.size, head, self.size, False
        while left:
            left -= 1
            each = self._descriptor(table, index)
            if each.flags & INDIRECT:
                if nested or not self.indirect or each.flags & NEXT:
                    raise Broken(Verdict.INDIRECT)
                if each.length == 0 or each.length % 16 or each.length > 16 * self.size:
                    raise Broken(Verdict.INDIRECT)
                if not self.ram.holds(each.gpa, each.length):
                    raise Broken(Verdict.INDIRECT)
                table, entries, index, left, nested = each.gpa, each.length // 16, 0, each.length // 16, True
                continue
            yield each
            if not each.flags & NEXT:
                return
            if each.next >= entries:
                raise Broken(Verdict.NEXT)
            index = each.next
        raise Broken(Verdict.LOOP)

    def rewind(self, chains: int) -> None:
        """Give back the chains that were popped last, but none that was pushed."""
        chains = min(chains, self.taken - self.pushed)
        self.next_avail = (self.next_avail - chains) % 0x10000
        self.taken -= chains

    # --- used entries ----------------------------------------------------------------------------------------

    def push(self, head: int, length: int) -> None:
        """Its page is marked when it is published: the driver does not look before."""
        slot = (self.next_used + self.pushed) % 0x10000 % self.size
        self.ram.guest_writes(self.used + 4 + 8 * slot, head.to_bytes(4, "little") + length.to_bytes(4, "little"))
        self.pushed += 1

    def publish(self) -> bool:
        """Hand over what was pushed; gives whether the driver is interrupted."""
        if self.pushed == 0:
            return False
        new = [(self.next_used + each) % 0x10000 for each in range(self.pushed)]  # the used indices of these entries
        for index in new:
            self.ram.mark(self.used + 4 + 8 * (index % self.size), 8)
        self.next_used = (self.next_used + self.pushed) % 0x10000
        self.taken -= self.pushed
        self.pushed = 0
        self.ram.device_writes(self.used + 2, self.next_used, 2)
        first, self._has_published = not self._has_published, True
        if not self.event_idx:
            return not self.ram.number(self.avail, 2) & AVAIL_NO_INTERRUPT  # section 2.7.7
        return first or self._used_event in new  # section 2.7.10: the entry that it waits for is among them

    # --- notifications ---------------------------------------------------------------------------------------

    def disarm(self) -> None:
        if not self.event_idx:
            self._ask(silent=True)

    def rearm(self) -> bool:
        """Ask to be notified of the next chain; gives whether there is one already."""
        if self.event_idx:
            self.ram.device_writes(self.used + 4 + 8 * self.size, self.next_avail, 2)
        else:
            self._ask(silent=False)
        return self._avail_index != self.next_avail

    def _ask(self, *, silent: bool) -> None:
        if self._silent is not silent:
            self._silent = silent
            self.ram.device_writes(self.used, USED_NO_NOTIFY if silent else 0, 2)
