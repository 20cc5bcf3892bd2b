"""virtio-blk under load: requests and bytes a second of one guest, on TriVMM's device and on QEMU's, side by side.

The probe guest keeps its queue full of random reads or writes and looks at the used ring without interrupts, so what is
measured is the device. Each image lies on tmpfs, and in a file of the folder for temporary files (--disk): with the
page cache, and past it. QEMU has a thread of its own for the disk, and the faster of its two ways of I/O.

    python benchmarks/disks.py [--runs 5] [--disk FOLDER] [--seconds 2] [--json]
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
from results import Figure, median, parser_for, show

from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path

MEMORY_MIB: Final = 64
IMAGE: Final = 64 << 20
BLOCK: Final = 4096
WAIT_S: Final = 60.0
QEMU: Final = shutil.which("qemu-system-x86_64")


@attrs.frozen
class Load:
    name: str
    kib: int
    write: bool
    direct: bool = False
    depth: int = 16

    def cmdline(self) -> str:
        load = {"load_kib": self.kib, "load_write": int(self.write), "load_depth": self.depth}
        return probe_cmdline(cpus=2, report=200, rate=0, mem=2, cycle="load", **load)


CACHED: Final = (
    Load("4 KiB reads", 4, False),
    Load("4 KiB writes", 4, True),
    Load("4 KiB reads, one at a time", 4, False, depth=1),
    Load("64 KiB reads", 64, False),
)
DIRECT: Final = (Load("4 KiB reads", 4, False, direct=True), Load("4 KiB writes", 4, True, direct=True))


def make_image(path: Path) -> None:
    with path.open("wb") as file:
        for number in range(IMAGE // BLOCK):
            file.write(struct.pack("<Q", number).ljust(BLOCK, b"\xa5"))
        os.fsync(file.fileno())


def ours(image: Path, load: Load, serial: Path, more: str = "") -> list[str]:
    command = [sys.executable, "-P", "-m", "trivmm", "--kernel", str(probe_path()), "--cmdline", load.cmdline()]
    command += ["--memory", f"size={MEMORY_MIB}M", "--cpus", "boot=2", "--serial", f"file={serial}", "--console", "off"]
    direct = ",direct=on" if load.direct else ""
    return [*command, "--hypervisor", "kvm", "--disk", f"path={image},image_type=raw{direct}{more}"]


def theirs(image: Path, load: Load, serial: Path, aio: str) -> list[str]:
    cache = "none" if load.direct else "writeback"
    command = [str(QEMU), "-machine", "pc,accel=kvm,acpi=off", "-m", str(MEMORY_MIB), "-smp", "2", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-serial", f"file:{serial}", "-kernel", str(probe_path())]
    command += ["-append", load.cmdline(), "-object", "iothread,id=io"]
    command += ["-drive", f"file={image},if=none,id=d,format=raw,cache={cache},aio={aio}"]
    return [*command, "-device", "virtio-blk-pci,drive=d,disable-legacy=on,num-queues=1,iothread=io"]


def report_of(serial: Path) -> ProbeReport:
    return parse_report(serial.read_text(errors="replace")) if serial.exists() else ProbeReport()


def measure(command: Sequence[str], serial: Path, seconds: float) -> float:
    """Requests a second of the guest's own clock."""
    serial.unlink(missing_ok=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        limit = time.monotonic() + WAIT_S + seconds
        first: ProbeReport | None = None
        while True:
            report = report_of(serial)
            if report.problems:
                raise SystemExit(f"the guest says {report.problems}")
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"{command[0]} does not get anywhere: {process.communicate()[1]!r}")
            if report.counts.get("load_us", 0) and first is None and report.reports > 1:
                first = report
            if first is not None and report.counts["load_us"] - first.counts["load_us"] >= seconds * 1e6:
                ios = report.counts["load_ios"] - first.counts["load_ios"]
                return ios * 1e6 / (report.counts["load_us"] - first.counts["load_us"])
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()


def compare(place: str, image: Path, loads: Sequence[Load], runs: int, seconds: float) -> list[Figure]:
    figures = []
    serial = image.with_suffix(".txt")
    for load in loads:
        rates: dict[str, list[float]] = {"ours": [], "threads": [], "io_uring": []}
        commands = {"ours": ours(image, load, serial)}
        if load.direct:
            rates["no ring"] = []
            commands["no ring"] = ours(image, load, serial, ",_disable_io_uring=on")
        if QEMU is not None:
            commands |= {aio: theirs(image, load, serial, aio) for aio in ("threads", "io_uring")}
        for _ in range(runs):
            for who, command in commands.items():
                rates[who].append(measure(command, serial, seconds))
        mine, name = median(rates["ours"]), f"{load.name}, {place}{', direct' if load.direct else ''}"
        note = f"{mine * load.kib / 1024:,.0f} MiB/s"
        if load.direct:
            note += f"; by the thread alone {median(rates['no ring']) / 1e3:.1f}"
        figures.append(Figure(f"{name}: ours", mine / 1e3, "thousand/s", note=note))
        if QEMU is not None:
            best = max(("threads", "io_uring"), key=lambda aio: median(rates[aio]))
            other = median(rates[best])
            note = f"{other * load.kib / 1024:,.0f} MiB/s; aio={best}"
            figures.append(Figure(f"{name}: QEMU's", other / 1e3, "thousand/s", note=note))
            ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[best], strict=True)]
            figures.append(Figure(f"{name}: ours / QEMU's", median(ratios), aim=1.0))
    return figures


def run(runs: int, disk: Path, seconds: float) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, tempfile.TemporaryDirectory(dir=disk) as medium:
        for place, folder, loads in (("tmpfs", memory, CACHED), ("a file", medium, (*CACHED[:2], *DIRECT))):
            image = Path(folder) / "disk.img"
            make_image(image)
            figures += compare(place, image, loads, runs, seconds)
    return figures


def main() -> None:
    parser = parser_for(__doc__, runs=5)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a folder on a disk")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    options = parser.parse_args()
    show("disks", run(options.runs, options.disk, options.seconds), as_json=options.json)


if __name__ == "__main__":
    main()
