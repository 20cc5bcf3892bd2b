"""The bus between the local APICs of the soft CPU, and whose turn it is. Intel SDM vol. 3, chapter 11."""

from __future__ import annotations

import threading

import pytest

from trivmm.errors import HypervisorError
from trivmm.hypervisor.soft.apic_bus import ApicBus
from trivmm.hypervisor.soft.turns import Turns

SVR, LDR, DFR, TPR, ICR_LOW, ICR_HIGH, EOI, LINT0 = 0xF0, 0xD0, 0xE0, 0x80, 0x300, 0x310, 0xB0, 0x350
INIT, STARTUP, NMI, LOWEST = 5 << 8, 6 << 8, 4 << 8, 1 << 8
LEVEL, ASSERT, LOGICAL = 1 << 15, 1 << 14, 1 << 11
ALL, OTHERS, SELF = 2 << 18, 3 << 18, 1 << 18


def bus_of(count: int) -> tuple[ApicBus, list[int]]:
    ended: list[int] = []
    bus = ApicBus(ended.append)
    for index in range(count):
        lapic = bus.add()
        lapic.write(SVR, 0x1FF, 0)
        lapic.write(LDR, 1 << 24 + index, 0)
    return bus, ended


def send(bus: ApicBus, sender: int, low: int, destination: int = 0) -> None:
    bus.lapics[sender].write(ICR_HIGH, destination << 24, 0)
    bus.lapics[sender].write(ICR_LOW, low, 0)


def pending(bus: ApicBus) -> list[int | None]:
    return [lapic.pending() for lapic in bus.lapics]


@pytest.mark.parametrize(
    ("low", "destination", "reached"),
    [
        (0x41, 2, {2}),
        (0x41, 0, {0}),
        (0x41, 0xFF, {0, 1, 2, 3}),
        (0x41, 9, set()),
        (0x41 | LOGICAL, 0b0101, {0, 2}),
        (0x41 | LOGICAL, 0xFF, {0, 1, 2, 3}),
        (0x41 | SELF, 3, {1}),
        (0x41 | ALL, 0, {0, 1, 2, 3}),
        (0x41 | OTHERS, 0, {0, 2, 3}),
        (0x41 | ASSERT, 3, {3}),
    ],
)
def test_an_ipi_reaches_whom_it_names(low: int, destination: int, reached: set[int]) -> None:
    bus, _ = bus_of(4)
    send(bus, 1, low, destination)
    assert pending(bus) == [0x41 if index in reached else None for index in range(4)]


def test_clusters() -> None:
    bus, _ = bus_of(4)
    for index, lapic in enumerate(bus.lapics):
        lapic.write(DFR, 0x0FFF_FFFF, 0)
        lapic.write(LDR, (index // 2 << 4 | 1 << index % 2) << 24, 0)
    send(bus, 0, 0x50 | LOGICAL, 0x12)
    assert pending(bus) == [None, None, None, 0x50]
    send(bus, 0, 0x51 | LOGICAL, 0x03)
    assert pending(bus) == [0x51, 0x51, None, 0x50]


def test_the_lowest_priority_takes_it_alone() -> None:
    bus, _ = bus_of(3)
    bus.lapics[0].write(TPR, 0x20, 0)
    bus.lapics[1].write(TPR, 0x10, 0)
    bus.lapics[2].write(SVR, 0xFF, 0)  # off: it takes none
    bus.message(0xFEE0_0000 | 0x07 << 12 | 4, LOWEST | 0x60)
    assert pending(bus) == [None, 0x60, None]


def test_an_msi_goes_by_its_address() -> None:
    bus, _ = bus_of(2)
    bus.message(0xFEE0_1000, 0x33)
    bus.message(0xFED0_0000, 0x34)
    assert pending(bus) == [None, 0x33]
    bus.message(0xFEE0_0000, NMI)
    assert [lapic.nmi for lapic in bus.lapics] == [True, False]


def test_each_ends_its_own_interrupt() -> None:
    bus, ended = bus_of(2)
    send(bus, 0, 0x70 | ALL)
    for lapic in bus.lapics:
        lapic.acknowledge(0x70)
    bus.lapics[1].write(EOI, 0, 0)
    assert ended == [0x70]
    assert [bool(lapic.isr) for lapic in bus.lapics] == [True, False]


def test_init_and_startup() -> None:
    bus, _ = bus_of(2)
    other = bus.lapics[1]
    send(bus, 0, STARTUP | 0x9A, 1)
    assert other.startup == 0x9A
    send(bus, 0, INIT | LEVEL | ASSERT, 1)
    assert (other.init, other.startup) == (True, None)
    other.initialize()
    assert (other.init, other.apic_id, other.svr, other.ldr) == (False, 1, 0xFF, 0)
    send(bus, 0, INIT | LEVEL, 1)  # the de-assertion
    assert not other.init
    send(bus, 0, INIT, 1)  # an edge has no level
    assert other.init


def test_only_the_boot_cpu_has_the_old_interrupts() -> None:
    bus, _ = bus_of(2)
    for lapic in bus.lapics:
        lapic.initialize()
    assert [lapic.takes_extint() for lapic in bus.lapics] == [True, False]


def test_what_waits_is_saved() -> None:
    bus, _ = bus_of(2)
    send(bus, 0, STARTUP | 7, 1)
    twin, _ = bus_of(2)
    twin.lapics[1].load(bus.lapics[1].save(0), 0)
    assert twin.lapics[1].startup == 7
    state = bus.lapics[1].save(0) | {"startup": 256}
    with pytest.raises(ValueError, match="256"):
        twin.lapics[1].load(state, 0)


# --- turns ---------------------------------------------------------------------------------------------------


def test_turns_go_round() -> None:
    """Three that are always there: none has it twice while another waits."""
    turns, order, three = Turns(), [], threading.Barrier(3)

    def go(name: str) -> None:
        three.wait(10)
        for _ in range(200):
            assert turns.take(name, lambda: False)
            order.append(name)
            turns.release()

    threads = [threading.Thread(target=go, args=(name,)) for name in "abc"]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert {name: order.count(name) for name in "abc"} == dict.fromkeys("abc", 200)


def test_first_come_first_served() -> None:
    turns, order = Turns(), []
    assert turns.take("owner", lambda: False)
    threads = []
    for name in "abc":
        queued = len(threads) + 1
        threads.append(
            threading.Thread(
                target=lambda name=name: (turns.take(name, lambda: False), order.append(name), turns.release())
            )
        )
        threads[-1].start()
        while len(turns._queue) < queued:
            pass
    turns.release()
    for each in threads:
        each.join(10)
    assert order == ["a", "b", "c"]


def test_who_is_called_away_leaves_the_queue() -> None:
    turns, called, answers = Turns(), threading.Event(), []
    assert turns.take("owner", lambda: False)
    waiter = threading.Thread(target=lambda: answers.append(turns.take("other", called.is_set)))
    waiter.start()
    while not turns._queue:
        pass
    called.set()
    turns.wake()
    waiter.join(10)
    assert answers == [False]
    turns.release()
    assert turns.take("third", lambda: True)  # it is free: nobody is asked


def test_a_turn_that_does_not_end_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivmm.hypervisor.soft.turns.LIMIT_S", 0.01)
    monkeypatch.setattr("trivmm.hypervisor.soft.turns.LOOK_S", 0.01)
    turns = Turns()
    with turns.hold(), pytest.raises(HypervisorError, match="a vCPU has kept it"), turns.hold():
        pass
    with turns.hold():
        pass
