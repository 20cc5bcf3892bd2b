"""virtio-watchdog with its real worker thread and the mock driver as the guest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from trivmm.bus.space import GuestRequest
from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated, answered
from trivmm.testing.states import sent
from trivmm.virtio.watchdog import device as module
from trivmm.virtio.watchdog.device import WatchdogDevice

VERSION_1 = 1 << 32
BUFFER = 0x100000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 << 20)])
    yield made
    made.close()


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[MockDriver]:
    made = MockDriver(memory)
    yield made
    made.close()


def active(device: WatchdogDevice, driver: MockDriver) -> AbstractAsyncContextManager[None]:
    """From where the driver is."""
    setup = driver.setup(VERSION_1, next_avail=driver.avail, next_used=driver.seen)
    return activated(device, setup, [driver.handle])


async def ping(driver: MockDriver, *parts: Descriptor) -> tuple[int, int]:
    """(the byte, the used length)"""
    driver.memory.write(BUFFER, b"\xaa\xaa")
    driver.offer(driver.chain(*(parts or (Descriptor(BUFFER, 2, WRITE),))))
    driver.ring()
    found = await answered(driver)
    return driver.memory.read(BUFFER, 1)[0], found[0][1]


async def test_pings_and_what_is_none(memory: GuestMemory, driver: MockDriver) -> None:
    device = WatchdogDevice(memory)
    device.guest_runs(True)
    async with active(device, driver):
        assert await ping(driver, Descriptor(BUFFER, 2)) == (0xAA, 0)
        assert await ping(driver, Descriptor(BUFFER + 8, 1), Descriptor(BUFFER, 1, WRITE)) == (0xAA, 0)
        assert not device.save().armed
        assert await ping(driver) == (1, 1)
        device.guest_runs(False)
        assert device.save().armed
    assert device.counters() == {"pings": 1, "errors": 2, "expired": 0}
    assert device.queue_sizes == (8,)
    device.reset()
    assert not device.save().armed


async def test_it_expires_once_and_asks_for_a_reset(
    memory: GuestMemory, driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    device, asked = WatchdogDevice(memory), trio.Event()
    requests: list[GuestRequest] = []
    device.on_request = lambda request: (requests.append(request), asked.set())[0]
    async with active(device, driver):
        await ping(driver)  # while the guest stands still: nothing comes of it
        with trio.move_on_after(0.2):
            await asked.wait()
        assert requests == []
        device.guest_runs(True)
        with trio.fail_after(20):
            await asked.wait()
    assert requests == [GuestRequest("reset", "the watchdog: no ping for 0.05 s")]
    assert device.counters()["expired"] == 1


async def test_a_state_goes_on_where_it_was(
    memory: GuestMemory, driver: MockDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = WatchdogDevice(memory), WatchdogDevice(memory)
    source.guest_runs(True)
    async with active(source, driver):
        await ping(driver)
    began = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: began + 7)
    source.guest_runs(False)
    state = sent(source.save())
    assert state.armed
    assert 7000 <= state.idle_ms < 30_000
    target.load(state)
    monkeypatch.setattr(module.time, "monotonic", lambda: began + 1000)
    assert target.save() == state
    target.guest_runs(True)
    monkeypatch.setattr(module.time, "monotonic", lambda: began + 1002)
    assert abs(target.save().idle_ms - state.idle_ms - 2000) <= 1
