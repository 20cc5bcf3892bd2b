"""Downtime of a guest on the soft CPU: copied live, with the kernel's dirty log, against copied while it stands still.

The guest rewrites pages without rest; both sides are in this process, over a unix socket. The limit of the live move's
downtime is the default one: it switches over as soon as the rest is expected to fit, so more memory makes its rounds
longer and not its downtime, and the ratio grows with the memory. What the guest gets done beside the copy, which takes
turns with it at the CPUs, and with a fault at the first store to a page after a harvest: pages that it checked a second
from the first round to the switchover, over those of a second without a migration.

    python benchmarks/soft_live.py [--mib 256] [--rate 500] [--runs 5] [--json]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import attrs
import trio
from results import Figure, median, parser_for, show

from trivmm import CpusConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.guest import parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.base import VmBackend
from trivmm.hypervisor.soft import SoftHypervisor
from trivmm.hypervisor.soft.written import why_no_dirty_log
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.testing.road import open_road

REST_MIB = 48  # beside the test pages: the guest, its table of them, and what nobody touches
LOOK_S = 1.0  # long enough for several of the guest's reports


class StandingStill(SoftHypervisor):
    """As on a kernel without the log."""

    def open_vm(self) -> VmBackend:
        vm = super().open_vm()
        vm.live_copy = False
        return vm


@attrs.frozen
class Move:
    downtime_ms: float
    seconds: float
    rounds: int
    beside: float
    """NaN where the guest stood still."""


async def move(hypervisor: SoftHypervisor, mib: int, rate: int) -> Move:
    with tempfile.TemporaryDirectory() as folder:
        serial = Path(folder) / "serial.txt"
        config = VmConfig(
            PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=mib, rate=rate)),
            cpus=CpusConfig(1),
            memory=MemoryConfig(mib + REST_MIB << 20),
            serial=SerialConfig("File", str(serial)),
            deadlines=Deadlines(pause=30),
        )
        marks: list[tuple[float, int]] = []

        def mark() -> None:
            report = parse_report(serial.read_text(errors="replace"))
            if report.problems:
                raise SystemExit(f"the guest found {report.problems}")
            marks.append((time.perf_counter(), report.checked))

        def look(progress: MigrationProgress) -> None:
            if (progress.phase is Phase.PRECOPY and len(marks) == 2) or (
                progress.phase is Phase.SWITCHOVER and len(marks) == 3
            ):
                mark()

        async with open_road(config, hypervisor=hypervisor) as road:
            await road.vm.wait_for_console("PROBE ready")
            mark()
            await trio.sleep(LOOK_S)
            mark()
            report = await road.move(f"unix:{folder}/m.sock", on_progress=look)
        speeds = [
            (after[1] - before[1]) / (after[0] - before[0])
            for before, after in zip(marks[::2], marks[1::2], strict=False)
        ]
        beside = speeds[1] / speeds[0] if len(speeds) == 2 else float("nan")
        return Move(report.downtime.total_ms, report.seconds, report.rounds, beside)


def main() -> None:
    parser = parser_for(__doc__, runs=5)
    parser.add_argument("--mib", type=int, default=256, help="of test pages")
    parser.add_argument("--rate", type=int, default=500, help="pages that the guest rewrites a second")
    options = parser.parse_args()
    problem = why_no_dirty_log()
    if problem is not None:
        raise SystemExit(f"this kernel has no dirty log: {problem}")
    pairs = []
    for number in range(options.runs):
        kinds = [SoftHypervisor, StandingStill]
        took = {kind: trio.run(move, kind(), options.mib, options.rate) for kind in kinds[:: -1 if number % 2 else 1]}
        pairs.append((took[SoftHypervisor], took[StandingStill]))
    live, still = zip(*pairs, strict=True)
    figures = [
        Figure(
            "downtime: standing still / live",
            median([b.downtime_ms / a.downtime_ms for a, b in pairs]),
            aim=5,
            note=f"{median([each.downtime_ms for each in still]):,.0f} ms of "
            f"{median([each.downtime_ms for each in live]):,.0f} ms",
        ),
        Figure(
            "whole move: standing still / live",
            median([b.seconds / a.seconds for a, b in pairs]),
            note=f"{median([each.rounds for each in live]):g} rounds live",
        ),
        Figure("the guest beside the copy / alone", median([each.beside for each in live])),
    ]
    show(f"soft: {options.mib} MiB, {options.rate} pages a second rewritten", figures, as_json=options.json)


if __name__ == "__main__":
    main()
