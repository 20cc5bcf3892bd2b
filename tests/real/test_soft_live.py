"""The soft CPU moves live: its guest writes, checks and cycles devices while its memory is copied."""

from __future__ import annotations

import errno
import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.cli.doctor import doctor
from trivmm.config import CpusConfig, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import HypervisorError, MigrationError
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.soft import SoftHypervisor, written
from trivmm.hypervisor.soft.written import WrittenPages, why_no_dirty_log
from trivmm.migration.progress import MigrationProgress
from trivmm.testing.road import open_road
from trivmm.vm import Vm

BOUND_S = 120.0
TEST_PAGES = 0x0100_0000 >> 12  # the probe's pages that check themselves begin there (trivmm/guest/probe.h)
needs_log = pytest.mark.skipif(
    why_no_dirty_log() is not None, reason=f"needs Linux 6.7 or newer, and userfaultfd allowed: {why_no_dirty_log()}"
)
pytestmark = [
    pytest.mark.soft,
    pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed"),
]


def probe(folder: Path, cpus: int = 1) -> VmConfig:
    """It rewrites 4 MiB without rest, and resets its devices."""
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    cmdline = probe_cmdline(cpus=cpus, report=100, mem=4, cycle="rng,blk", rate=300)
    return VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=20, downtime=20, quiesce=10),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def has_checked(vm: Vm, folder: Path, pages: int = 3000) -> ProbeReport:
    """The guest has checked so many more, and has written meanwhile."""
    since = report_of(folder)
    while True:
        now = report_of(folder)
        if now.problems or (now.checked >= since.checked + pages and now.dirtied > since.dirtied):
            return now
        await vm.console_output()


def unharmed(report: ProbeReport) -> bool:
    return (report.problems, report.errors, report.stuck) == ((), 0, 0)


def log_of(vm: Vm) -> WrittenPages:
    log = vm.host.machine.board.vm._written  # type: ignore[attr-defined]
    assert isinstance(log, WrittenPages)
    return log


@needs_log
@pytest.mark.parametrize("cpus", [1, 2])
async def test_moves_live_over_unix_and_tcp(tmp_path: Path, cpus: int) -> None:
    with trio.fail_after(BOUND_S):
        async with open_road(probe(tmp_path, cpus), hypervisor=SoftHypervisor()) as road:
            left_over = []
            for number in range(4):
                await has_checked(road.vm, tmp_path)
                report = await road.move(f"unix:{tmp_path}/{number}.sock" if number % 2 else "tcp:127.0.0.1:0")
                first, last = report.timeline[0], report.timeline[-1]
                assert not first.last, "most of it went while the guest ran"
                assert last.last
                assert first.pages + first.zero_pages > 1024  # the table, the test pages
                assert last.pages < first.pages
                left_over.append(last.pages)
                assert not log_of(road.vm).is_on, "a VM that has arrived is not logged"
            assert any(left_over), "what was written meanwhile came behind, unless no vCPU had a turn meanwhile"
            assert unharmed(await has_checked(road.vm, tmp_path, 5000))


@needs_log
async def test_the_guest_writes_while_it_is_copied_and_each_round_sends_what_it_wrote(tmp_path: Path) -> None:
    """A limit that no switchover can keep: round after round, each of the pages written since the one before."""
    with trio.fail_after(BOUND_S):
        async with open_road(probe(tmp_path), hypervisor=SoftHypervisor()) as road:
            before = await has_checked(road.vm, tmp_path)
            incoming, leave = await road.listen(f"unix:{tmp_path}/m.sock")
            dirtied: list[int] = []

            def look(progress: MigrationProgress) -> None:
                if progress.rounds and progress.rounds[-1].number > len(dirtied):
                    dirtied.append(report_of(tmp_path).dirtied)
                if dirtied and dirtied[-1] > before.dirtied + 600:
                    scope.cancel()

            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ignoring_a_loss, incoming)
                    await road.vm.migrate_to(incoming.url, downtime_ms=1, on_progress=look)
            leave.set()
            assert scope.cancelled_caught
            progress = road.vm.migration_progress
            assert progress is not None
            assert len(progress.rounds) > 1
            later = [each.pages for each in progress.rounds[1:]]
            assert sum(later) > 0
            assert max(later) < progress.rounds[0].pages
            # It was cancelled: the guest runs here, nothing logs it, and it moves all the same.
            assert not log_of(road.vm).is_on
            assert unharmed(await has_checked(road.vm, tmp_path))
            await road.move(f"unix:{tmp_path}/again.sock")
            assert unharmed(await has_checked(road.vm, tmp_path, 5000))


