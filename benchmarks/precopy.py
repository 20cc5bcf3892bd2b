"""Precopy throughput against the raw socket: ratios, from alternating runs, medians.

``raw`` pushes the same bytes through the same kind of socket with sendall and recv_into between two threads;
``precopy`` is a round of :func:`trivmm.migration.source.sender.send`, the destination's word that it landed included.
*cold* lands in RAM that nobody has touched, as the first round of every migration does; *warm* in RAM that all of it
landed in before, as later rounds do (here the third, of a guest that rewrites everything). Host figures drift by 2x
between runs: only the ratios of one run mean anything.

    python benchmarks/precopy.py [--mib 256] [--runs 7]
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from typing import Any

import trio
from results import Figure, median, parser_for, show

from trivmm._native import ffi
from trivmm.deadlines import Deadlines
from trivmm.memory.guest import GuestMemory
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.options import SendOptions
from trivmm.migration.source.sender import send, socket_dialer
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


class Rewriting(FakeSource):
    """Its guest rewrites all of its RAM in each of the first two rounds."""

    harvests = 0

    def harvest_dirty(self, slot: int, into: Any) -> None:
        self.harvests += 1
        if self.harvests <= 2:
            for word in range(self.memory.regions[slot].bitmap_words):
                into[word] = (1 << 64) - 1


def precopy_rates(kind: str, source: FakeSource, target: FakeDestination) -> tuple[float, float]:
    """MiB a second of the first round, and of the third."""
    rates: list[float] = []

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            url = f"unix:{folder}/m.sock" if kind == "unix" else "tcp:127.0.0.1:0"
            async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:

                async def go() -> None:
                    # Less than a whole round takes, more than a switchover without pages.
                    report = await send(
                        source, socket_dialer(receiver.url, source.deadlines), SendOptions(downtime_ms=30)
                    )
                    full = [each for each in report.timeline if each.pages == source.memory.regions[0].pages]
                    rates.extend(each.pages * 4096 / MIB / each.seconds for each in full)

                nursery.start_soon(go)
                await receiver.receive(target.factory)

    trio.run(main)
    assert view(source.memory)[:] == view(target.memory)[:]
    return rates[0], rates[2]


def once(kind: str, mib: int) -> tuple[float, float, float, float]:
    """Raw cold, precopy cold, raw warm, precopy warm."""
    ram = ((0, mib * MIB),)
    lock = DiskLock()
    source, target, plain = Rewriting(lock, LIMITS, ram), FakeDestination(lock, LIMITS, ram), GuestMemory(ram)
    try:
        fill(source.memory)
        raw_cold = raw_rate(kind, source.memory, plain)
        cold, warm = precopy_rates(kind, source, target)
        return raw_cold, cold, raw_rate(kind, source.memory, plain), warm
    finally:
        source.close()
        target.close()
        plain.close()


def main() -> None:
    parser = parser_for(__doc__, runs=7)
    parser.add_argument("--mib", type=int, default=256)
    arguments = parser.parse_args()
    figures = []
    for kind in ("unix", "tcp"):
        runs = [once(kind, arguments.mib) for _ in range(arguments.runs)]
        for name, first in (("cold", 0), ("warm", 2)):
            raw, ours = (median([each[at] for each in runs]) for at in (first, first + 1))
            ratio = median([each[first + 1] / each[first] for each in runs])
            aim = 0.9 if name == "warm" else None
            note = f"{ours:,.0f} of {raw:,.0f} MiB/s"
            figures.append(Figure(f"{kind} {name}: precopy / raw socket", ratio, aim=aim, note=note))
    show(f"precopy of {arguments.mib} MiB", figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
