"""The event bus: nobody waits for a listener, what one loses is counted and told, and the last event always comes."""

from __future__ import annotations

import json

import pytest
import trio

from trivmm.events import Event, EventBus


async def names(bus: EventBus, capacity: int = 4) -> list[str]:
    with bus.subscribe(capacity) as events:
        bus.close()
        return [event.event async for event in events]


async def test_events_come_in_order_and_end_with_the_bus() -> None:
    bus = EventBus()
    with bus.subscribe() as events:
        bus.emit("vm", "booting")
        bus.emit("virtio-device", "activated", id="_disk0")
        bus.close()
        bus.emit("vm", "never")
        seen = [(event.source, event.event, event.properties) async for event in events]
    assert seen == [("vm", "booting", None), ("virtio-device", "activated", {"id": "_disk0"})]
    assert await names(bus) == []  # subscribed to a bus that is closed: it ends at once


async def test_an_event_is_written_as_cloud_hypervisor_writes_it() -> None:
    event = Event("vm", "booted", None, 1.5)
    assert json.loads(event.text(indent=2)) == {
        "timestamp": {"secs": 1, "nanos": 500_000_000},
        "source": "vm",
        "event": "booted",
        "properties": None,
    }


async def test_a_slow_listener_loses_events_is_told_how_many_and_gets_the_last_one() -> None:
    bus = EventBus()
    slow, quick = bus.subscribe(capacity=3), bus.subscribe()
    for number in range(10):
        bus.emit("vm", str(number))
    assert slow.dropped == 7
    first = [await slow.__anext__() for _ in range(2)]
    assert [event.event for event in first] == ["0", "1"]
    bus.emit("vm", "10")  # room again: what is missing is told before what comes next
    bus.emit("vm", "11")
    bus.emit("vm", "12")
    bus.close()
    rest = [event async for event in slow]
    assert [event.event for event in rest] == ["2", "events-dropped", "10", "events-dropped", "12"]
    assert [event.properties for event in rest if event.event == "events-dropped"] == [{"count": "7"}, {"count": "1"}]
    assert slow.dropped == 8
    assert [event.event async for event in quick] == [str(number) for number in range(13)]


async def test_a_listener_that_waits_is_woken(autojump_clock: trio.testing.MockClock) -> None:
    bus = EventBus()
    seen: list[str] = []

    async def listen() -> None:
        with bus.subscribe() as events:
            async for event in events:
                seen.append(event.event)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await trio.testing.wait_all_tasks_blocked()
            bus.emit("vm", "paused")
            await trio.testing.wait_all_tasks_blocked()
            assert seen == ["paused"]
            bus.emit("vm", "resumed")
            bus.close()
    assert seen == ["paused", "resumed"]


async def test_a_listener_that_raises_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    seen: list[str] = []

    def faulty(event: Event) -> None:
        raise ZeroDivisionError("a listener's own bug")

    bus.listen(faulty)
    bus.listen(lambda event: seen.append(event.event))
    bus.emit("vm", "booted")
    assert seen == ["booted"]
    assert "a listener's own bug" in caplog.text
