"""Each way of a guest's to reset itself, in the middle of a migration."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, DiskConfig, MemoryConfig, PayloadConfig, VmConfig, VmState
from trivmm.guest import probe_path
from trivmm.machine.machine import Machine
from trivmm.testing.scripted import Compute, IoOut, ScriptedVcpu, Step, TripleFault
from trivmm.testing.sides import two_sides

LIMIT_S = 60
RESETS = {
    "triple fault": TripleFault(),
    "i8042": IoOut(0x64, 1, b"\xfe"),
    "port 0xcf9": IoOut(0xCF9, 1, b"\x06"),
    "ACPI reset register": IoOut(0x600, 1, b"\x01"),
}


@pytest.mark.parametrize("why", RESETS)
async def test_a_reset_in_mid_migration_is_carried_out_by_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """It comes, and is heard, in the moment in which the source begins to stop."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = VmConfig(
        PayloadConfig(str(probe_path())),
        memory=MemoryConfig(16 << 20),
        disks=(DiskConfig(str(disk)),),
        deadlines=Deadlines(downtime=10),
    )
    asked, heard = [False], trio.Event()
    note, stop = Machine._note_request, Machine.stop

    def guest(cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
        while not asked[0]:
            yield Compute(0.001)
        if not heard.is_set():
            yield RESETS[why]

    def noted(self: Machine, request: Any) -> None:
        note(self, request)
        assert request.why == why
        heard.set()

    async def stopping(self: Machine, *args: Any) -> None:
        asked[0] = True
        await heard.wait()
        await stop(self, *args)

    monkeypatch.setattr(Machine, "_note_request", noted)
    monkeypatch.setattr(Machine, "stop", stopping)
    with trio.fail_after(LIMIT_S):
        async with two_sides(config, tmp_path, guest) as (source, target, move):
            rebooted = trio.Event()
            target.events.listen(lambda event: rebooted.set() if event.event == "rebooted" else None)
            await move()
            await rebooted.wait()
            assert (source.reboots, target.reboots, target.state) == (0, 1, VmState.RUNNING)
