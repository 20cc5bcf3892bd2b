"""Pause of a VM whose two vCPUs never stop working: median and worst.

The clock runs from ``Vm.pause`` to its return, when both vCPUs are parked between two instructions. The worst says as
much about the host as about us; the raw kick (immediate_exit and a signal) is part of the figure.

    python benchmarks/pause.py [--runs 200] [--json]
"""

from __future__ import annotations

import time

import trio
from results import Figure, median, parser_for, show

from trivmm import CpusConfig, Deadlines, MemoryConfig, PayloadConfig, VmConfig, open_vm
from trivmm.guest import probe_cmdline, probe_path


async def run(runs: int) -> list[Figure]:
    payload = PayloadConfig(str(probe_path()), probe_cmdline(cpus=2, rate=100, mem=32))
    limits = Deadlines(pause=30)
    config = VmConfig(payload, cpus=CpusConfig(2), memory=MemoryConfig(64 << 20), deadlines=limits)
    took = []
    async with open_vm(config) as vm:
        await vm.boot()
        with trio.fail_after(60):
            await vm.wait_for_console("PROBE ready")
        for _ in range(runs):
            await trio.sleep(0.005)  # let both get going again
            began = time.perf_counter()
            await vm.pause()
            took.append((time.perf_counter() - began) * 1000)
            await vm.resume()
    took.sort()
    return [
        Figure("pause of 2 spinning vCPUs, median", median(took), "ms"),
        Figure("95 of 100 within", took[int(len(took) * 0.95)], "ms"),
        Figure("worst", took[-1], "ms", note=f"of {runs}"),
    ]


def main() -> None:
    options = parser_for(__doc__, runs=200).parse_args()
    show("pause", trio.run(run, options.runs), as_json=options.json)


if __name__ == "__main__":
    main()
