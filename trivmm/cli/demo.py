"""``trivmm demo``: a real guest moves live between two processes while it resets and re-activates its devices.

Two VMM processes serve their API on unix sockets. The probe guest (``trivmm.guest``) dirties memory, checks every page
for ever, and cycles virtio-rng and virtio-blk without rest. The demo sends it there and back, over unix and tcp in
turn, draws each migration while it happens, and closes with a table. What counts is what the guest itself says about
its memory and disk, and what the VMM's own counters say about activations.

A signal ends both processes and removes the folder with everything that they share, as the end does. Should the demo be
killed, the kernel tells them (``demo_child``).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from trivmm.cli.demo_child import child_command
from trivmm.cli.demo_view import DemoView, MoveRow
from trivmm.control.client import Client
from trivmm.errors import TrivmmError
from trivmm.guest import parse_report, probe_cmdline, probe_path
from trivmm.signals import Told
from trivmm.unwrapped import unwrapped_nursery

if TYPE_CHECKING:
    from trivmm.guest import ProbeReport

__all__ = ["DemoOptions", "run_demo"]

START_LIMIT_S: Final = 30.0  # a process's start, a guest's boot: seconds at the most, even on a busy machine
READY_LIMIT_S: Final = 120.0
MOVE_LIMIT_S: Final = 180.0
END_LIMIT_S: Final = 10.0  # twice the grace that a VMM gives itself
SIGNALLED: Final = 128  # and the signal's number: the exit code as a shell spells it
POLL_S: Final = 0.05
WATCH_S: Final = 0.1  # between two looks at a VM, at rest and while it moves alike: each costs it some milliseconds
LISTENING: Final = "0A"  # TCP_LISTEN as /proc/net/tcp spells it
ACCEPTS: Final = "00010000"  # __SO_ACCEPTCON as /proc/net/unix does: between bind and listen there is a file already


@attrs.frozen
class DemoOptions:
    moves: int = 6
    memory: str = "256M"
    cpus: int = 2
    rate: int = 500
    downtime_ms: int = 300
    settle_s: float = 3.0
    hypervisor: str = "auto"
    as_json: bool = False


class DemoError(TrivmmError):
    """The demo could not go on; the message says which step and what the processes last said."""


@attrs.define(eq=False)
class Host:
    """One VMM process and the client that talks to it."""

    name: str
    process: subprocess.Popen[bytes]
    client: Client
    log: Path

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return text.splitlines()[-1] if text else "it said nothing"


@asynccontextmanager
async def open_host(name: str, folder: Path, hypervisor: str) -> AsyncIterator[Host]:
    """A VMM process that stays after its VM has migrated away, so that it can receive it again."""
    api, log = folder / f"{name}.sock", folder / f"{name}.log"
    options = ["--api-socket", f"path={api}", "--hypervisor", hypervisor, "--stay-after-migration"]
    with log.open("wb") as out:
        # In this thread: it is the one whose end the kernel tells the child of. In a group of its own: Ctrl-C on a
        # terminal is for the demo, which ends them.
        process = subprocess.Popen(  # noqa: ASYNC220
            child_command(options), stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        )
    try:
        async with Client(str(api)) as client:
            host = Host(name, process, client, log)
            with trio.move_on_after(START_LIMIT_S) as scope:
                while process.poll() is None:
                    try:
                        await client.ping()
                        break
                    except (TrivmmError, OSError):
                        await trio.sleep(POLL_S)
            if scope.cancelled_caught or process.returncode is not None:
                raise DemoError(f"process {name} did not start: {host.last_words()}")
            yield host
    finally:
        process.terminate()
        with trio.move_on_after(END_LIMIT_S, shield=True):
            await _until_gone(process)
        if process.poll() is None:
            process.kill()
            with trio.move_on_after(END_LIMIT_S, shield=True):
                await _until_gone(process)


async def _until_gone(process: subprocess.Popen[bytes]) -> None:
    """Bounded by the caller."""
    if process.poll() is not None:
        return
    fd = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()  # bounded by the kernel: it has ended


@attrs.define(eq=False)
class Console:
    """The guest's serial file, read as it grows; both processes append to it in turn."""

    path: Path
    _at: int = 0
    _text: str = ""

    def report(self) -> ProbeReport:
        if not self.path.exists():
            return parse_report("")
        with self.path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        self._at += len(new)
        self._text += new.decode(errors="replace")
        return parse_report(self._text)


def _activations(counters: dict[str, dict[str, int]]) -> int:
    return sum(each.get("activations", 0) for each in counters.values())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _rate_of_activations(host: Host, seconds: float) -> float:
    """Watched as closely as a move is."""
    first, began = _activations(await host.client.counters()), trio.current_time()
    while True:
        await trio.sleep(WATCH_S)
        await host.client.migration_progress()
        last, ended = _activations(await host.client.counters()), trio.current_time()
        if ended - began >= seconds:
            return (last - first) / (ended - began)