async def ignoring_a_loss(incoming: Any) -> None:
    with suppress(MigrationError):
        await incoming.receive()


@needs_log
async def test_a_page_that_the_log_forgets_is_seen_by_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the moves above show: with a log that loses the guest's test pages, they arrive stale."""
    take = WrittenPages.take

    def forgetful(self: WrittenPages, number: int, into: Any) -> None:
        _hva, size = self.slots[number]
        words = -(-size // 4096 // 64)
        bits = ffi.new("uint64_t[]", words)
        take(self, number, bits)
        for word in range(min(words, TEST_PAGES // 64)):
            into[word] |= bits[word]

    monkeypatch.setattr(WrittenPages, "take", forgetful)
    with trio.fail_after(BOUND_S):
        async with open_road(probe(tmp_path), hypervisor=SoftHypervisor()) as road:
            for number in range(3):
                assert unharmed(await has_checked(road.vm, tmp_path)) or number
                await road.move(f"unix:{tmp_path}/{number}.sock")
                if (report := await has_checked(road.vm, tmp_path, 5000)).problems:
                    break
            assert {problem.split()[0] for problem in report.problems} == {"STALE"}


@needs_log
async def test_a_log_that_breaks_fails_the_migration_and_not_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: WrittenPages, number: int, into: Any) -> None:
        raise HypervisorError("PAGEMAP_SCAN", "not permitted", errno=errno.EPERM)

    with trio.fail_after(BOUND_S):
        async with open_road(probe(tmp_path), hypervisor=SoftHypervisor()) as road:
            await has_checked(road.vm, tmp_path)
            with monkeypatch.context() as patch:
                patch.setattr(WrittenPages, "take", broken)
                with pytest.raises(HypervisorError, match="PAGEMAP_SCAN"):
                    await road.move(f"unix:{tmp_path}/m.sock")
            assert not log_of(road.vm).is_on
            assert unharmed(await has_checked(road.vm, tmp_path))
            await road.move(f"unix:{tmp_path}/again.sock")
            assert unharmed(await has_checked(road.vm, tmp_path))


class OldKernel:
    """The C library on a kernel that has no such log."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def tv_written_open(self) -> int:
        return -errno.EINVAL


async def test_without_a_log_it_is_copied_while_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "lib", OldKernel())
    with trio.fail_after(BOUND_S):
        async with open_road(probe(tmp_path), hypervisor=SoftHypervisor()) as road:
            for number in range(2):
                await has_checked(road.vm, tmp_path)
                report = await road.move(f"unix:{tmp_path}/{number}.sock")
                assert [each.last for each in report.timeline] == [True]
                assert report.downtime_limit_ms is None
            assert unharmed(await has_checked(road.vm, tmp_path, 5000))


def test_doctor_says_whether_the_kernel_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row() -> str:
        doctor([])
        return next(line for line in capsys.readouterr().out.splitlines() if "dirty log" in line)

    assert (" yes " in row()) == (why_no_dirty_log() is None)
    monkeypatch.setattr(written, "lib", OldKernel())
    assert " no " in row()
    assert "(userfaultfd: Invalid argument)" in row()
    assert "optional: Linux 6.7" in row()
