"""vsock streams and connections against plain unix sockets, by the same C loops.

First the device's own path, without a guest: packets through its rings and hooks, in one thread with the peer, taking
turns with a socket pair. Then those of a real guest: the probe sends a pattern, or checks one, so its own work and its
exits are in the figures too. That needs ``/dev/kvm``.

    python benchmarks/vsock.py [--runs 5] [--json]
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm import CpusConfig, MemoryConfig, PayloadConfig, VmConfig, VsockConfig, open_vm
from trivmm.guest import probe_cmdline, probe_path

MIB = 256
PIECES = 4096, 65536
FFI = Path(__file__).resolve().parents[1] / "ffi"
LINKED = [*sorted(FFI.glob("vsock*.c")), *(FFI / name for name in ("ring.c", "worker.c", "park.c"))]
CONNECTIONS = 500
LIMIT_S = 120


def compile_c(name: str, into: Path, *more: Path) -> Path:
    sources = [Path(__file__).with_name(f"{name}.c"), *more]
    command = ["cc", "-std=gnu11", "-O2", "-pthread", f"-I{FFI}", "-o", str(into / name), *map(str, sources)]
    subprocess.run(command, check=True, timeout=60)
    return into / name


def run(program: Path, *words: object) -> list[float]:
    command = [str(program), *map(str, words)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout
    return [float(word) for word in said.split()]


def device_path(program: Path, runs: int) -> list[Figure]:
    figures = []
    for way in ("to_host", "to_guest"):
        for piece in PIECES:
            both = [run(program, way, piece, MIB) for _ in range(runs)]
            ratio = median([ours / plain for ours, plain in both])
            note = f"{median([ours for ours, _ in both]):,.0f} MiB/s, {median([plain for _, plain in both]):,.0f} plain"
            figures.append(Figure(f"device {way}, {piece} bytes a piece, against a socket pair", ratio, note=note))
    return figures


async def measure(program: Path, *words: object) -> float:
    return (await trio.to_thread.run_sync(run, program, *words))[0]


async def guest(program: Path, path: Path, runs: int) -> list[Figure]:
    figures: dict[str, list[float]] = {name: [] for name in ("copy", "read", "write", "dial", "connect")}
    cmdline = probe_cmdline(cpus=1, mem=1, rate=0, report=1000, vsock=1, event_idx=1)
    config = VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(1),
        memory=MemoryConfig(64 << 20),
        virtio=[VsockConfig(3, path)],
    )
    async with open_vm(config) as vm:
        await vm.boot()
        with trio.fail_after(LIMIT_S):
            await vm.wait_for_console("PROBE ready")
        for _ in range(runs):
            figures["copy"].append(await measure(program, "copy", MIB))
            figures["read"].append(await measure(program, "read", path, MIB))
            figures["write"].append(await measure(program, "write", path, MIB))
            figures["dial"].append(await measure(program, "dial", CONNECTIONS))
            figures["connect"].append(await measure(program, "connect", path, CONNECTIONS))

    def ratio(ours: str, theirs: str) -> float:
        return median([mine / other for mine, other in zip(figures[ours], figures[theirs], strict=True)])

    return [
        Figure("guest to host, against a socket pair", ratio("read", "copy")),
        Figure("host to guest, against a socket pair", ratio("write", "copy")),
        Figure("connections, against a unix socket", ratio("connect", "dial")),
        Figure("socket pair", median(figures["copy"]), "MiB/s"),
        Figure("guest to host", median(figures["read"]), "MiB/s"),
        Figure("host to guest", median(figures["write"]), "MiB/s", note="checked by the guest"),
        Figure("unix socket", median(figures["dial"]), "connections/s"),
        Figure("host to guest", median(figures["connect"]), "connections/s"),
    ]


if __name__ == "__main__":
    given = parser_for(__doc__, runs=5).parse_args()
    with tempfile.TemporaryDirectory() as made:
        figures = device_path(compile_c("vsock_path", Path(made), *LINKED), given.runs)
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            figures += trio.run(guest, compile_c("vsock_client", Path(made)), Path(made) / "v.sock", given.runs)
    show("vsock", figures, as_json=given.json)
