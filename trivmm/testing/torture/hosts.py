"""VMM processes and the guest in them: started, asked, listened to, and gone without a trace.

Every process has a folder of its own as its working directory, and the guest's serial port is the relative path
``serial.txt``: the configuration travels, so each process writes what its copy of the guest says into its own folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trivmm.control.client import Client
from trivmm.deadlines import Deadlines
from trivmm.errors import TrivmmError
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.torture.judge import Copy

__all__ = ["Host", "HostError", "files_in", "guest_config", "open_host", "until"]

START_LIMIT_S: Final = 30.0
END_LIMIT_S: Final = 15.0
ASK_LIMIT_S: Final = 5.0  # a process that is not stopped answers within milliseconds, on a quiet host
POLL_S: Final = 0.02
REPORT_MS: Final = 50  # the guest's period
TAIL: Final = 1 << 16  # of a serial file: some hundred reports
SERIAL: Final = "serial.txt"
IMAGE_BYTES: Final = 4 << 20
MODULES: Final = {"scripted": "trivmm.testing.torture.scripted"}
FILES: Final = {"log", "events", SERIAL}
SOCKETS: Final = {"api.sock", "api.sock.lock"}
OF_A_VM: Final = ("anon_inode:kvm-vm", "anon_inode:kvm-vcpu", "/memfd:trivmm-ram")


class HostError(TrivmmError):
    """A process that does not do what every trial needs of it; its last words are in the text."""


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.is_dir()}


async def until(true: Callable[[], bool], limit_s: float) -> bool:
    """Poll what only another process can tell. False: not in time."""
    with trio.move_on_after(limit_s):
        while not true():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(POLL_S)
        return True
    return true()


@attrs.define(eq=False)
class Host:
    """One process. ``stopped`` while it is under SIGSTOP."""

    name: str
    folder: Path
    process: trio.Process
    client: Client
    stopped: bool = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def serial(self) -> Path:
        return self.folder / SERIAL

    def said(self) -> int:
        """Bytes that the guest wrote here."""
        try:
            return self.serial.stat().st_size
        except OSError:
            return 0

    def report(self) -> ProbeReport:
        """The latest that the guest said here; ``reports`` and ``problems`` are those at the file's end."""
        try:
            with self.serial.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                return parse_report(file.read().decode(errors="replace"))
        except OSError:
            return ProbeReport()

    def forget_serial(self) -> None:
        """Before it receives a VM: what an earlier one said is of the past."""
        with contextlib.suppress(OSError):
            self.serial.unlink()

    def signal(self, number: signal.Signals) -> None:
        """Without effect on a process that has ended."""
        if self.alive:
            self.process.send_signal(number)
            if number in (signal.SIGSTOP, signal.SIGCONT):
                self.stopped = number is signal.SIGSTOP

    async def answers(self) -> None:
        """Wait until it serves, or has ended. Bounded by the caller."""
        while self.alive:
            try:
                await self.client.ping()
                return
            except TrivmmError:
                await trio.sleep(POLL_S)

    async def ended(self, limit_s: float) -> bool:
        with trio.move_on_after(limit_s):
            await self.process.wait()
        return not self.alive

    async def copy(self) -> Copy:
        """What vm.info says; ``speaks`` is for the caller to find out."""
        if not self.alive:
            return Copy(alive=False)
        try:
            with trio.fail_after(ASK_LIMIT_S):
                info = await self.client.info()
        except (TrivmmError, trio.TooSlowError):
            return Copy(alive=self.alive)
        state = info["state"]
        return Copy(True, None if state == "Shutdown" else state, bool(info.get("in_doubt")))

    async def is_empty(self, limit_s: float) -> bool:
        """Whether it comes to have no VM in time. One whose VM has moved away ends it after it has told the verdict."""
        with trio.move_on_after(limit_s):
            while True:
                copy = await self.copy()
                if copy.alive and copy.state is None:
                    return True
                if not copy.alive:
                    return False
                await trio.sleep(POLL_S)
        return False

    def end(self) -> str:
        """How it ended, for a sentence: also whether somebody told it to."""
        code = self.process.returncode
        if code is None:
            return ""
        log = (self.folder / "log").read_text(errors="replace")
        told = re.findall(r"(SIG[A-Z]+): ending", log)
        how = f" by {signal.Signals(-code).name}" if code < 0 else f" with code {code}"
        return f"{how} after {told[-1]}" if told else how

    def last_words(self) -> str:
        log = self.folder / "log"
        text = log.read_text(errors="replace").strip() if log.exists() else ""
        return text.splitlines()[-1] if text else "it said nothing"

    def events(self) -> list[dict[str, Any]]:
        """What its event monitor has told so far."""
        path = self.folder / "events"
        text = path.read_text(errors="replace") if path.exists() else ""
        found: list[dict[str, Any]] = []
        decoder, at = json.JSONDecoder(), 0
        while (at := text.find("{", at)) >= 0:
            try:
                event, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:  # still being written
                break
            found.append(event)
        return found

    def strangers(self, gone: bool) -> list[str]:
        """Files that it should not have made, or, when it has ``gone`` in good order, left."""
        return sorted(files_in(self.folder) - (FILES if gone else FILES | SOCKETS))

    def vm_descriptors(self) -> list[str]:
        """Open descriptors that only a process with a VM has."""
        found = []
        try:
            for fd in os.listdir(f"/proc/{self.process.pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{self.process.pid}/fd/{fd}")
                    found += [kind for kind in OF_A_VM if target.startswith(kind)]
        except OSError:  # it has ended
            pass
        return found


