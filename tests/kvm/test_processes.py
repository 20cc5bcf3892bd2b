"""Whole VMM processes: killed, silent, cancelled and signalled in the middle of a migration.

Whatever happens, exactly one copy of the guest runs, within its deadline, and the next migration works.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trivmm.control.client import ApiError, Client, MigrationFailed
from trivmm.errors import TrivmmError
from trivmm.guest import parse_report, probe_cmdline, probe_path

pytestmark = pytest.mark.kvm

LIMIT_S = 120
NEVER_MS = 1  # a downtime that precopy never gets down to: the migration lasts until something happens to it


@attrs.define(eq=False)
class Host:
    process: subprocess.Popen[bytes]
    client: Client
    socket: Path

    def running(self) -> bool:
        return self.process.poll() is None

    async def ended(self) -> int:
        with trio.fail_after(30):
            return await trio.to_thread.run_sync(self.process.wait, 30)


@contextmanager
def vmm_process(api: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "trivmm", "--api-socket", f"path={api}", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()


@asynccontextmanager
async def host(folder: Path, name: str, *options: str) -> AsyncIterator[Host]:
    api = folder / f"{name}.sock"
    with vmm_process(api, *options) as process:
        async with Client(str(api)) as client:
            with trio.fail_after(30):
                while True:
                    try:
                        await client.ping()
                        break
                    except TrivmmError:
                        assert process.poll() is None, process.stderr
                        await trio.sleep(0.02)
            yield Host(process, client, api)


def guest(folder: Path, **options: object) -> dict[str, Any]:
    disk = folder / "disk.img"
    if not disk.exists():
        disk.write_bytes(bytes(4 << 20))
    cmdline = probe_cmdline(cpus=1, mem=32, rate=5000, cycle="rng,blk", report=100, **options)
    return {
        "payload": {"kernel": str(probe_path()), "cmdline": cmdline},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 64 << 20},
        "disks": [{"path": str(disk)}],
        "serial": {"mode": "File", "file": str(folder / "serial.txt")},
        "console": {"mode": "Off"},
    }


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not true():  # noqa: ASYNC110 - another process's doing: nothing to wait on
            await trio.sleep(0.02)


async def booted(folder: Path, source: Host) -> None:
    await source.client.create(guest(folder))
    await source.client.boot()
    await until(lambda: "PROBE ready" in console(folder))


def console(folder: Path) -> str:
    path = folder / "serial.txt"
    return path.read_text(errors="replace") if path.exists() else ""


async def alive(folder: Path) -> None:
    """The guest goes on: it checks memory and activates its devices, and has found nothing wrong."""
    before = parse_report(console(folder))
    await until(lambda: parse_report(console(folder)).reports >= before.reports + 3)
    after = parse_report(console(folder))
    assert after.checked > before.checked
    assert after.rng_act > before.rng_act
    assert after.errors == 0
    assert not after.problems


def url_of(kind: str, folder: Path, number: int = 0) -> str:
    if kind == "unix":
        return f"unix:{folder}/move{number}.sock"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp:127.0.0.1:{probe.getsockname()[1]}"


async def listening(url: str) -> None:
    kind, _, where = url.partition(":")
    if kind == "unix":
        await until(Path(where).exists)
        return
    port = f":{int(where.rpartition(':')[2]):04X}"
    await until(lambda: any(port in line and " 0A " in line for line in Path("/proc/net/tcp").read_text().splitlines()))


async def phase(source: Host, wanted: str) -> None:
    with trio.fail_after(60):
        while True:
            progress = await source.client.migration_progress()
            if progress is not None and progress["phase"] == wanted and progress["round"] >= 2:
                return
            await trio.sleep(0.01)


@attrs.define(eq=False)
class Attempt:
    """A migration in progress: what either side's call came to."""

    sent: Exception | None = None
    received: Exception | None = None
    ended: int = 0


