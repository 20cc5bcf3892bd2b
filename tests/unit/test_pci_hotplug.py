"""The hotplug controller's registers, driven by a guest that means well and by one that doesn't."""

from __future__ import annotations

import threading

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.bus.space import AddressSpace
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, ProtocolError
from trivmm.platform.pci import PciBus, PciHotplug, pick_slots
from trivmm.state.platform import PciHotplugState
from trivmm.testing.states import sent

from .test_pci_ecam import Function

PCIU, PCID, B0EJ, PSEG = 0, 4, 8, 12
REMOVABLE = 1 << 2 | 1 << 3


@attrs.define(eq=False)
class World:
    bus: PciBus = attrs.field(factory=lambda: PciBus(AddressSpace("mmio"), Deadlines()))
    woken: list[int] = attrs.field(factory=list)
    hotplug: PciHotplug = attrs.field(
        default=attrs.Factory(lambda self: PciHotplug(self.bus, lambda: REMOVABLE, 2), takes_self=True)
    )

    def __attrs_post_init__(self) -> None:
        for name in ("_a", "_b", "_c"):  # slots 1 to 3
            self.bus.add(Function(name))
        self.hotplug.wake = lambda: self.woken.append(1)

    def read(self, register: int) -> int:
        return int.from_bytes(self.hotplug.read(register, 4), "little")

    def eject(self, bits: int) -> None:
        assert self.hotplug.write(B0EJ, bits.to_bytes(4, "little")) is None

    def there(self, slot: int) -> bool:
        return self.bus.read_config(slot, 0, 2) == b"\xf4\x1a"


@pytest.fixture
def world() -> World:
    return World()


def test_what_came_and_what_is_to_go_is_read_once(world: World) -> None:
    world.hotplug.inserted(2)
    world.hotplug.ask(3)
    assert [world.read(PCIU), world.read(PCIU)] == [1 << 2, 0]
    assert [world.read(PCID), world.read(PCID)] == [1 << 3, 0]
    world.hotplug.ask(3)
    assert world.read(PCID) == 1 << 3, "asked again"
    assert [world.read(B0EJ), world.read(PSEG)] == [0, 0]


def test_what_is_ejected_is_gone_at_once_and_its_slot_is_free_later(world: World) -> None:
    world.hotplug.ask(3)
    world.eject(1 << 3)
    assert not world.there(3)
    assert world.woken == [1]
    assert list(world.hotplug.ejected) == list(world.hotplug.leaving) == [3]
    assert world.read(PCID) == 0, "it is gone: nothing is asked any more"
    world.hotplug.ask(3)  # too late to ask
    assert world.read(PCID) == 0
    with pytest.raises(ConfigError, match="pci_device_id = 3: the slot is taken by _c"):
        world.bus.add(Function("_d"), 3)
    world.bus.remove(3)
    world.hotplug.freed(3)
    assert world.bus.add(Function("_d")) == 3
    assert world.there(3)


def test_what_is_ejected_before_it_was_seen_is_not_announced_any_more(world: World) -> None:
    world.hotplug.inserted(2)
    world.hotplug.inserted(3)
    world.hotplug.ask(3)
    world.eject(1 << 3)
    assert world.read(PCIU) == 1 << 2


def test_what_was_not_asked_for_is_not_ejected_nor_anything_twice(world: World) -> None:
    world.eject(1 << 0 | 1 << 1 | 1 << 2 | 1 << 31)
    assert all(world.there(slot) for slot in (1, 2, 3))
    assert world.woken == []
    world.hotplug.ask(2)
    world.eject(1 << 2 | 1 << 1)
    world.eject(1 << 2)
    assert world.woken == [1]
    assert world.hotplug.counters() == {"ejects_ignored": 6}
    assert list(world.hotplug.ejected) == [2]


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (4, 8), (13, 1), (15, 1), (12, 8)]
)
def test_odd_accesses_read_zero_and_take_nothing(world: World, offset: int, size: int) -> None:
    world.hotplug.inserted(2)
    world.hotplug.ask(3)
    before = world.hotplug.save()
    assert world.hotplug.read(offset, size) == bytes(size)
    assert world.hotplug.write(offset, b"\xff" * size) is None
    assert world.hotplug.write(B0EJ, b"\xff" * size if size != 4 else bytes(4)) is None
    assert world.hotplug.write(PSEG, b"\xff\xff\xff\xff") is None
    assert world.hotplug.save() == before


