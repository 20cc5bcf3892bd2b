"""The ring walker against a minimal C loop on the same rings, and a doorbell to its worker against a bare epoll loop.

What the loops leave out is said in ``bare_ring.c`` and ``bare_doorbell.c``. Each has both sides of a comparison in one
program that takes turns between them. A whole turn of a worker is beside it: it also asks for silence and for
notifications, and looks at the clock.

    python benchmarks/ring_floor.py [--runs 5] [--json]
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from results import Figure, median, parser_for, show

HERE = Path(__file__).parent
FFI = HERE.parent / "ffi"
LINKED = [str(FFI / name) for name in ("ring.c", "worker.c", "park.c")]
BURSTS = "20000"
ROUNDS = "4000"
LIMIT_S = 300


def compile_here(name: str, folder: Path) -> str:
    program = str(folder / name)
    command = ["cc", "-O2", "-pthread", f"-I{FFI}", "-o", program, str(HERE / f"{name}.c"), *LINKED]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    return program


def table(program: str, argument: str) -> list[list[str]]:
    done = subprocess.run([program, argument], check=True, capture_output=True, text=True, timeout=LIMIT_S)
    return [line.split("\t") for line in done.stdout.splitlines()]


def rings(program: str, runs: int) -> list[Figure]:
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(runs):
        for name, *rates in table(program, BURSTS):
            bare, walker, turn = map(float, rates)
            found.setdefault(name, []).append((bare, walker, turn))
    figures = []
    for name, rates in found.items():
        note = f"{median([each[1] for each in rates]) / 1e6:.0f} million chains/s"
        figures.append(
            Figure(f"walker / minimal loop: {name}", median([each[1] / each[0] for each in rates]), aim=0.9, note=note)
        )
        note = f"{median([each[2] for each in rates]) / 1e6:.0f} million chains/s"
        figures.append(Figure(f"turn / minimal loop: {name}", median([each[2] / each[0] for each in rates]), note=note))
    return figures


def doorbells(program: str, runs: int) -> list[Figure]:
    """The aim, at most 1.5 times as long, is one of at least 1 / 1.5 here."""
    found = [[[float(each) for each in line] for line in table(program, ROUNDS)] for _ in range(runs)]
    figures = []
    for at, name in enumerate(("p50", "p99")):
        note = " and ".join(f"{median([side[row][at] for side in found]) / 1e3:.1f} µs" for row in (0, 1))
        ratios = [side[0][at] / side[1][at] for side in found]
        figures.append(Figure(f"doorbell, epoll / ours: {name}", median(ratios), aim=0.67, note=note))
    return figures


def main() -> None:
    options = parser_for(__doc__, runs=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        programs = [compile_here(name, Path(folder)) for name in ("bare_ring", "bare_doorbell")]
        figures = rings(programs[0], options.runs) + doorbells(programs[1], options.runs)
    show("rings and doorbells against bare loops", figures, as_json=options.json)


if __name__ == "__main__":
    main()
