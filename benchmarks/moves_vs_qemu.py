"""Whole live moves of a dirtying guest between two processes: ours against QEMU's, same guest, same RAM, same limit.

Both sides run the probe guest from the same ELF with the same command line, all of its RAM touched, with no devices
in use, and move it over a unix socket with a downtime limit of 300 ms. The time is from the command to the guest
running on the destination; a downtime is what each VMM reports about itself. The two take turns; the result is the
median of the ratios of neighbours (aim 1.5: a move of ours takes two thirds of the time).

The destination's RAM is new to its process and backed by the host: as much memory as it needs is touched here first,
and given back the moment the move begins. Otherwise a virtual machine that returns its free memory to its own host
measures that host, 300 MiB/s whoever moves. ``--cold`` leaves it so.

    python benchmarks/moves_vs_qemu.py [--mib 512 1024] [--rate 300] [--runs 3] [--cold] [--json]
"""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
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


class Held:
    """Free host memory, backed and held until the move begins; with ``mib`` 0 nothing is."""

    def __init__(self, mib: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self.memory = mmap.mmap(-1, mib * MIB, flags=flags) if mib else None

    def release(self) -> None:
        if self.memory is not None:
            self.memory.close()


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


async def guest_ready(serial: Path) -> None:
    """Ready, and a report after that: every page was written and the workload runs."""
    while not serial.exists() or parse_report(serial.read_text(errors="replace")).reports < 2:  # noqa: ASYNC110
        await trio.sleep(0.05)


def guest_is_whole(serial: Path) -> None:
    report = parse_report(serial.read_text(errors="replace"))
    if report.errors or report.problems:
        raise SystemExit(f"{serial}: the guest reports {report.errors} errors: {report.problems}")


async def ours(folder: Path, mib: int, cmdline: str, held: Held) -> tuple[float, float]:
    """Seconds of the move, and its downtime in milliseconds."""
    a, b, serial = folder / "a.sock", folder / "b.sock", folder / "ours.txt"
    command = [sys.executable, "-P", "-m", "trivmm", "--api-socket"]
    guest = [f"path={a}", "--kernel", str(probe_path()), "--cmdline", cmdline, "--memory", f"size={mib}M"]
    guest += ["--cpus", "boot=1", "--serial", f"file={serial}", "--console", "off", "--hypervisor", "kvm"]
    guest.append("--stay-after-migration")
    url = f"unix:{folder}/move.sock"
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
            await appears(folder / "move.sock")
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


async def qemu(folder: Path, mib: int, cmdline: str, held: Held) -> tuple[float, float]:
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
    serial, move = folder / "qemu.txt", f"unix:{folder}/qemu-move.sock"

    def side(name: str) -> list[str]:
        return ["-qmp", f"unix:{folder}/{name}.qmp,server=on,wait=off"]

    first = [*command, *side("qa"), "-serial", f"file:{serial}"]
    second = [*command, *side("qb"), "-serial", f"file:{folder}/qemu-b.txt", "-incoming", move]
    async with process(first), process(second):
        source, target = await Qmp.open(folder / "qa.qmp"), await Qmp.open(folder / "qb.qmp")
        await guest_ready(serial)
        await source.call("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": LIMIT_MS})
        held.release()
        began = time.perf_counter()
        await source.call("migrate", uri=move)
        await target.event("RESUME")
        took = time.perf_counter() - began
        while (found := await source.call("query-migrate"))["status"] != "completed":  # noqa: ASYNC110
            await trio.sleep(0.01)
    return took, float(found["downtime"])


async def once(which: Any, mib: int, cmdline: str, *, cold: bool) -> tuple[float, float]:
    held = Held(0 if cold else mib + mib // 4)
    with tempfile.TemporaryDirectory() as folder, trio.fail_after(PATIENCE_S):
        took: tuple[float, float] = await which(Path(folder), mib, cmdline, held)
        return took


async def run(sizes: list[int], rate: int, runs: int, *, cold: bool, quiet: bool) -> list[Figure]:
    figures = []
    have_qemu = shutil.which(QEMU) is not None
    if not have_qemu:
        print(f"{QEMU} is not installed: its half is skipped", file=sys.stderr)
    for mib in sizes:
        cmdline = probe_cmdline(cpus=1, rate=rate, report=200)
        mine: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        for number in range(runs):
            turns = [(ours, mine), (qemu, theirs)] if have_qemu else [(ours, mine)]
            for which, found in turns if number % 2 == 0 else reversed(turns):  # neither is always the second
                found.append(await once(which, mib, cmdline, cold=cold))
            if not quiet:
                print(f"{mib} MiB: ours {mine[-1]}", f"QEMU {theirs[-1]}" if theirs else "", file=sys.stderr)
        if theirs:
            ratios = [their[0] / my[0] for their, my in zip(theirs, mine, strict=True)]
            figures.append(Figure(f"{mib} MiB: QEMU's time / ours", median(ratios), aim=1.5))
        for name, found in (("ours", mine), ("QEMU", theirs)):
            if found:
                figures.append(Figure(f"{mib} MiB {name}: whole move", median([each[0] for each in found]), "s"))
                figures.append(Figure(f"{mib} MiB {name}: downtime", median([each[1] for each in found]), "ms"))
    return figures


def main() -> None:
    parser = parser_for(__doc__, runs=3)
    parser.add_argument("--mib", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rate", type=int, default=300, help="pages a second that the guest dirties")
    parser.add_argument("--cold", action="store_true", help="leave free host memory as it is")
    options = parser.parse_args()
    figures = trio.run(lambda: run(options.mib, options.rate, options.runs, cold=options.cold, quiet=options.json))
    show("whole moves against QEMU", figures, as_json=options.json)


if __name__ == "__main__":
    main()