async def _move(source: Host, target: Host, url: str, options: DemoOptions, view: DemoView, number: int) -> MoveRow:
    before = await _rate_of_activations(source, options.settle_s)
    row = MoveRow(number, source.name, target.name, url.split(":")[0], rate_before=before)
    problems: list[BaseException] = []
    done = trio.Event()

    async def receive() -> None:
        try:
            await target.client.receive_migration(url)
        except TrivmmError as error:
            problems.append(error)

    async def watch() -> None:
        """Progress and activations as they happen, until the move is over or the source stops answering."""
        first: tuple[int, float] | None = None
        while not done.is_set():
            try:
                progress = await source.client.migration_progress()
                counted = _activations(await source.client.counters())
            except TrivmmError:
                return
            now = trio.current_time()
            if progress is not None and progress.get("phase") == "PRECOPY":
                first = first or (counted, now)
                row.activations = counted - first[0]
                row.watched_s = now - first[1]
            if progress is not None:
                view.progress(row, progress)
            await trio.sleep(WATCH_S)

    with trio.move_on_after(MOVE_LIMIT_S) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(watch)
            try:
                with trio.move_on_after(START_LIMIT_S):
                    await _until(lambda: _listens(url))  # the receiver listens as soon as its request is served
                await source.client.send_migration(url, downtime_ms=options.downtime_ms)
                final = await source.client.migration_outcome()
                row.take(final)
                view.progress(row, final)
            except TrivmmError as error:
                problems.append(error)
                nursery.cancel_scope.cancel()
            done.set()
    if scope.cancelled_caught:
        problems.append(DemoError(f"move {number} took longer than {MOVE_LIMIT_S:g} s"))
    if problems:
        raise DemoError(f"move {number} ({source.name} to {target.name}): {problems[0]}")
    return row


def _listens(url: str) -> bool:
    kind, _, where = url.partition(":")
    rows = [line.split() for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    if kind == "unix":
        return any(row[3] == ACCEPTS and row[-1] == where for row in rows)
    port = int(where.rpartition(":")[2])
    return any(row[1].endswith(f":{port:04X}") and row[3] == LISTENING for row in rows)


async def _until(true: Callable[[], bool]) -> None:
    """Poll what only another process can tell. Bounded by the caller."""
    while not true():  # noqa: ASYNC110 - there is no event to wait for
        await trio.sleep(POLL_S)


async def run_demo(options: DemoOptions, told: Told) -> int:
    """Gives the exit code: 0 when every move completed and the guest found no page lost, 128 and its number after a
    signal (130 after Ctrl-C, 143 after SIGTERM)."""
    code: int | None = None
    try:
        async with unwrapped_nursery() as nursery:

            async def on_signal() -> None:
                await told.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(on_signal, name="signals")
            code = await _run(options)
            nursery.cancel_scope.cancel()
    except (TrivmmError, OSError):
        if told.number is None:
            raise
    if code is None:
        assert told.number is not None
        return SIGNALLED + told.number  # whatever failed comes of that
    return code


async def _run(options: DemoOptions) -> int:
    with tempfile.TemporaryDirectory(prefix="trivmm-demo-") as name:
        folder = Path(name)
        disk, serial = folder / "disk.img", folder / "serial.txt"
        with disk.open("wb") as file:
            file.truncate(16 << 20)
        async with (
            open_host("A", folder, options.hypervisor) as first,
            open_host("B", folder, options.hypervisor) as second,
        ):
            ping = await first.client.ping()
            backend = str(ping.get("hypervisor", options.hypervisor))
            cpus = 1 if backend == "soft" else options.cpus
            with DemoView(backend, options) as view:
                await first.client.create(_guest_config(options, cpus, disk, serial))
                await first.client.boot()
                console = Console(serial)
                with trio.move_on_after(READY_LIMIT_S) as scope:
                    await _until(lambda: console.report().ready)
                if scope.cancelled_caught:
                    raise DemoError(f"the probe guest did not get ready: {first.last_words()}")
                source, target = first, second
                for number in range(1, options.moves + 1):
                    url = f"unix:{folder}/move{number}.sock" if number % 2 else f"tcp:127.0.0.1:{_free_port()}"
                    row = await _move(source, target, url, options, view, number)
                    row.errors = console.report().errors
                    view.moved(row)
                    source, target = target, source
                await trio.sleep(options.settle_s)  # the guest checks all its pages where it ended up
                report = console.report()
            return _close(view, report, options)


def _guest_config(options: DemoOptions, cpus: int, disk: Path, serial: Path) -> dict[str, Any]:
    from trivmm.values import parse_size

    cmdline = probe_cmdline(cpus=cpus, rate=options.rate, cycle="rng,blk", window=1, race=1 if cpus > 1 else 0)
    return {
        "cpus": {"boot_vcpus": cpus, "max_vcpus": cpus},
        "memory": {"size": parse_size("memory", options.memory)},
        "payload": {"kernel": str(probe_path()), "cmdline": cmdline},
        "disks": [{"path": str(disk)}],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "File", "file": str(serial)},
        "console": {"mode": "Off"},
    }


def _close(view: DemoView, report: ProbeReport, options: DemoOptions) -> int:
    summary = view.summary(report)
    if options.as_json:
        print(json.dumps(summary, indent=2))
    else:
        view.print_table(summary)
    return 0 if summary["ok"] else 1