@asynccontextmanager
async def open_host(name: str, folder: Path, hypervisor: str, limits: Deadlines) -> AsyncIterator[Host]:
    """A process that serves its API and nothing else yet. Killed at the end of the block, if it is still there.

    :raises HostError: it does not start."""
    os.mkdir(folder)
    command = [sys.executable, "-P", "-m", MODULES.get(hypervisor, "trivmm")]
    command += ["--api-socket", "path=api.sock", "--event-monitor", "path=events", "--stay-after-migration", "-v"]
    command += ["--deadlines", ",".join(f"{key}={value:g}" for key, value in attrs.asdict(limits).items())]
    if hypervisor not in MODULES:
        command += ["--hypervisor", hypervisor]
    with (folder / "log").open("wb") as out:
        process = await trio.lowlevel.open_process(command, stdin=-3, stdout=out, stderr=out, cwd=folder)
    try:
        async with Client(str(folder / "api.sock")) as client:
            host = Host(name, folder, process, client)
            with trio.move_on_after(START_LIMIT_S) as scope:
                await host.answers()
            if scope.cancelled_caught or not host.alive:
                raise HostError(f"{name} did not start: {host.last_words()}")
            yield host
    finally:
        if process.poll() is None:
            process.kill()
        with trio.move_on_after(END_LIMIT_S, shield=True):
            await process.wait()


def guest_config(folder: Path, hypervisor: str, disk: bool) -> dict[str, Any]:
    """The body of vm.create: small, so that a move is short; it dirties and checks its memory without rest."""
    image = folder / "disk.img"
    if disk:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
    if hypervisor == "scripted":
        payload, size = {"kernel": "none is looked for"}, 16 << 20
    else:
        cycle = "rng,blk" if disk else "rng"
        cmdline = probe_cmdline(cpus=1, mem=16, rate=2000, cycle=cycle, report=REPORT_MS, beat=REPORT_MS)
        payload, size = {"kernel": str(probe_path()), "cmdline": cmdline}, 48 << 20
    return {
        "payload": payload,
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": size},
        **({"disks": [{"path": str(image)}]} if disk else {}),
        "serial": {"mode": "File", "file": SERIAL},
        "console": {"mode": "Off"},
    }
