"""virtio-watchdog with a real guest that pings it, and one that stops. Time in which it stands still is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road
from trivmm.virtio.watchdog import device as watchdog
from trivmm.virtio.watchdog.config import WatchdogConfig
from trivmm.virtio.watchdog.device import WatchdogDevice
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 120
FOR_EVER = 1_000_000


def config_of(folder: Path, pings: int) -> VmConfig:
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=4, watchdog=pings)),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        virtio=[WatchdogConfig()],
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    report = parse_report((folder / "serial.txt").read_text(errors="replace"))
    assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
    return report


async def until(vm: Vm, so: Callable[[], bool]) -> None:
    while not so():
        await vm.console_output()


def pings_of(vm: Vm) -> int:
    return vm.counters().get("__watchdog", {}).get("pings", 0)


def watchdog_of(vm: Vm) -> WatchdogDevice:
    assert vm.host.board is not None
    (found,) = [slot.backend for slot in vm.host.board.devices if isinstance(slot.backend, WatchdogDevice)]
    return found


async def test_a_guest_that_stops_to_ping_is_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TIMEOUT_S", 1.0)
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path, pings=3)) as vm:
            with vm.events.subscribe() as events:
                await vm.boot()
                async for event in events:
                    if event.event == "rebooted":
                        break
            assert vm.reboots == 1
            assert report_of(tmp_path).counts["watchdog"] == 3
            await until(vm, lambda: vm.reboots >= 2)  # the next one that stops, too


async def test_a_guest_that_pings_and_one_that_never_did_live_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through pauses and moves that are longer than the watchdog's patience."""
    monkeypatch.setattr(watchdog, "TIMEOUT_S", 5.0)
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, pings=FOR_EVER)) as road:
            await until(road.vm, lambda: pings_of(road.vm) > 3)
            await road.vm.pause()
            device = watchdog_of(road.vm)
            before = device.save()
            assert before.armed
            now = time.monotonic()
            with monkeypatch.context() as patched:
                patched.setattr(watchdog.time, "monotonic", lambda: now + 3600)
                assert device.save() == before  # an hour later
            await road.vm.resume()
            await until(road.vm, lambda: pings_of(road.vm) > 6)
            for number in range(2):
                await road.move(f"unix:{tmp_path}/{number}.sock")
                await until(road.vm, lambda: pings_of(road.vm) > 3)
            await until(road.vm, lambda: report_of(tmp_path).counts["watchdog"] > 20)  # twice around its ring
            assert road.vm.reboots == 0
            assert road.vm.counters()["__watchdog"]["expired"] == 0


async def test_what_was_left_goes_on_at_the_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that has stopped is not saved by moving it about."""
    monkeypatch.setattr(watchdog, "TIMEOUT_S", math.inf)
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path, pings=2)) as road:
            await until(road.vm, lambda: pings_of(road.vm) >= 2)
            await until(road.vm, lambda: report_of(tmp_path).t > 300)
            await road.move(f"unix:{tmp_path}/a.sock")
            state = watchdog_of(road.vm).save()
            assert state.armed
            assert state.idle_ms > 100
            monkeypatch.setattr(watchdog, "TIMEOUT_S", 0.2)
            await road.vm.pause()
            await road.vm.resume()  # it looks again, and finds that this is enough
            await until(road.vm, lambda: road.vm.reboots == 1)
