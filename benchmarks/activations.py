"""Activations of virtio devices a second, before a migration and during its precopy, over unix and tcp (aim 0.8).

The probe guest resets and activates rng and block without rest while it dirties memory. A downtime limit that nothing
meets keeps precopy going for as long as the measurement takes; then the migration is cancelled and the next run
begins. That TriVMM goes on activating while a migration owns the VM is its reason to be. The rate before is the mean
of the one right before and the one right after, so that a host that gets faster or slower cancels out.

    python benchmarks/activations.py [--runs 5] [--seconds 3] [--json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm import CpusConfig, Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, VmConfig, open_vm
from trivmm.errors import TrivmmError
from trivmm.guest import probe_cmdline, probe_path
from trivmm.incoming import open_incoming
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.vm import Vm

NEVER_MS = 1.0  # less than the least that a switchover is expected to take


class Counter:
    def __init__(self, vm: Vm) -> None:
        self.count = 0
        vm.events.listen(self.note)

    def note(self, event: Event) -> None:
        self.count += event.event == "activated"

    async def rate(self, seconds: float) -> float:
        before, began = self.count, trio.current_time()
        await trio.sleep(seconds)
        return (self.count - before) / (trio.current_time() - began)


async def during_precopy(vm: Vm, counter: Counter, url: str, seconds: float) -> tuple[float, int]:
    """The rate while precopy runs, and its rounds in that time."""
    copying = trio.Event()
    rate, rounds = 0.0, 0

    def watch(progress: MigrationProgress) -> None:
        if progress.phase is Phase.PRECOPY:
            copying.set()

    async with open_incoming(url, deadlines=vm.deadlines) as incoming, trio.open_nursery() as nursery:

        async def receive() -> None:
            try:
                await incoming.receive()
            except TrivmmError:
                return  # cancelled, as it should be

        async def send() -> None:
            try:
                await vm.migrate_to(incoming.url, downtime_ms=NEVER_MS, timeout_s=600, on_progress=watch)
            except TrivmmError:
                return

        nursery.start_soon(receive)
        nursery.start_soon(send)
        await copying.wait()
        rate = await counter.rate(seconds)
        progress = vm.migration_progress
        assert progress is not None
        assert vm.migrating, "the migration ended too early"
        rounds = progress.round
        vm.cancel_migration()
    return rate, rounds


async def run(runs: int, seconds: float) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "disk.img")
        disk.write_bytes(bytes(8 << 20))
        cmdline = probe_cmdline(cpus=2, rate=300, cycle="rng,blk", mem=64)
        config = VmConfig(
            PayloadConfig(str(probe_path()), cmdline),
            cpus=CpusConfig(2),
            memory=MemoryConfig(128 << 20),
            disks=(DiskConfig(str(disk)),),
            deadlines=Deadlines(pause=30),
        )
        async with open_vm(config) as vm:
            counter = Counter(vm)
            await vm.boot()
            with trio.fail_after(60):
                await vm.wait_for_console("PROBE ready")
            ratios: dict[str, list[float]] = {"unix": [], "tcp": []}
            rates: dict[str, list[float]] = {"unix": [], "tcp": []}
            quiet, rounds = [], 0
            for number in range(runs):
                for kind in ratios:
                    url = f"unix:{folder}/{number}.sock" if kind == "unix" else "tcp:127.0.0.1:0"
                    before = await counter.rate(seconds)
                    during, some = await during_precopy(vm, counter, url, seconds)
                    after = await counter.rate(seconds)
                    ratios[kind].append(2 * during / (before + after))
                    rates[kind].append(during)
                    quiet.append((before + after) / 2)
                    rounds += some
    for kind, found in ratios.items():
        figures.append(Figure(f"{kind}: during precopy / before", median(found), aim=0.8))
    for kind, found in rates.items():
        figures.append(Figure(f"{kind}: during precopy", median(found), "/s"))
    figures.append(Figure("without a migration", median(quiet), "/s"))
    figures.append(Figure("precopy rounds while measuring", float(rounds), note="all runs together"))
    return figures


def main() -> None:
    parser = parser_for(__doc__, runs=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    show("activations during precopy", trio.run(run, options.runs, options.seconds), as_json=options.json)


if __name__ == "__main__":
    main()
