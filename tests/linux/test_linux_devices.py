"""A distribution's Linux drives the balloon, the persistent memory and pvpanic with its own drivers, and moves."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, Event, MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_incoming, open_vm
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.pmem.config import PmemConfig

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 900
MIB = 1 << 20
RAM, GIVEN = 256 * MIB, 32 * MIB
CMDLINE = "console=ttyS0 mitigations=off cryptomgr.notests"


async def test_linux_drives_its_small_devices(linux_devices: Any, tmp_path: Path) -> None:
    image, serial = tmp_path / "pmem.img", tmp_path / "serial.txt"
    image.touch()
    os.truncate(image, 4 * MIB)
    config = VmConfig(
        PayloadConfig(str(linux_devices.kernel), CMDLINE, initramfs=str(linux_devices.initramfs)),
        memory=MemoryConfig(RAM),
        serial=SerialConfig("File", str(serial)),
        virtio=[BalloonConfig(free_page_reporting=True), PmemConfig(image)],
        pvpanic=True,
        deadlines=Deadlines(pause=10, downtime=30),
    )
    told: list[Event] = []
    panicked = trio.Event()

    def note(event: Event) -> None:
        if event.source == "guest":
            told.append(event)
            panicked.set()

    with trio.fail_after(LIMIT_S):
        async with AsyncExitStack() as stack:
            vm = await stack.enter_async_context(open_vm(config, hypervisor=SoftHypervisor()))
            await vm.boot()
            await vm.wait_for_console("GUEST pmem first: good")
            assert image.read_bytes()[5 * 4096 :].startswith(b"first\0")
            await vm.wait_for_console("GUEST has ")
            await vm.resize(balloon=GIVEN)
            await vm.wait_for_console("GUEST gave")
            incoming = await stack.enter_async_context(
                open_incoming(f"unix:{tmp_path}/m.sock", hypervisor=SoftHypervisor())
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                await vm.migrate_to(incoming.url)
            vm = incoming.vm
            vm.events.listen(note)
            assert RAM - GIVEN <= vm.info()["memory_actual_size"] <= RAM - GIVEN + 3 * MIB  # the rest is on its way
            assert vm.counters()["__balloon"]["refused"] == 0
            await vm.resize(balloon=0)
            await vm.wait_for_console("GUEST took")
            assert vm.info()["memory_actual_size"] == RAM
            await vm.wait_for_console("GUEST panics")
            await panicked.wait()
            assert [(event.event, event.properties) for event in told] == [("panic", {"event": "panic"})]
    said = serial.read_text(errors="replace")
    assert "GUEST problem" not in said
    assert "GUEST pmem second: good" in said
    assert image.read_bytes()[5 * 4096 :].startswith(b"second\0")
