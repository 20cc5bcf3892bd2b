"""kill -9 of either process in the middle of a migration: the other side says so, and the next migration works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationError
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

RAM = ((0, 16 << 20),)
LIMITS = Deadlines(downtime=10.0, commit=5.0)
ENDLESS = SendOptions(timeout_s=120, downtime_ms=1)

PEER = """
import sys, trio
from trivmm.deadlines import Deadlines
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.options import SendOptions
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

class Endless(FakeSource):
    def harvest_dirty(self, slot, into):
        into[0] = into[1] = (1 << 64) - 1

async def main(role, url):
    limits = Deadlines(downtime=0.001, accept=60.0)
    if role == "source":
        machine = Endless(DiskLock(), limits, ((0, 16 << 20),))
        machine.stop_s = 5.0
        for page in range(4096):
            machine.memory.write(page * 4096, b"x")
        await send(machine, socket_dialer(url, machine.deadlines), SendOptions(timeout_s=60, downtime_ms=1))
    else:
        machine = FakeDestination(DiskLock(), limits, ((0, 16 << 20),))
        async with trio.open_nursery() as nursery, open_receiver(url, limits, nursery) as receiver:
            print(receiver.url, flush=True)
            await receiver.receive(machine.factory)

trio.run(main, *sys.argv[1:])
"""


def peer(role: str, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PEER, role, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()


class Endless(FakeSource):
    """Its first 128 pages are always dirty, until ``calm``."""

    calm = False

    def harvest_dirty(self, slot: int, into: Any) -> None:
        if not self.calm:
            into[0] = into[1] = (1 << 64) - 1


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
async def test_a_killed_source(scheme: str, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/m.sock" if scheme == "unix" else "tcp:127.0.0.1:0"
    destination = FakeDestination(DiskLock(), LIMITS, RAM)
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
            process = peer("source", receiver.url)

            def progress(now: MigrationProgress) -> None:
                if now.pages and process.returncode is None:
                    kill(process)

            with pytest.raises(MigrationError, match="lost"):
                await receiver.receive(destination.factory, progress)
    assert not destination.running
    assert os.listdir(tmp_path) == []
    destination.close()


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
async def test_a_killed_destination_and_the_next_one(scheme: str, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/m.sock" if scheme == "unix" else "tcp:127.0.0.1:0"
    source = Endless(DiskLock(), LIMITS, RAM)
    source.memory.write(0, b"x" * 100_000)
    with trio.fail_after(100):
        process = peer("destination", url)
        assert process.stdout is not None
        where = (await trio.to_thread.run_sync(process.stdout.readline)).decode().strip()

        def progress(now: MigrationProgress) -> None:
            if now.round > 1 and process.returncode is None:
                kill(process)

        with pytest.raises(MigrationError, match="lost"):
            await send(source, socket_dialer(where, source.deadlines), ENDLESS, progress)
        assert source.running
        assert not source.logging
        source.calm = True
        destination = FakeDestination(source.lock, LIMITS, RAM)
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
            nursery.start_soon(
                send, source, socket_dialer(receiver.url, source.deadlines), SendOptions(downtime_ms=10_000)
            )
            await receiver.receive(destination.factory)
    assert destination.running
    assert source.contents() == destination.contents()
    assert os.listdir(tmp_path) == []
    source.close()
    destination.close()
