"""Whole live moves of a dirtying guest between two processes: ours against QEMU's, same guest, same RAM, same limit.

Both sides run the probe guest from the same ELF with the same command line, all of its RAM touched, with no devices
in use, and move it over a unix socket or TCP with a downtime limit of 300 ms. The time is from the command to the guest
running on the destination; a downtime is what each VMM reports about itself. The two take turns; the result is the
median of the ratios of neighbours (aim 1.2: QEMU takes a fifth longer).

The destination's RAM is new to its process, and what memory the host gives it decides. So as much as it needs is
touched here first, and given back the moment the move begins: in pages of 4 KiB (``small``), or in huge ones
(``huge``). Otherwise a virtual machine that returns its free memory to its own host measures that host, 300 MiB/s
whoever moves; ``cold`` leaves it so.

    python benchmarks/moves_vs_qemu.py [--mib 1024 2048 4096] [--held small huge] [--over unix tcp] [--rate 300]
                                       [--runs 5] [--beside PYTHON] [--json]

``--beside`` is the interpreter of another build of TriVMM, which takes its turns too.
"""

from __future__ import annotations

import json
import mmap
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from results import Figure, median, parser_for, show

from trivmm.control.client import Client
from trivmm.guest import parse_report, probe_cmdline, probe_path

QEMU = "qemu-system-x86_64"
LIMIT_MS = 300
PATIENCE_S = 110
MIB = 1 << 20
AIM = 1.2


class Held:
    """Free host memory, backed and held until the move begins: in small pages, in huge ones, or (``cold``) none."""

    def __init__(self, mib: int, how: str) -> None:
        self.memory = None
        if how == "cold":
            return
        self.memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE if how == "huge" else mmap.MADV_NOHUGEPAGE)
        for page in range(0, mib * MIB, mmap.PAGESIZE):
            self.memory[page] = 1

    def release(self) -> None:
        if self.memory is not None:
            self.memory.close()


def move_url(folder: Path, over: str) -> str:
    if over == "unix":
        return f"unix:{folder}/move.sock"
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp:127.0.0.1:{free.getsockname()[1]}"


@asynccontextmanager
async def process(command: list[str]) -> AsyncIterator[trio.Process]:
    """A process for the length of the block; killed and reaped at its end."""
    async with trio.open_nursery() as nursery:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": False, "deliver_cancel": _kill}
        running = await nursery.start(partial(trio.run_process, command, **quiet))
        yield running
        nursery.cancel_scope.cancel()


async def _kill(running: trio.Process) -> None:
    running.kill()
    await trio.lowlevel.checkpoint()


