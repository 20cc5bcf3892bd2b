"""A driver in the probe guest that lies to one device in every way it can (``trivmm/guest/hostile.c``), on real KVM:
the guest's other devices go on with checked data, and nothing of the VMM raises, floods its log or waits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from trivmm import CpusConfig, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road

pytestmark = pytest.mark.kvm

LIMIT_S = 120
SLOW_LIMIT_S = 1200


@pytest.mark.parametrize(
    ("seed", "attacks", "limit_s"), [(1, 150, LIMIT_S), pytest.param(7, 2000, SLOW_LIMIT_S, marks=pytest.mark.slow)]
)
async def test_only_its_own_device_suffers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int, attacks: int, limit_s: float
) -> None:
    caplog.set_level(logging.INFO)
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4 << 20))
    serial = tmp_path / "serial.txt"
    cmdline = probe_cmdline(cpus=2, report=300, mem=16, rate=300, cycle="blk", hostile=seed)
    config = VmConfig(
        PayloadConfig(str(probe_path()), cmdline),
        cpus=CpusConfig(2),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(serial)),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )

    def report() -> ProbeReport:
        return parse_report(serial.read_text(errors="replace"))

    with trio.fail_after(limit_s):
        async with open_road(config) as road:
            while report().counts.get("attacks", 0) < attacks // 2:
                await road.vm.console_output()
            await road.move(f"unix:{tmp_path}/m.sock")  # in the middle of whatever it is at
            while report().counts.get("attacks", 0) < attacks:
                await road.vm.console_output()
    seen = report()
    assert (seen.errors, seen.stuck, seen.needs_reset, seen.problems) == (0, 0, 0, ())
    assert seen.blk_act > 10
    assert seen.blk_ios >= seen.blk_act
    assert seen.counts["hurt"] > attacks // 10, "it did hurt its own device"
    assert seen.counts["served"] > attacks // 20, "which served what was in order"
    failed = [record.getMessage() for record in caplog.records if "device failed" in record.getMessage()]
    assert failed
    assert all("__rng" in each for each in failed)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) < 60, (
        "once, twice, four times"
    )
