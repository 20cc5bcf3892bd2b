"""Two guests that are tied by a unix stream send each other data: frames and MiB a second, with our device and QEMU's.

The guest is the same, TriVMM's probe, with its own driver; it fills and checks every word, and tells how long it took.
Two processes of a kind run it, in turns with the other kind, with small frames and with the longest. QEMU's half needs
qemu-system-x86_64 (7.2 or later, for ``-netdev stream``).

    python benchmarks/net.py [--runs 3] [--json]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm.guest import parse_report, probe_cmdline, probe_path

QEMU = shutil.which("qemu-system-x86_64")
LIMIT_S = 300
LOADS = {1400: 4, 60000: 128}  # bytes of data a frame: MiB that each guest sends
MACS = ("52:54:00:00:00:0a", "52:54:00:00:00:0b")


def ours(folder: Path, name: str, end: int, cmdline: str) -> list[str]:
    link = f"{('listen', 'connect')[end]}:{folder}/cable.sock"
    command = [sys.executable, "-P", "-m", "trivmm", "--kernel", str(probe_path()), "--cmdline", cmdline]
    command += ["--memory", "size=64M", "--serial", f"file={folder / name}", "--hypervisor", "kvm"]
    return [*command, "--net", f"link={link},mac={MACS[end]}"]


def qemus(folder: Path, name: str, end: int, cmdline: str) -> list[str]:
    command = [str(QEMU), "-machine", "pc,accel=kvm,acpi=off", "-m", "64", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-no-reboot", "-serial", f"file:{folder / name}"]
    command += ["-kernel", str(probe_path()), "-append", cmdline]
    server = ("on", "off")[end]
    command += ["-netdev", f"stream,id=n,server={server},addr.type=unix,addr.path={folder}/cable.sock"]
    return [*command, "-device", f"virtio-net-pci,netdev=n,disable-legacy=on,mac={MACS[end]}"]


async def appears(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110 - made by another process
        await trio.sleep(0.01)


async def seconds(command: Callable[[Path, str, int, str], list[str]], frame: int, event_idx: bool) -> float:
    """That both took to send everything, by their own clocks; the slower one's."""
    cmdline = probe_cmdline(
        cpus=1, report=100, mem=4, net=1, net_mib=LOADS[frame], net_frame=frame, event_idx=int(event_idx)
    )
    with tempfile.TemporaryDirectory() as text, trio.fail_after(LIMIT_S):
        folder, names = Path(text), ("one.txt", "other.txt")
        async with trio.open_nursery() as nursery:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": False}
            for end, name in enumerate(names):
                run = partial(trio.run_process, command(folder, name, end, cmdline), deliver_cancel=kill, **quiet)
                nursery.start_soon(run)
                await appears(folder / "cable.sock")
            took = []
            for name in names:
                await appears(folder / name)
                while not (report := parse_report((folder / name).read_text())).counts.get("net_ms"):  # noqa: ASYNC110
                    await trio.sleep(0.1)
                if report.problems or report.errors:
                    raise SystemExit(f"{command.__name__}: the guest reports {report.problems}")
                took.append(report.counts["net_ms"] / 1000)
            nursery.cancel_scope.cancel()
    return max(took)


async def kill(running: trio.Process) -> None:
    running.kill()
    await trio.lowlevel.checkpoint()


async def run(runs: int) -> list[Figure]:
    kinds = [ours] if QEMU is None else [ours, qemus]
    figures = []
    for frame, mebibytes in LOADS.items():
        for event_idx in (False, True):
            took: dict[str, list[float]] = {kind.__name__: [] for kind in kinds}
            for _ in range(runs):
                for kind in kinds:
                    took[kind.__name__].append(await seconds(kind, frame, event_idx))
            load = f"{frame} bytes, {'EVENT_IDX' if event_idx else 'flags'}"
            for name, each in took.items():
                middle = median(each)
                note = f"{2 * (mebibytes << 20) / frame / middle:,.0f} frames/s, {min(each):.2f} to {max(each):.2f} s"
                figures.append(Figure(f"{name}: {load}", 2 * mebibytes / middle, "MiB/s", note=note))
            if QEMU is not None:
                ratio = median([theirs / mine for mine, theirs in zip(took["ours"], took["qemus"], strict=True)])
                figures.append(Figure(f"QEMU's time over ours: {load}", ratio, aim=1.0))
    return figures


def main() -> None:
    options = parser_for(__doc__, runs=3).parse_args()
    show("net", trio.run(run, options.runs), as_json=options.json)


if __name__ == "__main__":
    main()
