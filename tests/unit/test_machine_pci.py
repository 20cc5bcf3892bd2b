"""PCI configuration space, BAR placement and CF8/CFC."""

from __future__ import annotations

import base64
import threading
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.bus.space import AddressSpace, Effect, GuestRequest, Range
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, ProtocolError
from trivmm.memory import layout
from trivmm.platform.pci import PciBus, PciConfigSpace
from trivmm.testing.states import sent


def space() -> PciConfigSpace:
    return PciConfigSpace(
        vendor_id=0x1AF4, device_id=0x1044, class_code=0xFF0000, revision=1, subsystem_id=0x44, lock_s=2
    )


@attrs.define(eq=False)
class Function:
    name: str = "__rng"
    config: PciConfigSpace = attrs.field(factory=space)
    log: list[Any] = attrs.field(factory=list)

    def config_read(self, offset: int, size: int) -> bytes:
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        return None

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        return bytes([bar]) * size

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        self.log.append((bar, offset, data))
        return None

    def bars_changed(self) -> None:
        self.log.append({index: bar.mapped for index, bar in self.config.bars.items()})


class Guest:
    """Reads and writes configuration space as a driver does, through the ports."""

    def __init__(self, bus: PciBus) -> None:
        self.bus = bus

    def select(self, slot: int, register: int) -> None:
        self.bus.write(0, (1 << 31 | slot << 11 | register & 0xFC).to_bytes(4, "little"))

    def read(self, slot: int, register: int, size: int = 4) -> int:
        self.select(slot, register)
        return int.from_bytes(self.bus.read(4 + register % 4, size), "little")

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        self.select(slot, register)
        self.bus.write(4 + register % 4, value.to_bytes(size, "little"))


@pytest.fixture
def board() -> tuple[AddressSpace, PciBus, Guest, Function]:
    mmio = AddressSpace("mmio")
    bus = PciBus(mmio, Deadlines())
    function = Function()
    function.config.add_bar(0, 0x80000, is_64bit=True)
    function.config.add_bar(2, 0x1000, is_64bit=False)
    assert bus.add(function) == 1
    return mmio, bus, Guest(bus), function


def test_header() -> None:
    config = space()
    assert config.read(0, 4) == b"\xf4\x1a\x44\x10"
    assert config.read(8, 4) == b"\x01\x00\x00\xff"
    assert config.read(0x2C, 4) == b"\x00\x00\x44\x00"
    assert config.read(4, 2) == b"\x00\x00"
    assert config.memory_enabled  # assigned by the VMM, decodes until the guest says otherwise
    config.write(0, b"\0\0\0\0")
    assert config.read(0, 2) == b"\xf4\x1a"
    assert config.read(254, 4) == b"\xff" * 4


def test_capabilities_are_linked_and_masked() -> None:
    config = space()
    first = config.add_capability(0x11, bytes(10), b"\0\xff" + bytes(8))
    second = config.add_capability(9, b"\x10\x01" + bytes(12), bytes(14))
    assert (first, second) == (0x40, 0x4C)
    assert config.read(0x34, 1) == b"\x40"
    assert config.read(0x40, 2) == b"\x11\x4c"
    assert config.read(0x4C, 4) == b"\x09\x00\x10\x01"
    assert config.read(6, 1)[0] & 0x10
    config.write(0x40, b"\xff" * 4)
    assert config.read(0x40, 4) == b"\x11\x4c\x00\xff"
    with pytest.raises(ValueError, match="does not fit"):
        config.add_capability(9, bytes(200), bytes(200))


def test_odd_writes_are_ignored() -> None:
    config = space()
    for offset, data in (
        (5, b"\xff\xff\xff\xff"),
        (3, b"\xff\xff"),
        (255, b"\xff\xff"),
        (-1, b"\xff"),
        (4, b"\xff" * 3),
    ):
        assert not config.write(offset, data)
    assert config.read(4, 2) == b"\0\0"


@pytest.mark.parametrize(("index", "size", "wide"), [(5, 16, True), (6, 16, False), (0, 24, False), (0, 8, False)])
def test_impossible_bars(index: int, size: int, wide: bool) -> None:
    with pytest.raises(ValueError, match="BAR"):
        space().add_bar(index, size, is_64bit=wide)


def test_overlapping_bar_registers() -> None:
    config = space()
    config.add_bar(0, 16, is_64bit=True)
    with pytest.raises(ValueError, match="taken"):
        config.add_bar(1, 16, is_64bit=False)


