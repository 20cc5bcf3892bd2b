"""The worker of several queues, with handlers in Python: turns, batches, descriptors of its own, and how it ends."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver

LIMIT_S = 60
DATA = 0x100000
OWN = int(lib.TV_WORKER_QUEUES)  # the first descriptor that is no doorbell


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(0, 4 << 20)])
    yield made
    made.close()


class Worker:
    """``serve(queue, chain)`` answers for a chain; ``on_ready(at)``, where given, is a descriptor's whole turn."""

    def __init__(
        self,
        memory: GuestMemory,
        serve: Callable[[Any, Any], int],
        *,
        queues: int = 1,
        size: int = 8,
        on_ready: Callable[[int], None] | None = None,
    ) -> None:
        self.drivers = [MockDriver(memory, size=size, base=0x10000 * (1 + at)) for at in range(queues)]
        self.native = ffi.new("struct tv_worker *")
        self.native.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ends: list[int] = []
        self.threads: list[threading.Thread] = []
        self._serve = ffi.callback("tv_serve_fn", lambda worker, queue, chain: serve(queue, chain), error=0)
        self.native.serve = self._serve
        if on_ready is not None:
            self._on_ready = ffi.callback("tv_ready_fn", lambda worker, at: on_ready(at))
            self.native.on_ready = self._on_ready
        for at, driver in enumerate(self.drivers):
            ring = driver.open()
            ring.index = 10 + at
            assert lib.tv_worker_add(self.native, ring, driver.doorbell) == at

    def offer(self, at: int = 0, head: int = 0, length: int = 8) -> None:
        driver = self.drivers[at]
        driver.offer(driver.chain(Descriptor(DATA, length, WRITE), first=head))

    def start(self) -> None:
        thread = threading.Thread(target=lambda: self.ends.append(lib.tv_worker_run(self.native)), daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self) -> int:
        """What the run that was started last gave."""
        self.threads[-1].join(LIMIT_S)
        assert not self.threads[-1].is_alive()
        return self.ends[-1]

    def stop(self) -> int:
        lib.tv_worker_stop(self.native)
        return self.join()

    def close(self) -> None:
        os.close(self.native.kick_fd)
        for driver in self.drivers:
            driver.close()


def interrupted(driver: MockDriver) -> None:
    poll = select.poll()
    poll.register(driver.call, select.POLLIN)
    assert poll.poll(LIMIT_S * 1000)
    driver.interrupts()


def test_a_queue_that_is_never_empty_starves_neither_the_other_nor_the_stop(memory: GuestMemory) -> None:
    served = threading.Event()

    def serve(queue: Any, chain: Any) -> int:
        if queue.index == 10:
            worker.offer(0, (int(chain.head) + 1) % 256)  # a driver that is faster than its device
            return 8
        served.set()
        return 8

    worker = Worker(memory, serve, queues=2, size=256)
    worker.offer(0)
    worker.start()
    worker.offer(1)
    worker.drivers[1].ring()
    assert served.wait(LIMIT_S)
    interrupted(worker.drivers[1])
    assert worker.drivers[1].used() == [(0, 8)]
    assert worker.stop() == 0
    assert worker.native.queues[0].chains > 1
    worker.close()


def served_together() -> bool:
    """Two chains, one after the other: whether the driver saw both at once. The thread may lose its CPU in between."""
    memory = GuestMemory([(0, 4 << 20)])
    seen: list[tuple[int, int]] = []

    def serve(queue: Any, chain: Any) -> int:
        driver = worker.drivers[0]
        seen.append((driver.used_index, driver.used_flags))
        return 8

    worker = Worker(memory, serve)
    for head in range(2):
        worker.offer(0, head)
    worker.start()
    driver, found = worker.drivers[0], []
    while len(found) < 2:
        interrupted(driver)
        found += driver.used()
    while driver.used_flags:  # on again, once there is nothing to do
        time.sleep(0)
    assert worker.stop() == 0
    assert found == [(0, 8), (1, 8)]
    assert [flags for _, flags in seen] == [1, 1], "notifications are off while it works"
    together = seen[1][0] == 0
    assert worker.native.queues[0].interrupts == (1 if together else 2)
    worker.close()
    memory.close()
    return together


