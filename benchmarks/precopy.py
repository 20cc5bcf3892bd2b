"""Precopy throughput against the raw socket: ratios, from alternating runs, medians.

``raw`` pushes the same bytes through the same kind of socket with sendall and recv_into between two threads, over
RAM that both sides have touched before; ``pages`` is one full precopy round of :func:`trivmm.migration.sender.send`
over warmed RAM at the destination (the receiver's second migration into the same memory would be such a case);
``cold`` is the same into fresh RAM, as a real migration finds it, against ``raw cold``. Host figures drift by 2x
between runs: only the ratios of one run mean anything.

    python benchmarks/precopy.py [--mib 256] [--runs 7]
"""

from __future__ import annotations

import argparse
import ctypes
import socket
import statistics
import tempfile
import threading
import time
from typing import Any

import trio

from trivmm._native import ffi
from trivmm.deadlines import Deadlines
from trivmm.machine.memory import GuestMemory
from trivmm.migration.receiver import open_receiver
from trivmm.migration.sender import SendOptions, send
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

MIB = 1 << 20
CHUNK = 256 << 10
LIMITS = Deadlines(downtime=60.0)


def view(memory: GuestMemory) -> Any:
    region = memory.regions[0]
    return ffi.buffer(ffi.cast("uint8_t *", region.hva), region.size)


def fill(memory: GuestMemory) -> None:
    pattern = bytes(range(1, 256)) * 16 + b"\1" * 16
    for page in range(memory.regions[0].pages):
        memory.write(page * 4096, pattern[:4088] + page.to_bytes(8, "little"))


def warm(memory: GuestMemory) -> None:
    ctypes.memset(memory.regions[0].hva, 0xA5, memory.size)


def sockets(kind: str) -> tuple[socket.socket, socket.socket]:
    if kind == "unix":
        pair = socket.socketpair()
        pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        return pair
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
        return here, there


def raw_rate(kind: str, source: GuestMemory, target: GuestMemory) -> float:
    """MiB a second."""
    here, there = sockets(kind)
    data, into = memoryview(view(source)), memoryview(view(target))

    def take() -> None:
        at = 0
        while at < len(into):
            at += there.recv_into(into[at : at + CHUNK])

    start = time.perf_counter()
    thread = threading.Thread(target=take)
    thread.start()
    for at in range(0, len(data), CHUNK):
        here.sendall(data[at : at + CHUNK])
    thread.join(300)
    seconds = time.perf_counter() - start
    here.close()
    there.close()
    return source.size / MIB / seconds


def precopy_rate(kind: str, source: FakeSource, target: FakeDestination) -> float:
    """MiB a second of the first round: everything, the destination's word that it landed included."""
    rates: list[float] = []

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            url = f"unix:{folder}/m.sock" if kind == "unix" else "tcp:127.0.0.1:0"
            async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:

                async def go() -> None:
                    report = await send(source, receiver.url, SendOptions(downtime_ms=60_000))
                    first = report.timeline[0]
                    rates.append(first.pages * 4096 / MIB / first.seconds)

                nursery.start_soon(go)
                await receiver.receive(target.factory)

    trio.run(main)
    assert bytes(view(source.memory)[: 16 * MIB]) == bytes(view(target.memory)[: 16 * MIB])
    return rates[0]


def once(kind: str, mib: int, cold: bool) -> tuple[float, float]:
    ram = ((0, mib * MIB),)
    lock = DiskLock()
    source, target, plain = FakeSource(lock, LIMITS, ram), FakeDestination(lock, LIMITS, ram), GuestMemory(ram)
    try:
        fill(source.memory)
        if not cold:
            warm(target.memory)
            warm(plain)
        return raw_rate(kind, source.memory, plain), precopy_rate(kind, source, target)
    finally:
        source.close()
        target.close()
        plain.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{arguments.mib} MiB, median of {arguments.runs} alternating runs, MiB/s")
    print(f"{'':14}{'raw socket':>12}{'precopy':>12}{'ratio':>8}")
    for kind in ("unix", "tcp"):
        for cold in (False, True):
            pairs = [once(kind, arguments.mib, cold) for _ in range(arguments.runs)]
            raw, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(mine / theirs for theirs, mine in pairs)
            print(f"{kind + (' cold' if cold else ' warm'):14}{raw:12.0f}{ours:12.0f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
