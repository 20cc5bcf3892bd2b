"""Devices that are reset and activated without rest, under migrations and with back ends that take their time: no vCPU
stays at a barrier, and nothing waits for an activation but the vCPU that asked for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import CpusConfig, Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import Road, open_road
from trivmm.virtio.rng.device import RngDevice

pytestmark = pytest.mark.kvm

DISKS = 7  # and the entropy device
LIMIT_S = 120
SLOW_LIMIT_S = 3000  # some 30 cycles a second, on a host that has other things to do


def config_of(folder: Path, *, disks: int = DISKS, activation: float = 30, **options: object) -> VmConfig:
    paths = [folder / f"disk{number}.img" for number in range(disks)]
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    words: dict[str, object] = {"cpus": 2, "report": 100, "mem": 8, "rate": 100, "cycle": "rng,blk", "disks": disks}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**{**words, **options})),
        cpus=CpusConfig(2),
        memory=MemoryConfig(32 << 20),
        disks=tuple(DiskConfig(str(path)) for path in paths),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5, activation=activation, device_stop=10),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def reported(vm: Vm, folder: Path, true: Callable[[ProbeReport], bool]) -> ProbeReport:
    """The first report of which that is so. Bounded by the caller."""
    while not true(report := report_of(folder)):
        await vm.console_output()
    return report


def cycles(report: ProbeReport) -> int:
    return report.rng_act + report.blk_act


def unharmed(report: ProbeReport) -> bool:
    return not report.problems and report.errors == 0 and report.stuck == 0 and report.needs_reset == 0


@pytest.mark.parametrize(
    ("wanted", "limit_s"), [(200, LIMIT_S), pytest.param(10_000, SLOW_LIMIT_S, marks=pytest.mark.slow)]
)
async def test_eight_devices_cycle_half_of_the_time_under_migrations(
    tmp_path: Path, wanted: int, limit_s: float
) -> None:
    with trio.fail_after(limit_s):
        async with open_road(config_of(tmp_path)) as road:
            half = await reported(road.vm, tmp_path, lambda report: cycles(report) >= wanted // 2)
            while cycles(report_of(tmp_path)) < cycles(half) + wanted // 2:
                number = len(road.reports)
                await road.move(f"unix:{tmp_path}/m{number}.sock" if number % 2 else "tcp:127.0.0.1:0")
            after = report_of(tmp_path)
            assert len(road.reports) >= 1
            report = await reported(road.vm, tmp_path, lambda report: cycles(report) >= cycles(after) + 3 * (DISKS + 1))
            assert unharmed(report)
            counters = road.vm.counters()
            names = ["__rng", *(f"_disk{number}" for number in range(DISKS))]
            assert all(counters[name]["activations"] for name in names), "none of the eight is left out"


# --- a back end that takes its time ----------------------------------------------------------------------------------


class SlowRng:
    """From :meth:`begin` on, an activation of the rng goes on for ever; ``entered`` says that one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = trio.Event()
        self.cancelled = trio.Event()
        self.slow = False
        real = RngDevice.activate

        async def activate(device: RngDevice, *args: Any) -> None:
            if self.slow:
                self.entered.set()
                try:
                    await trio.sleep_forever()
                finally:
                    self.cancelled.set()
            await real(device, *args)

        monkeypatch.setattr(RngDevice, "activate", activate)

    async def begin(self) -> None:
        self.slow = True
        await self.entered.wait()


async def pause_and_resume(road: Road, slow: SlowRng, folder: Path) -> None:
    await road.vm.pause()
    await road.vm.resume()
    assert not slow.cancelled.is_set(), "the activation goes on"


async def another_vcpu_resets(road: Road, slow: SlowRng, folder: Path) -> None:
    """``race=1``: CPU 0 does, every 20 ms; CPU 1 goes on and activates it again."""
    slow.slow = False
    before = report_of(folder)
    await slow.cancelled.wait()
    await reported(road.vm, folder, lambda report: report.raced > before.raced and report.rng_act > before.rng_act)


async def migrate(road: Road, slow: SlowRng, folder: Path) -> None:
    source = road.vm
    slow.slow = False  # on the destination
    before = report_of(folder)
    await road.move(f"unix:{folder}/m.sock")
    assert road.vm is not source
    await reported(road.vm, folder, lambda report: report.rng_act > before.rng_act)


@pytest.mark.parametrize(("act", "race"), [(pause_and_resume, None), (another_vcpu_resets, 1), (migrate, None)])
async def test_nothing_else_waits_for_an_activation_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[..., Any], race: int | None
) -> None:
    slow = SlowRng(monkeypatch)
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, disks=1, activation=1e6, race=race)) as road:
            await road.vm.wait_for_console("PROBE t=")
            await slow.begin()
            await act(road, slow, tmp_path)
            assert report_of(tmp_path).errors == 0


async def test_past_its_deadline_the_guest_sees_needs_reset_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRng(monkeypatch)
    failed: list[Event] = []
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, disks=1, activation=0.5)) as road:
            await road.vm.wait_for_console("PROBE t=")
            road.vm.events.listen(partial(_note, "failed", failed))
            await slow.begin()
            report = await reported(road.vm, tmp_path, lambda report: report.needs_reset >= 2)
            assert len(failed) >= 2
            slow.slow = False
            await reported(road.vm, tmp_path, lambda now: now.rng_act > report.rng_act and now.blk_act > report.blk_act)
            assert report_of(tmp_path).errors == 0


def _note(kind: str, found: list[Event], event: Event) -> None:
    if event.event == kind:
        found.append(event)