def test_assignment_and_host_bridge(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    mmio, _, guest, function = board
    assert guest.read(0, 0) == 0x0D578086
    assert guest.read(0, 8) == 0x06000000
    assert guest.read(1, 0, 2) == 0x1AF4
    assert guest.read(2, 0) == 0xFFFFFFFF
    address = guest.read(1, 0x14) << 32 | guest.read(1, 0x10) & ~0xF
    assert address == layout.BAR64_END - 0x80000 == function.config.bars[0].mapped
    assert guest.read(1, 0x10) & 0xF == 4
    assert guest.read(1, 0x18) == layout.BAR32_START
    assert mmio.read(address + 8, 2) == b"\0\0"
    mmio.write(layout.BAR32_START + 4, b"\x05\0\0\0")
    assert function.log[-1] == (2, 4, b"\x05\0\0\0")


def test_other_buses_functions_and_disabled_latch(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    _, bus, _, _ = board
    for address in (0, 1 << 31 | 1 << 16, 1 << 31 | 1 << 8):
        bus.write(0, address.to_bytes(4, "little"))
        assert bus.read(4, 4) == b"\xff" * 4
        bus.write(4, bytes(4))


def test_latch_takes_bytes_and_words(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    _, bus, _, _ = board
    bus.write(0, b"\x00\x08")
    bus.write(3, b"\x80")
    assert bus.read(0, 4) == b"\x00\x08\x00\x80"
    assert bus.read(4, 2) == b"\xf4\x1a"
    assert bus.read(6, 4) == b"\xff" * 4
    bus.write(6, bytes(4))


def test_a_byte_in_the_middle_of_the_latch_resets_the_machine(
    board: tuple[AddressSpace, PciBus, Guest, Function],
) -> None:
    _, bus, _, _ = board
    bus.write(0, b"\x00\x08\x00\x80")
    assert bus.write(1, b"\x02") is None
    assert bus.write(1, b"\x06") == GuestRequest("reset", "port 0xcf9")
    assert bus.read(1, 1) == b"\0"
    assert bus.read(0, 4) == b"\x00\x08\x00\x80"


def test_sizing_maps_nothing(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    mmio, bus, guest, function = board
    before = [(each.start, each.size) for each in mmio.ranges]
    low, high = guest.read(1, 0x10), guest.read(1, 0x14)
    guest.write(1, 0x10, 0xFFFFFFFF)
    assert guest.read(1, 0x10) == 0xFFF80004
    assert function.config.bars[0].mapped is None
    guest.write(1, 0x10, low)
    guest.write(1, 0x14, 0xFFFFFFFF)
    assert guest.read(1, 0x14) == 0xFFFFFFFF
    guest.write(1, 0x14, high)
    assert [(each.start, each.size) for each in mmio.ranges] == before
    assert bus.counters() == {"bars_refused": 0}


def test_decoding_follows_memory_enable(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    mmio, _, guest, function = board
    guest.write(1, 4, 2, 2)
    guest.write(1, 4, 0, 2)
    assert mmio.ranges == ()
    assert function.log[-1] == {0: None, 2: None}
    guest.write(1, 4, 2, 2)
    assert len(mmio.ranges) == 2
    assert function.log[-1][2] == layout.BAR32_START


@pytest.mark.parametrize(("offset", "value", "size"), [(4, 4, 2), (4, 0, 2), (4, 4, 4), (4, 4, 1), (5, 4, 1)])
def test_bars_decode_until_the_guest_has_had_them_on(
    board: tuple[AddressSpace, PciBus, Guest, Function], offset: int, value: int, size: int
) -> None:
    """Drivers that trust firmware to have turned memory on add the bus-master bit only (Hermit's virtio drivers do):
    under Cloud Hypervisor, whose command register reads 0 too, their BARs go on decoding."""
    mmio, _, guest, function = board
    guest.write(1, offset, value, size)
    assert len(mmio.ranges) == 2
    saved = function.config.save()
    guest.write(1, 4, 6, 2)
    guest.write(1, 4, 4, 2)
    assert mmio.ranges == ()
    assert not function.config.memory_enabled
    function.config.load(saved)
    assert function.config.memory_enabled


def test_a_bar_moves_and_bad_places_are_refused(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    mmio, bus, guest, function = board
    guest.write(1, 4, 0, 2)
    guest.write(1, 0x18, layout.BAR32_START + 0x10000)
    guest.write(1, 4, 2, 2)
    assert function.config.bars[2].mapped == layout.BAR32_START + 0x10000
    guest.write(1, 0x18, 0x1000)  # in RAM
    assert function.config.bars[2].mapped is None
    assert bus.counters() == {"bars_refused": 1}
    guest.write(1, 0x18, layout.IOAPIC_START)
    assert bus.counters() == {"bars_refused": 2}
    guest.write(1, 0x18, layout.BAR32_START)
    assert function.config.bars[2].mapped == layout.BAR32_START
    blocker = Range(layout.BAR32_START + 0x2000, 0x1000, bus, "blocker")
    assert mmio.insert(blocker)
    guest.write(1, 0x18, layout.BAR32_START + 0x2000)
    assert function.config.bars[2].mapped is None


def test_two_bars_swap_places() -> None:
    mmio = AddressSpace("mmio")
    bus, functions = PciBus(mmio, Deadlines()), [Function("_a"), Function("_b")]
    for function in functions:
        function.config.add_bar(0, 0x1000, is_64bit=False)
        bus.add(function)
    guest = Guest(bus)
    first, second = guest.read(1, 0x10), guest.read(2, 0x10)
    guest.write(1, 0x10, second)  # refused: the other one is there
    assert functions[0].config.bars[0].mapped is None
    guest.write(2, 0x10, first)
    assert [each.config.bars[0].mapped for each in functions] == [second, first]
    told = [each.log[-2:] for each in functions]
    assert told == [[{0: None}, {0: second}], [{0: None}, {0: first}]], "each left its place before one came"


def test_slots() -> None:
    bus = PciBus(AddressSpace("mmio"), Deadlines())
    assert bus.add(Function(), 5) == 5
    with pytest.raises(ConfigError, match="taken"):
        bus.add(Function(), 5)
    with pytest.raises(ConfigError, match="slot"):
        bus.add(Function(), 32)
    assert [bus.add(Function()) for _ in range(30)] == [*range(1, 5), *range(6, 32)]
    with pytest.raises(ConfigError, match="slot"):
        bus.add(Function())


def test_bar_space_runs_out() -> None:
    bus = PciBus(AddressSpace("mmio"), Deadlines())
    for wide in (True, False):
        config = space()
        config.add_bar(0, 1 << 37 if wide else 1 << 30, is_64bit=wide)
        with pytest.raises(ConfigError, match="BAR space"):
            bus.add(Function(config=config))


def test_save_and_load(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    _, bus, guest, function = board
    guest.write(1, 0x18, layout.BAR32_START + 0x10000)
    guest.write(1, 4, 6, 2)
    guest.write(1, 0x3C, 0x0B, 1)
    guest.write(1, 0x10, 0xFFFFFFFF)
    saved, saved_bus = function.config.save(), bus.save()

    other = Function()
    other.config.add_bar(0, 0x80000, is_64bit=True)
    other.config.add_bar(2, 0x1000, is_64bit=False)
    twin = PciBus(AddressSpace("mmio"), Deadlines())
    twin.add(other)
    other.config.check(saved, "pci")
    other.config.load(sent(saved))
    twin.check(saved_bus, "bus")
    twin.load(sent(saved_bus))
    assert other.config.save() == saved
    assert twin.save() == saved_bus
    assert other.config.bars[2].mapped == layout.BAR32_START + 0x10000
    assert other.config.bars[0].mapped is None
    assert twin.read(4, 4) == bus.read(4, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": "zz"}, "registers"),
        ({"registers": base64.b64encode(bytes(256)).decode()}, r"registers\[0x0\] is .0x0., not 0xf4"),
        ({"registers": 5}, "registers"),
        ({"sizing": [3]}, "sizing"),
        ({"sizing": ["x"]}, "sizing"),
        ({"sizing": [True]}, "sizing"),
        ({"sizing": [16, 16]}, "sizing"),
        ({"sizing": [16] * 7}, "sizing"),
        ({"was_enabled": 1}, "was_enabled"),
        ({"was_enabled": False}, "was_enabled is false, not true where memory is enabled"),
        ({"more": 1}, "more"),
    ],
)
def test_hostile_state(change: dict[str, Any], says: str) -> None:
    config = space()
    config.write(4, b"\x02\0")
    before = config.save()
    config.check(sent(before), "part")
    with pytest.raises(ProtocolError, match=f"^part.*{says}"):
        config.check(sent(before, **change), "part")
    assert config.save() == before


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(min_size=1, max_size=8)), max_size=60))
def test_any_port_access_is_survived(accesses: list[tuple[int, bytes]]) -> None:
    mmio = AddressSpace("mmio")
    bus, function = PciBus(mmio, Deadlines()), Function()
    function.config.add_bar(0, 0x80000, is_64bit=True)
    bus.add(function)
    bus.write(0, (1 << 31 | 1 << 11).to_bytes(4, "little"))
    for port, data in accesses:
        bus.write(port, data)
        assert len(bus.read(port, len(data))) == len(data)
        for each in mmio.ranges:
            assert each.start >= layout.BAR32_START


def test_threads_share_the_bus(board: tuple[AddressSpace, PciBus, Guest, Function]) -> None:
    mmio, bus, _, function = board
    start = threading.Barrier(4, timeout=20)

    def hammer(seed: int) -> None:
        start.wait()
        for turn in range(300):
            bus.write(0, (1 << 31 | 1 << 11 | (4, 0x18)[turn % 2]).to_bytes(4, "little"))
            bus.write(4, ((seed + turn) & 2 | (layout.BAR32_START if turn % 2 else 0)).to_bytes(4, "little"))
            bus.read(4, 4)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    bus.placement.place()
    for index, bar in function.config.bars.items():
        mapped = [each.start for each in mmio.ranges if each.name.endswith(f"BAR {index}")]
        assert mapped == ([] if bar.mapped is None else [bar.mapped])
