"""The bus as one vCPU sees it: string instructions, widths, effects, and what it is serving."""

from __future__ import annotations

import attrs
import pytest

from trivmm.bus.bus import Access, Bus
from trivmm.bus.space import AddressSpace, Effect, GuestRequest, Range
from trivmm.bus.ticket import Ticket


@attrs.define(eq=False)
class Register:
    """Reads count up; ``effects`` are what the next writes ask for."""

    bus: Bus
    written: list[tuple[int, bytes]] = attrs.field(factory=list)
    effects: list[Effect] = attrs.field(factory=list)
    seen: list[Access | None] = attrs.field(factory=list)
    reads: int = 0
    width: int | None = None

    def read(self, offset: int, size: int) -> bytes:
        self.seen.append(self.bus.serving())
        self.reads += 1
        return self.reads.to_bytes(1, "little") * (size if self.width is None else self.width)

    def write(self, offset: int, data: bytes) -> Effect:
        self.seen.append(self.bus.serving())
        self.written.append((offset, data))
        return self.effects.pop(0) if self.effects else None


@pytest.fixture
def register() -> Register:
    bus = Bus(AddressSpace("pio"), AddressSpace("mmio"), lambda: 17.0)
    register = Register(bus)
    assert bus.pio.insert(Range(0x100, 8, register, "ports"))
    assert bus.mmio.insert(Range(0xD000_0000, 8, register, "registers"))
    return register


def test_a_string_instruction_is_one_access_for_each_element(register: Register) -> None:
    bus = register.bus
    assert bus.read_port(0x102, 2, 3) == b"\1\1\2\2\3\3"
    assert bus.write_port(0x104, 2, b"abcdef") is None
    assert register.written == [(4, b"ab"), (4, b"cd"), (4, b"ef")]
    assert bus.read_port(0x102, 4) == b"\4" * 4


def test_every_element_is_written_and_the_last_effect_counts(register: Register) -> None:
    reset, ticket = GuestRequest("reset", "because"), Ticket("_disk0", 1, "activation")
    register.effects = [reset, ticket, None]
    assert register.bus.write_port(0x100, 1, b"abc") is ticket
    assert len(register.written) == 3
    register.effects = [reset, ticket]
    assert register.bus.write_mmio(0xD000_0000, b"abcd") is reset
    assert register.bus.write_port(0x100, 4, b"abcd") is ticket


def test_nobodys_addresses_read_all_ones_and_take_any_write(register: Register) -> None:
    bus = register.bus
    assert bus.read_port(0x200, 2, 2) == b"\xff" * 4
    assert bus.read_mmio(0xD000_0006, 4) == b"\xff" * 4  # it reaches out of the range
    assert bus.write_port(0x200, 1, b"x") is None
    assert bus.write_mmio(0, b"x") is None
    assert bus.pio.counters() == {"pio_unhandled_reads": 2, "pio_unhandled_writes": 1}
    assert bus.mmio.counters() == {"mmio_unhandled_reads": 1, "mmio_unhandled_writes": 1}


@pytest.mark.parametrize(("width", "found"), [(0, b"\xff\xff\xff"), (2, b"\1\1\xff"), (9, b"\1\1\1")])
def test_a_cpu_is_given_as_many_bytes_as_it_waits_for(register: Register, width: int, found: bytes) -> None:
    """A device that gives another number would otherwise end the VM."""
    register.width = width
    assert register.bus.read_mmio(0xD000_0000, 3) == found
    register.reads = 0
    assert register.bus.read_port(0x100, 3) == found


def test_it_tells_what_it_serves_while_it_serves_it(register: Register) -> None:
    bus = register.bus
    bus.read_mmio(0xD000_0004, 2)
    bus.write_port(0x101, 1, b"x")
    assert register.seen == [
        Access("read", "mmio", 0xD000_0004, 2, "registers", 17.0),
        Access("write", "pio", 0x101, 1, "ports", 17.0),
    ]
    assert [str(access) for access in register.seen] == [
        "a read of 2 bytes at 0xd0000004 (registers)",
        "a write of 1 byte at port 0x101 (ports)",
    ]
    assert str(Access("read", "mmio", 0x1000, 8, "", 0.0)) == "a read of 8 bytes at 0x1000"
    assert bus.serving() is None
