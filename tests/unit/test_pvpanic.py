"""pvpanic's registers, what it tells, and what it saves."""

from __future__ import annotations

import pytest

from trivmm.bus.space import AddressSpace
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, ProtocolError
from trivmm.platform.pci import PciBus
from trivmm.platform.pvpanic import Pvpanic
from trivmm.testing.states import sent


def a_pvpanic(told: list[str]) -> Pvpanic:
    return Pvpanic(told.append, lock_s=1)


def test_a_destination_has_it_where_the_sender_has_it() -> None:
    """Where devices have come and gone that may be another slot than the next one."""
    bus = PciBus(AddressSpace("mmio"), Deadlines())
    made = a_pvpanic([])
    made.plug(bus)
    assert bus.functions[1] is made
    made.move(bus, 4)
    assert (made.slot, sorted(bus.functions)) == (4, [0, 4])
    made.move(bus, 4)
    with pytest.raises(ConfigError, match="pci_device_id = 0"):
        made.move(bus, 0)


def test_it_is_cloud_hypervisors() -> None:
    made = a_pvpanic([])
    assert made.config.read(0, 4) == bytes.fromhex("361b1100")
    assert made.config.read(8, 4) == bytes.fromhex("01008008")  # revision 1, other system peripheral
    assert made.config.read(0x3D, 1) == b"\0"  # no interrupt
    assert [(bar.index, bar.is_64bit) for bar in made.config.bars.values()] == [(0, False)]
    assert made.bar_read(0, 0, 1) == b"\3"
    assert made.bar_read(0, 0, 4) == b"\3\0\0\0"
    assert made.bar_read(0, 1, 8) == bytes(8)


def test_each_word_is_told_once_and_counted_each_time() -> None:
    told: list[str] = []
    made = a_pvpanic(told)
    for value in (1, 2, 1, 0, 3, 0xFF, 2, 1):
        assert made.bar_write(0, 0, bytes([value])) is None
    made.bar_write(0, 1, b"\1")  # elsewhere is nothing
    made.bar_write(0, 8, bytes(8))
    assert told == ["panic", "crash_loaded", "unknown_event"]
    assert made.counters() == {"panic": 3, "crash_loaded": 2, "unknown_event": 3}


def test_what_was_told_travels() -> None:
    told: list[str] = []
    source, target = a_pvpanic([]), a_pvpanic(told)
    source.bar_write(0, 0, b"\2")
    source.config_write(4, b"\2\0")
    state = sent(source.save())
    target.check(state, "there")
    target.load(state)
    assert target.config.read(4, 2) == b"\2\0"
    target.bar_write(0, 0, b"\2")
    target.bar_write(0, 0, b"\1")
    assert told == ["panic"]
    assert target.counters() == {"panic": 1, "crash_loaded": 1, "unknown_event": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"told": 8}, "there.told is 8, not less than 8"),
    ],
)
def test_a_state_that_lies_is_refused(changes: dict[str, int], said: str) -> None:
    made = a_pvpanic([])
    with pytest.raises(ProtocolError) as caught:
        made.check(sent(made.save(), **changes), "there")
    assert str(caught.value).startswith(said)
