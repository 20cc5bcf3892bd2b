"""Configuration space as memory: the same functions by the same rules as by CF8 and CFC; and what a guest may write."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.bus.space import AddressSpace, Effect, Range
from trivmm.bus.ticket import Ticket
from trivmm.deadlines import Deadlines
from trivmm.memory import layout
from trivmm.platform.pci import Ecam, PciBus, PciConfigSpace

ECAM = layout.PCI_MMCONFIG_START
BAR0, COMMAND = 0x10, 0x04
SIZES = (1, 2, 4, 8)


@attrs.define(eq=False)
class Function:
    name: str = "_a"
    effect: Effect = None
    config: PciConfigSpace = attrs.field(
        factory=lambda: PciConfigSpace(vendor_id=0x1AF4, device_id=0x1042, class_code=0x018000, lock_s=2)
    )

    def config_read(self, offset: int, size: int) -> bytes:
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        return self.effect

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        return self.name.encode()[1:2] * size

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        return None

    def bars_changed(self) -> None:
        return None


@attrs.define(eq=False)
class Machine:
    mmio: AddressSpace = attrs.field(factory=lambda: AddressSpace("mmio"))
    bus: PciBus = attrs.field(default=attrs.Factory(lambda self: PciBus(self.mmio, Deadlines()), takes_self=True))
    functions: list[Function] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        assert self.mmio.insert(Range(ECAM, layout.PCI_MMCONFIG_SIZE, Ecam(self.bus), "pci"))

    def plug(self, name: str, size: int = 0x1000, *, is_64bit: bool = False) -> Function:
        function = Function(name)
        function.config.add_bar(0, size, is_64bit=is_64bit)
        self.bus.add(function)
        self.functions.append(function)
        return function

    def by_ports(self, slot: int, register: int, size: int) -> bytes:
        self.bus.write(0, (1 << 31 | slot << 11 | register & 0xFC).to_bytes(4, "little"))
        return self.bus.read(4 + register % 4, size)

    def at(self, slot: int, register: int) -> int:
        return ECAM + slot * 0x8000 + register

    def write(self, slot: int, register: int, value: int, size: int = 4) -> Effect:
        return self.mmio.write(self.at(slot, register), value.to_bytes(size, "little"))

    def read(self, slot: int, register: int, size: int = 4) -> int:
        return int.from_bytes(self.mmio.read(self.at(slot, register), size), "little")


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    made.plug("_a")
    return made


def test_both_ways_lead_to_the_same_registers(machine: Machine) -> None:
    for slot in (0, 1, 2, 31):
        for register in range(256):
            for size in (1, 2, 4):
                found = machine.mmio.read(machine.at(slot, register), size)
                assert found == machine.by_ports(slot, register, size)
    machine.write(1, COMMAND, 6, 2)
    assert machine.by_ports(1, COMMAND, 2) == b"\6\0"


def test_what_is_not_there_reads_all_ones_and_ignores_writes(machine: Machine) -> None:
    for offset in (0x8000 * 2, 0x8000 * 31, 0x8000 + 0x1000, 0x8000 + 0x7000, 0x8000 + 0x100, 0x8000 + 0xFFC):
        machine.mmio.write(ECAM + offset, bytes(4))
        assert machine.mmio.read(ECAM + offset, 4) == b"\xff" * 4
    assert machine.mmio.unhandled_reads == 0


def test_odd_widths_and_offsets(machine: Machine) -> None:
    for offset, size in ((0, 8), (1, 4), (3, 2), (0xFE, 4), (2, 3)):
        machine.mmio.write(machine.at(1, offset), bytes(size))
        assert machine.mmio.read(machine.at(1, offset), size) == (
            b"\xff" * size if offset % 4 + size > 4 else machine.by_ports(1, offset, size)
        )
    assert machine.read(1, 0, 2) == 0x1AF4


def test_a_write_asks_of_its_vcpu_what_the_function_says(machine: Machine) -> None:
    ticket = machine.functions[0].effect = Ticket("_a", 1, "activation")
    assert machine.write(1, COMMAND, 6, 2) is ticket


def test_reserved_bits_of_the_command_register_read_zero(machine: Machine) -> None:
    for slot in (0, 1):
        machine.write(slot, COMMAND, 0xFFFF, 2)
        assert machine.read(slot, COMMAND, 2) == 0x0547
        machine.write(slot, COMMAND + 1, 0xF8, 1)
        assert machine.read(slot, COMMAND, 2) == 0x0047


def test_there_is_no_rom(machine: Machine) -> None:
    machine.write(1, 0x30, 0xFFFF_FFFE)
    assert machine.read(1, 0x30) == 0
    machine.write(1, 0x30, 1)
    assert machine.read(1, 0x30) == 0


@pytest.mark.parametrize(
    "where",
    [
        0x1000,  # RAM
        0xE_0000,
        ECAM,
        ECAM + 0x8000,
        layout.GED_START,
        layout.PCI_HOTPLUG_START,
        layout.IOAPIC_START,
        layout.LAPIC_START,
        0xFFFF_F000,
    ],
)
def test_a_bar_on_what_is_no_bars_place_decodes_nowhere(machine: Machine, where: int) -> None:
    function = machine.functions[0]
    before = machine.mmio.find(where, 1)
    machine.write(1, COMMAND, 2, 2)
    machine.write(1, BAR0, where)
    assert function.config.bars[0].mapped is None
    assert machine.mmio.find(where, 1) is before
    assert machine.bus.counters() == {"bars_refused": 1}
    assert machine.read(1, 0, 2) == 0x1AF4, "configuration space goes on"
    machine.write(1, BAR0, layout.BAR32_START + 0x5000)
    assert function.config.bars[0].mapped == layout.BAR32_START + 0x5000


def test_a_bar_that_is_moved_while_decoding_is_off_comes_with_the_bit() -> None:
    machine = Machine()
    function = machine.plug("_a", is_64bit=True)
    machine.write(1, COMMAND, 2, 2)
    machine.write(1, COMMAND, 0, 2)
    moved = layout.BAR64_START + 0x1234_5000
    machine.write(1, BAR0, moved & 0xFFFF_FFFF)
    machine.write(1, BAR0 + 4, moved >> 32)
    assert function.config.bars[0].mapped is None
    machine.write(1, COMMAND, 2, 2)
    assert function.config.bars[0].mapped == moved
    assert machine.mmio.read(moved, 1) == b"a"


def test_halves_of_a_64_bit_bar_that_are_moved_while_it_decodes() -> None:
    """Between the two writes it is where the mixture says, or nowhere."""
    machine = Machine()
    function = machine.plug("_a", is_64bit=True)
    here = function.config.bars[0].mapped
    assert here is not None
    machine.write(1, COMMAND, 2, 2)
    moved = layout.BAR64_START + 0x7_1234_5000
    machine.write(1, BAR0 + 4, moved >> 32)
    assert function.config.bars[0].mapped == (moved >> 32 << 32 | here & 0xFFFF_FFFF)
    machine.write(1, BAR0, moved & 0xFFFF_FFFF)
    assert function.config.bars[0].mapped == moved
    machine.write(1, BAR0 + 4, 0)  # now below 4 GiB, over RAM perhaps
    assert function.config.bars[0].mapped is None


def test_a_bar_on_another_one_is_refused_until_that_one_leaves() -> None:
    machine = Machine()
    first, second = machine.plug("_a"), machine.plug("_b")
    home, target = second.config.bars[0].mapped, first.config.bars[0].mapped
    assert home is not None
    assert target is not None
    machine.write(2, BAR0, target + 0x1000 - 0x1000)
    assert second.config.bars[0].mapped is None
    assert machine.mmio.read(target, 1) == b"a"
    machine.write(1, BAR0, home)
    assert machine.mmio.read(target, 1) == b"b"
    assert machine.mmio.read(home, 1) == b"a"


def test_a_new_function_gets_no_place_that_a_guest_has_moved_a_bar_to() -> None:
    machine = Machine()
    first = machine.plug("_a")
    machine.write(1, BAR0, layout.BAR32_START + 0x1000)
    assert first.config.bars[0].mapped == layout.BAR32_START + 0x1000
    assert machine.plug("_b").config.bars[0].mapped == layout.BAR32_START
    assert machine.plug("_c").config.bars[0].mapped == layout.BAR32_START + 0x2000


def test_an_unplugged_function_leaves_its_place_to_the_next() -> None:
    machine = Machine()
    for name in ("_a", "_b", "_c"):
        machine.plug(name)
    machine.bus.remove(2)
    assert machine.read(2, 0) == 0xFFFF_FFFF
    assert machine.mmio.find(layout.BAR32_START + 0x1000, 1) is None
    again = machine.plug("_d")
    assert machine.read(2, 0, 2) == 0x1AF4
    assert again.config.bars[0].mapped == layout.BAR32_START + 0x1000
    machine.bus.remove(2)
    machine.bus.remove(2)  # which is nobody's now


def test_one_that_was_refused_for_its_sake_comes_when_a_function_goes() -> None:
    machine = Machine()
    machine.plug("_a")
    second = machine.plug("_b")
    machine.write(2, BAR0, layout.BAR32_START)
    assert second.config.bars[0].mapped is None
    machine.bus.remove(1)
    assert second.config.bars[0].mapped == layout.BAR32_START


@given(
    st.lists(
        st.tuples(
            st.integers(0, layout.PCI_MMCONFIG_SIZE - 8), st.sampled_from(SIZES), st.binary(min_size=8, max_size=8)
        ),
        max_size=60,
    )
)
def test_any_access_is_survived(accesses: list[tuple[int, int, bytes]]) -> None:
    machine = Machine()
    for name in ("_a", "_b"):
        machine.plug(name, is_64bit=name == "_b")
    for offset, size, data in accesses:
        near = offset % 0x18000  # mostly at what is there
        machine.mmio.write(ECAM + near, data[:size])
        assert len(machine.mmio.read(ECAM + near, size)) == size
    for slot in (1, 2):
        assert machine.read(slot, 0, 2) == 0x1AF4
        assert not machine.read(slot, COMMAND, 2) & ~0x0547
        assert machine.read(slot, 0x30) == 0
    for each in machine.mmio.ranges:
        assert each.start == ECAM or not (each.end > ECAM and each.start < ECAM + layout.PCI_MMCONFIG_SIZE)
        assert each.start >= layout.BAR32_START