async def appears(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110 - made by another process
        await trio.sleep(0.01)


async def listens(url: str) -> None:
    """Until somebody listens there, without a connection to it."""
    kind, _, where = url.partition(":")
    if kind == "unix":
        return await appears(Path(where))
    port = f":{int(where.rpartition(':')[2]):04X} 00000000:0000 0A "
    while port not in Path("/proc/net/tcp").read_text():  # noqa: ASYNC110 - made by another process
        await trio.sleep(0.01)


async def guest_ready(serial: Path) -> None:
    """Ready, and a report after that: every page was written and the workload runs."""
    while not serial.exists() or parse_report(serial.read_text(errors="replace")).reports < 2:  # noqa: ASYNC110
        await trio.sleep(0.05)


def guest_is_whole(serial: Path) -> None:
    report = parse_report(serial.read_text(errors="replace"))
    if report.errors or report.problems:
        raise SystemExit(f"{serial}: the guest reports {report.errors} errors: {report.problems}")


async def ours(python: str, folder: Path, mib: int, cmdline: str, url: str, held: Held) -> tuple[float, float]:
    """Seconds of the move, and its downtime in milliseconds."""
    a, b, serial = folder / "a.sock", folder / "b.sock", folder / "ours.txt"
    command = [python, "-P", "-m", "trivmm", "--api-socket"]
    guest = [f"path={a}", "--kernel", str(probe_path()), "--cmdline", cmdline, "--memory", f"size={mib}M"]
    guest += ["--cpus", "boot=1", "--serial", f"file={serial}", "--console", "off", "--hypervisor", "kvm"]
    guest.append("--stay-after-migration")
    async with process([*command, *guest]), process([*command, f"path={b}", "--hypervisor", "kvm"]):
        await appears(a)
        await appears(b)
        await guest_ready(serial)
        async with Client(str(a)) as source, Client(str(b)) as target, trio.open_nursery() as nursery:
            arrived = trio.Event()

            async def receive() -> None:
                await target.receive_migration(url)
                arrived.set()

            nursery.start_soon(receive)
            await listens(url)
            held.release()
            began = time.perf_counter()
            nursery.start_soon(partial(source.send_migration, url, downtime_ms=LIMIT_MS))
            await arrived.wait()
            took = time.perf_counter() - began
        async with Client(str(a)) as source:
            progress = await source.migration_outcome()
        await trio.sleep(0.5)
        guest_is_whole(serial)
    return took, sum((progress.get("downtime") or {}).values())


class Qmp:
    """QEMU's monitor: commands, and events as they come."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream, self.buffer, self.events = stream, b"", list[str]()

    @classmethod
    async def open(cls, path: Path) -> Qmp:
        await appears(path)
        while True:
            try:
                monitor = cls(await trio.open_unix_socket(path))
                break
            except ConnectionRefusedError:
                await trio.sleep(0.01)
        await monitor.message()
        await monitor.call("qmp_capabilities")
        return monitor

    async def message(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            self.buffer += await self.stream.receive_some(65536)
        line, self.buffer = self.buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        if "event" in found:
            self.events.append(found["event"])
        return found

    async def call(self, command: str, **arguments: object) -> Any:
        await self.stream.send_all(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = await self.message()
            if "error" in answer:
                raise SystemExit(f"QEMU: {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    async def event(self, name: str) -> None:
        while name not in self.events:
            await self.message()
        self.events.remove(name)


async def qemu(folder: Path, mib: int, cmdline: str, url: str, held: Held) -> tuple[float, float]:
    """As :func:`ours`."""
    command = [
        QEMU,
        "-accel",
        "kvm",
        "-cpu",
        "host,-arch-capabilities",
        "-m",
        f"{mib}M",
        "-nodefaults",
        "-display",
        "none",
    ]
    command += ["-kernel", str(probe_path()), "-append", cmdline]
    serial = folder / "qemu.txt"

    def side(name: str) -> list[str]:
        return ["-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"]

    first = [*command, *side("qa"), "-serial", f"file:{serial}"]
    second = [*command, *side("qb"), "-serial", f"file:{folder}/qemu-b.txt", "-incoming", url]
    async with process(first), process(second):
        source, target = await Qmp.open(folder / "qa.qmp"), await Qmp.open(folder / "qb.qmp")
        await guest_ready(serial)
        await source.call("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": LIMIT_MS})
        await listens(url)
        held.release()
        began = time.perf_counter()
        await source.call("migrate", uri=url)
        await target.event("RESUME")
        took = time.perf_counter() - began
        while (found := await source.call("query-migrate"))["status"] != "completed":  # noqa: ASYNC110
            await trio.sleep(0.01)
    return took, float(found["downtime"])


async def once(which: Any, mib: int, cmdline: str, over: str, how: str) -> tuple[float, float]:
    held = Held(mib + mib // 4, how)
    with tempfile.TemporaryDirectory() as folder, trio.fail_after(PATIENCE_S):
        url = move_url(Path(folder), over)
        took: tuple[float, float] = await which(Path(folder), mib, cmdline, url, held)
        return took


async def compare(contenders: dict[str, Any], mib: int, over: str, how: str, options: Namespace) -> list[Figure]:
    cmdline = probe_cmdline(cpus=1, rate=options.rate, report=200)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    what = f"{mib} MiB, {over}, {how}"
    for number in range(options.runs):
        for name in contenders if number % 2 == 0 else reversed(contenders):  # none is always the last
            found[name].append(await once(contenders[name], mib, cmdline, over, how))
        if not options.json:
            turn = "  ".join(f"{name} {each[-1][0]:.3f} s ({each[-1][1]:.0f} ms)" for name, each in found.items())
            print(f"{what}: {turn}", file=sys.stderr, flush=True)
    figures = []
    for name, times in found.items():
        if name != "ours":
            ratios = [their[0] / my[0] for their, my in zip(times, found["ours"], strict=True)]
            figures.append(Figure(f"{what}: {name} / ours", median(ratios), aim=AIM if name == "QEMU" else None))
    for name, times in found.items():
        figures.append(Figure(f"{what}, {name}: whole move", median([each[0] for each in times]), "s"))
        figures.append(Figure(f"{what}, {name}: downtime", median([each[1] for each in times]), "ms"))
    return figures


async def run(options: Namespace) -> list[Figure]:
    contenders: dict[str, Any] = {"ours": partial(ours, sys.executable)}
    if options.beside:
        contenders["beside"] = partial(ours, options.beside)
    if shutil.which(QEMU) is None:
        print(f"{QEMU} is not installed: its half is skipped", file=sys.stderr)
    else:
        contenders["QEMU"] = qemu
    return [
        figure
        for mib in options.mib
        for over in options.over
        for how in options.held
        for figure in await compare(contenders, mib, over, how, options)
    ]


def main() -> None:
    parser = parser_for(__doc__, runs=5)
    parser.add_argument("--mib", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--over", nargs="+", choices=["unix", "tcp"], default=["unix", "tcp"])
    parser.add_argument("--held", nargs="+", choices=["small", "huge", "cold"], default=["small", "huge"])
    parser.add_argument("--rate", type=int, default=300, help="pages a second that the guest dirties")
    parser.add_argument("--beside", metavar="PYTHON", help="the interpreter of another build of TriVMM")
    options = parser.parse_args()
    figures = trio.run(run, options)
    show("whole moves against QEMU", figures, as_json=options.json)


if __name__ == "__main__":
    main()
