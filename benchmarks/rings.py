"""Virtqueues without a guest: chains a second through a ring, and how long a disk request takes.

The mock driver offers a burst, rings the doorbell once and waits for the interrupt that tells of its last chain. Chains
of the entropy device, whose source is /dev/zero, cost next to nothing themselves: their figure is that of the walker,
the used ring and the interrupts. The disk's are 4 KiB reads of an image that the host has in its page cache, and, where
the folder for temporary files can do that, past it: with io_uring and by the thread alone, in turns.

    python benchmarks/rings.py [--runs 5] [--json]
"""

from __future__ import annotations

import os
import select
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm.config import DiskConfig, RngConfig
from trivmm.memory.guest import GuestMemory
from trivmm.testing.blocks import has_direct
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated
from trivmm.virtio.block.device import BlockDevice
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.queue import F_EVENT_IDX, F_VERSION_1
from trivmm.virtio.rng.device import RngDevice

SIZE = 256  # of the queues
BURSTS = 200
DIRECT_BURSTS = 20  # they wait for a disk
DATA, HEADERS, STATUS = 0x100000, 0x200000, 0x210000
READ = 4096
IMAGE = 8 << 20
WAIT_MS = 10_000


class Burst:
    """Bursts of chains whose descriptors are laid out once: a burst is a new available index and a doorbell."""

    def __init__(self, driver: MockDriver, heads: list[int]) -> None:
        self.driver, self.count = driver, len(heads)
        ring = [heads[slot % len(heads)] for slot in range(driver.size)]
        driver.memory.write(driver.avail_gpa + 4, struct.pack(f"<{driver.size}H", *ring))
        self._poll = select.poll()
        self._poll.register(driver.call, select.POLLIN)

    def run(self, chains: int) -> float:
        """Seconds until so many are used."""
        driver = self.driver
        driver.avail = (driver.avail + chains) & 0xFFFF
        driver.set_used_event(driver.avail - 1)
        began = time.perf_counter()
        driver.set_avail_index(driver.avail)
        driver.ring()
        while driver.used_index != driver.avail:
            if not self._poll.poll(WAIT_MS):
                raise SystemExit("the device does not answer")
            driver.interrupts()
        return time.perf_counter() - began


def lay_out_entropy(driver: MockDriver) -> list[int]:
    return [driver.chain(Descriptor(DATA + 64 * head, 8, WRITE), first=head) for head in range(SIZE)]


def lay_out_reads(driver: MockDriver) -> list[int]:
    heads = []
    for number in range(SIZE // 4):
        driver.memory.write(HEADERS + 16 * number, struct.pack("<IIQ", 0, 0, 8 * number))
        parts = (
            Descriptor(HEADERS + 16 * number, 16),
            Descriptor(DATA + READ * number, READ, WRITE),
            Descriptor(STATUS + number, 1, WRITE),
        )
        heads.append(driver.chain(*parts, first=4 * number))
    return heads


async def measure(
    make: Callable[[GuestMemory], WorkerDevice],
    lay_out: Callable[[MockDriver], list[int]],
    *,
    event_idx: bool,
    chains: int = 0,
    bursts: int = BURSTS,
) -> float:
    """Median of seconds a burst; ``chains``: in each, all that were laid out unless given."""
    memory = GuestMemory([(0, 4 << 20)])
    driver = MockDriver(memory, size=SIZE, event_idx=event_idx)
    burst = Burst(driver, lay_out(driver))
    device = make(memory)
    features = F_VERSION_1 | (F_EVENT_IDX if event_idx else 0)
    async with activated(device, driver.setup(features), [driver.handle]):
        took = await trio.to_thread.run_sync(lambda: [burst.run(chains or burst.count) for _ in range(bursts)])
    device.close()
    driver.close()
    memory.close()
    return median(took)


async def run(runs: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.img"
        image.write_bytes(os.urandom(IMAGE))

        def entropy(memory: GuestMemory) -> WorkerDevice:
            return RngDevice(RngConfig("/dev/zero"), memory)

        def disk(memory: GuestMemory) -> WorkerDevice:
            return BlockDevice(DiskConfig(str(image), queue_size=SIZE), memory, "_disk0")

        figures = []
        for event_idx in (False, True):
            kind = "EVENT_IDX" if event_idx else "flags"
            walks = [SIZE / await measure(entropy, lay_out_entropy, event_idx=event_idx) for _ in range(runs)]
            reads = [SIZE // 4 / await measure(disk, lay_out_reads, event_idx=event_idx) for _ in range(runs)]
            alone = [await measure(disk, lay_out_reads, event_idx=event_idx, chains=1) for _ in range(runs)]
            figures += [
                Figure(f"chains through a ring ({kind})", median(walks) / 1e6, "million/s"),
                Figure(f"4 KiB reads, 64 at once ({kind})", median(reads) / 1e3, "thousand/s"),
                Figure(
                    f"4 KiB read, one at a time ({kind})", median(alone) * 1e6, "µs", note="from doorbell to interrupt"
                ),
            ]
        if has_direct(Path(folder)):
            figures += [await direct_reads(image, runs, chains, aim) for chains, aim in ((SIZE // 4, 2.0), (1, None))]
    return figures


async def direct_reads(image: Path, runs: int, chains: int, aim: float | None) -> Figure:
    """How much faster so many direct reads at once are through io_uring."""

    def disk(alone: bool, memory: GuestMemory) -> WorkerDevice:
        config = DiskConfig(str(image), queue_size=SIZE, direct=True, disable_io_uring=alone)
        return BlockDevice(config, memory, "_disk0")

    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(runs):
        for alone in took:
            seconds = await measure(
                partial(disk, alone), lay_out_reads, event_idx=True, chains=chains, bursts=DIRECT_BURSTS
            )
            took[alone].append(seconds)
    ratio = median([alone / ring for ring, alone in zip(took[False], took[True], strict=True)])
    each = f"{chains / median(took[False]) / 1e3:.1f} and {chains / median(took[True]) / 1e3:.1f} thousand/s"
    return Figure(f"direct 4 KiB reads, {chains} at once: io_uring / thread alone", ratio, aim=aim, note=each)


def main() -> None:
    options = parser_for(__doc__, runs=5).parse_args()
    show("rings", trio.run(run, options.runs), as_json=options.json)


if __name__ == "__main__":
    main()