@asynccontextmanager
async def endless(source: Host, target: Host, url: str) -> AsyncIterator[Attempt]:
    """A migration that does not end by itself; the block runs while it is in precopy, and waits for both verdicts."""
    attempt = Attempt()

    async def receive() -> None:
        try:
            await target.client.receive_migration(url)
        except TrivmmError as error:
            attempt.received = error

    async def send() -> None:
        try:
            await source.client.send_migration(url, downtime_ms=NEVER_MS)
            await source.client.migration_outcome()
        except TrivmmError as error:
            attempt.sent = error

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await listening(url)
            nursery.start_soon(send)
            await phase(source, "PRECOPY")
            yield attempt


async def moves(source: Host, target: Host, url: str) -> None:
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.client.receive_migration, url)
            await listening(url)
            await source.client.send_migration(url, downtime_ms=2000)
            await source.client.migration_outcome()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_killed_source(tmp_path: Path, kind: str) -> None:
    async with host(tmp_path, "a") as source, host(tmp_path, "b") as target:
        await booted(tmp_path, source)
        async with endless(source, target, url_of(kind, tmp_path)) as attempt:
            source.process.send_signal(signal.SIGKILL)
        assert isinstance(attempt.received, ApiError)
        with pytest.raises(ApiError, match="not created"):
            await target.client.info()
        async with host(tmp_path, "c") as fresh:  # the killed one's image lock went with it
            await booted(tmp_path, fresh)
            await moves(fresh, target, url_of(kind, tmp_path, 1))
            await alive(tmp_path)
            assert (await target.client.info())["state"] == "Running"
            assert await fresh.ended() == 0


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_killed_destination(tmp_path: Path, kind: str) -> None:
    async with host(tmp_path, "a") as source:
        await booted(tmp_path, source)
        async with host(tmp_path, "b") as target:
            async with endless(source, target, url_of(kind, tmp_path)) as attempt:
                target.process.send_signal(signal.SIGKILL)
            assert isinstance(attempt.sent, MigrationFailed)
        assert (await source.client.info())["state"] == "Running"
        await alive(tmp_path)
        async with host(tmp_path, "c") as next_target:
            await moves(source, next_target, url_of(kind, tmp_path, 1))
            await alive(tmp_path)
            assert await source.ended() == 0


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_cancelled_migration(tmp_path: Path, kind: str) -> None:
    async with host(tmp_path, "a") as source, host(tmp_path, "b") as target:
        await booted(tmp_path, source)
        for number in range(2):
            async with endless(source, target, url_of(kind, tmp_path, number)) as attempt:
                with pytest.raises(ApiError, match="migrating"):
                    await source.client.pause()
                await source.client.cancel_migration()
            assert "cancel" in str(attempt.sent)
            assert attempt.received is not None
            assert (await source.client.info())["state"] == "Running"
        await alive(tmp_path)
        await moves(source, target, url_of(kind, tmp_path, 3))
        await alive(tmp_path)


async def test_a_silent_peer(tmp_path: Path) -> None:
    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen(1)
        async with host(tmp_path, "a", "--deadlines", "handshake=1,stall=1") as source:
            await booted(tmp_path, source)
            with trio.fail_after(30):
                await source.client.send_migration(f"unix:{path}")
                with pytest.raises(MigrationFailed, match="handshake"):
                    await source.client.migration_outcome()
            assert (await source.client.info())["state"] == "Running"
            await alive(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals, code: int) -> None:
    async with host(tmp_path, "a") as source:
        await booted(tmp_path, source)
        source.process.send_signal(number)
        assert await source.ended() == code
        assert not source.socket.exists()


async def test_sigterm_in_mid_migration_rolls_back_and_ends(tmp_path: Path) -> None:
    async with host(tmp_path, "a") as source, host(tmp_path, "b") as target:
        await booted(tmp_path, source)
        async with endless(source, target, url_of("unix", tmp_path)) as attempt:
            source.process.send_signal(signal.SIGTERM)
        assert await source.ended() == 0
        assert isinstance(attempt.received, ApiError)
        with pytest.raises(ApiError, match="not created"):
            await target.client.info()