def test_what_is_pending_travels(world: World) -> None:
    world.hotplug.inserted(2)
    world.hotplug.ask(2)
    world.hotplug.ask(3)
    world.eject(1 << 3)
    saved = world.hotplug.save()
    there = World()
    there.hotplug.check(sent(saved), "hotplug")
    there.hotplug.load(saved)
    assert there.hotplug.save() == saved
    assert not there.there(3)
    assert there.there(2)
    assert there.read(PCIU) == there.read(PCID) == 1 << 2
    there.hotplug.load(PciHotplugState(0, 0, 0, 0))  # the source went on, and sends another one
    assert there.there(3)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (PciHotplugState(1 << 1, 0, 0, 0), r"hotplug\.up is 2, not bits of 0xc"),
        (PciHotplugState(0, 0, 1 << 5, 0), r"hotplug\.asked is 32"),
        (PciHotplugState(0, 0, 0, 1), r"hotplug\.ejected is 1"),
        (PciHotplugState(0, 0, 1 << 2, 1 << 2), r"hotplug\.asked is 4"),
        (PciHotplugState(0, 1 << 2, 0, 0), r"hotplug\.down is 4, not bits of 0x0"),
    ],
)
def test_a_state_that_can_not_be_is_refused_by_name(world: World, state: PciHotplugState, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        world.hotplug.check(state, "hotplug")
    assert world.hotplug.save() == PciHotplugState(0, 0, 0, 0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 15), st.sampled_from((1, 2, 4, 8))),
            st.tuples(st.just("write"), st.integers(0, 15), st.binary(min_size=1, max_size=8)),
            st.tuples(st.sampled_from(("ask", "inserted")), st.sampled_from((2, 3)), st.none()),
        ),
        max_size=60,
    )
)
def test_whatever_a_guest_does_only_what_was_asked_for_goes(steps: list[tuple[str, int, object]]) -> None:
    world, asked = World(), set[int]()
    for what, where, more in steps:
        if what == "read":
            assert isinstance(more, int)
            assert len(world.hotplug.read(where, more)) == more
        elif what == "write":
            assert isinstance(more, bytes)
            assert world.hotplug.write(where, more) is None
        else:
            getattr(world.hotplug, what)(where)
            asked |= {where} if what == "ask" else set()
        world.hotplug.check(world.hotplug.save(), "hotplug")
    assert set(world.hotplug.ejected) <= asked
    assert all(world.there(slot) for slot in (0, 1, 2, 3) if slot and slot not in world.hotplug.ejected)


def test_two_vcpus_eject_a_device_once(world: World) -> None:
    for _ in range(200):
        world.hotplug.load(PciHotplugState(0, 0, 0, 0))
        world.hotplug.ask(3)
        start, before = threading.Barrier(2, timeout=20), len(world.woken)

        def eject(start: threading.Barrier = start) -> None:
            start.wait()
            world.eject(1 << 3)

        threads = [threading.Thread(target=eject) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(world.woken) == before + 1


def test_slots_that_are_asked_for_are_kept_for_those_that_ask() -> None:
    assert pick_slots([None, 1, None, 3]) == [2, 1, 4, 3]
    assert pick_slots([None], {1: "_a", 2: "_b"}) == [3]
    for wanted, says in (
        ([4, 4], "taken by another"),
        ([0], "taken by _pci_root"),
        ([32], "no such"),
        ([-1], "no such"),
    ):
        with pytest.raises(ConfigError, match=says):
            pick_slots(wanted)
    with pytest.raises(ConfigError, match="no such PCI slot is free"):
        pick_slots([None] * 32)
