"""A distribution's Linux reboots, starves its watchdog, panics and has its power button pressed: each is told as what
it is, in four lives of one VM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.virtio.watchdog.config import WatchdogConfig

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 900
CMDLINE = "console=ttyS0 mitigations=off panic=-1 cryptomgr.notests iomem=relaxed"


async def test_each_event_is_told_as_what_it_is(linux_events: Any, tmp_path: Path) -> None:
    disk, serial = tmp_path / "disk.img", tmp_path / "serial.txt"
    disk.write_bytes(bytes(1 << 20))
    config = VmConfig(
        PayloadConfig(str(linux_events.kernel), CMDLINE, initramfs=str(linux_events.initramfs)),
        memory=MemoryConfig(256 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(serial)),
        virtio=[WatchdogConfig()],
        pvpanic=True,
        deadlines=Deadlines(pause=10),
    )
    told: list[Event] = []
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=SoftHypervisor()) as vm:
            vm.events.listen(told.append)
            await vm.boot()
            await vm.wait_for_console("GUEST waits for the button")
            assert vm.reboots == 3
            await vm.power_button()
            assert (await vm.wait()).kind == "poweroff"
    said = serial.read_text(errors="replace")
    assert re.findall(r"GUEST life (\d)", said) == ["0", "1", "2", "3"]
    assert "GUEST problem" not in said
    assert "GUEST pinged 1, status 15" in said
    assert said.count("GUEST power button") == 1
    assert disk.read_bytes()[0] == 4
    what = [
        (each.event, each.properties.get("reason", "") if each.properties else "")
        for each in told
        if each.event in ("rebooting", "rebooted", "panic")
    ]
    kinds = [event for event, _ in what]
    assert kinds == ["rebooting", "rebooted", "rebooting", "rebooted", "panic", "rebooting", "rebooted"]
    reasons = [reason for event, reason in what if event == "rebooting"]
    assert "watchdog" in reasons[1]
    assert "watchdog" not in reasons[0] + reasons[2]
