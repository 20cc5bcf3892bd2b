"""pvpanic with a guest that says the same again and again: it is told once, and the VM stays, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, Event, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig, VmState
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road

pytestmark = pytest.mark.kvm

LIMIT_S = 120


@pytest.mark.parametrize(("value", "word"), [(1, "panic"), (2, "crash_loaded"), (77, "unknown_event")])
async def test_it_is_told_once_and_the_vm_stays(tmp_path: Path, value: int, word: str) -> None:
    serial = tmp_path / "serial.txt"
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=4, pvpanic=value)),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(serial)),
        pvpanic=True,
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )

    async def until(vm: Vm, so: Callable[[ProbeReport], bool]) -> ProbeReport:
        while True:
            report = parse_report(serial.read_text(errors="replace"))
            assert (report.problems, report.errors) == ((), 0)
            if report.counts and so(report):
                return report
            await vm.console_output()

    told: list[Event] = []
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            road.vm.events.listen(lambda event: told.append(event) if event.source == "guest" else None)
            await until(road.vm, lambda report: report.counts["pvpanic"] > 3)
            tree = road.vm.info()["device_tree"]["__pvpanic"]
            assert tree["pci_bdf"] == "0000:00:02.0"  # behind the rng, as Cloud Hypervisor plugs it
            assert [bar["PciBar"]["type_"] for bar in tree["resources"]] == ["Mmio32"]
            assert road.vm.counters()["__pvpanic"][word] >= 3
            await road.move(f"unix:{tmp_path}/a.sock")
            road.vm.events.listen(lambda event: told.append(event) if event.source == "guest" else None)
            await until(road.vm, lambda report: road.vm.counters()["__pvpanic"][word] > 3)
            assert road.vm.state is VmState.RUNNING
            assert [(event.event, event.properties) for event in told] == [("panic", {"event": word})]
            await road.vm.reboot()  # another life of the guest: what it says is news again
            await until(road.vm, lambda report: len(told) > 1)
            assert told[1].properties == {"event": word}