def test_what_is_served_in_one_go_is_published_in_one_go() -> None:
    assert any(served_together() for _ in range(100))


def test_what_is_done_does_not_wait_for_something_slow(memory: GuestMemory) -> None:
    """A handler that publishes before it begins: the driver has the first chain while the second is under way."""
    told, go = threading.Event(), threading.Event()

    def serve(queue: Any, chain: Any) -> int:
        if chain.head == 1:
            lib.tv_worker_publish(worker.native)
            told.set()
            assert go.wait(LIMIT_S)
        return 8

    worker = Worker(memory, serve)
    for head in range(2):
        worker.offer(0, head)
    worker.start()
    assert told.wait(LIMIT_S)
    assert worker.drivers[0].used() == [(0, 8)]
    go.set()
    interrupted(worker.drivers[0])
    assert worker.stop() == 0
    assert worker.drivers[0].used() == [(1, 8)]
    worker.close()


def test_a_descriptor_of_its_own(memory: GuestMemory) -> None:
    """As a tap is: bytes arrive, and a buffer of the queue takes them. Without any the chain stays, and the worker
    sleeps until there are some."""
    there, here = os.pipe()
    asleep, turns = threading.Event(), []

    def serve(queue: Any, chain: Any) -> int:
        try:
            return len(os.read(there, 8))
        except BlockingIOError:
            lib.tv_worker_watch(worker.native, 0, there, select.POLLIN)
            asleep.set()
            return int(lib.TV_NOT_NOW)

    def on_ready(at: int) -> None:
        turns.append(at)
        lib.tv_worker_watch(worker.native, 0, there, 0)
        lib.tv_worker_serve(worker.native, 0)

    os.set_blocking(there, False)
    worker = Worker(memory, serve, on_ready=on_ready)
    worker.offer()
    worker.start()
    assert asleep.wait(LIMIT_S)
    os.write(here, b"bytes")
    interrupted(worker.drivers[0])
    assert worker.stop() == 0
    assert worker.drivers[0].used() == [(0, 5)]
    assert turns == [0, OWN], "looked at once, and then when there was something"
    os.close(here)
    os.close(there)
    worker.close()


def test_a_chain_that_goes_back_is_the_next_one_again(memory: GuestMemory) -> None:
    answers = [int(lib.TV_AGAIN), int(lib.TV_AGAIN), 8]
    worker = Worker(memory, lambda queue, chain: answers.pop(0))
    worker.offer()
    worker.start()
    interrupted(worker.drivers[0])
    assert worker.stop() == 0
    assert worker.drivers[0].used() == [(0, 8)]
    assert worker.native.queues[0].chains == 1
    worker.close()


def test_a_broken_queue_is_told_once_and_the_others_go_on(memory: GuestMemory) -> None:
    worker = Worker(memory, lambda queue, chain: 8, queues=2)
    worker.drivers[0].offer(0xFFFF)
    worker.start()
    assert worker.join() == 1
    assert [bool(worker.native.queues[at].broken) for at in range(2)] == [True, False]
    worker.start()
    worker.drivers[0].ring()
    worker.offer(1)
    worker.drivers[1].ring()
    interrupted(worker.drivers[1])
    assert worker.drivers[1].used() == [(0, 8)]
    assert worker.stop() == 0, "and not 1 again"
    worker.close()


def test_more_queues_than_a_worker_takes_are_refused(memory: GuestMemory) -> None:
    worker = Worker(memory, lambda queue, chain: 8, queues=OWN)
    assert lib.tv_worker_add(worker.native, worker.drivers[0].open(), worker.drivers[0].doorbell) == -1
    worker.close()
