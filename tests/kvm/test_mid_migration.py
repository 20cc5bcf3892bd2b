"""What a guest can do while it is being moved: activate slowly, reboot, power off, reset a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from trivmm import (
    CpusConfig,
    Deadlines,
    DiskConfig,
    Event,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    VmConfig,
    VmState,
)
from trivmm.errors import MigrationError
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import Road, open_road
from trivmm.virtio.rng.device import RngDevice

pytestmark = pytest.mark.kvm

LIMIT_S = 120
EXAMPLES = Path(__file__).parents[2] / "examples"


def config_of(folder: Path, **options: object) -> VmConfig:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(4 << 20))
    words: dict[str, object] = {"cpus": 1, "report": 100, "mem": 16, "cycle": "rng,blk", **options}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        cpus=CpusConfig(int(str(words["cpus"]))),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5, activation=60, device_stop=10),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


def slow_on(monkeypatch: pytest.MonkeyPatch, slow: list[object], entered: trio.Event) -> None:
    """The rng devices of these machines (by their memory) never finish an activation."""
    real = RngDevice.activate

    async def activate(self: RngDevice, *args: Any) -> None:
        if any(self.memory is each for each in slow):
            entered.set()
            await trio.sleep_forever()
        await real(self, *args)

    monkeypatch.setattr(RngDevice, "activate", activate)


async def test_an_activation_that_is_pending_at_the_switchover_is_served_on_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original deadlock on real KVM: a vCPU waits for its device while the migration owns the VM."""
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path)) as road:
            await road.vm.wait_for_console("PROBE ready")
            entered = trio.Event()
            assert road.vm.host.machine is not None
            slow_on(monkeypatch, [road.vm.host.machine.memory], entered)
            await entered.wait()  # the guest's only vCPU stands at the barrier from here on
            seen: list[Event] = []
            road.vm.events.listen(seen.append)
            before = report_of(tmp_path)
            await road.move(f"unix:{tmp_path}/m.sock")
            assert not [event for event in seen if event.event == "failed"]
            await road.vm.wait_for_console("PROBE t=")
            while (after := report_of(tmp_path)).rng_act <= before.rng_act + 2:
                await road.vm.console_output()
            assert not after.problems
            assert after.needs_reset == 0


async def test_a_pause_does_not_wait_for_an_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path)) as road:
            await road.vm.wait_for_console("PROBE ready")
            entered = trio.Event()
            assert road.vm.host.machine is not None
            slow = [road.vm.host.machine.memory]
            slow_on(monkeypatch, list(slow), entered)
            await entered.wait()
            await road.vm.pause()
            assert road.vm.info()["device_tree"]["__rng"]["status"] == "activating"
            await road.vm.resume()


async def test_a_failed_activation_shows_the_guest_needs_reset_and_it_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RngDevice.activate
    failures = [3]

    async def activate(self: RngDevice, *args: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError("the back end is away")
        await real(self, *args)

    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path)) as road:
            await road.vm.wait_for_console("PROBE ready")
            monkeypatch.setattr(RngDevice, "activate", activate)
            while (report := report_of(tmp_path)).needs_reset < 3:
                await road.vm.console_output()
            while report_of(tmp_path).rng_act <= report.rng_act + 5:
                await road.vm.console_output()
            assert report_of(tmp_path).errors == 0


async def moved_with_request(road: Road, url: str) -> None:
    """A move that cannot converge before the guest's request comes, and then switches over whatever it costs."""
    await road.move(url, downtime_ms=1, timeout_s=4, timeout_strategy="Ignore")


async def test_a_reboot_in_mid_migration_is_carried_out_by_the_destination(tmp_path: Path) -> None:
    config = config_of(tmp_path, rate=5000, reboot=150)
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await road.vm.wait_for_console("PROBE ready")
            source = road.vm
            await moved_with_request(road, f"unix:{tmp_path}/m.sock")
            assert source.state is VmState.SHUTDOWN
            await road.vm.wait_for_console("PROBE ready")
            text = (tmp_path / "serial.txt").read_text()
            assert text.count("PROBE reboot") >= 1
            assert text.count("PROBE ready") >= 2
            assert source.reboots + road.vm.reboots >= 1


async def test_a_power_off_in_mid_migration_ends_the_vm_where_it_arrives(tmp_path: Path) -> None:
    config = config_of(tmp_path, rate=5000, once=150)
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await road.vm.wait_for_console("PROBE ready")
            await moved_with_request(road, "tcp:127.0.0.1:0")
            assert (await road.vm.wait()).kind == "poweroff"
            assert road.vm.state is VmState.SHUTDOWN


async def test_a_destination_without_the_kernel_refuses_at_setup(tmp_path: Path) -> None:
    """The side that ends up running the VM carries out its reboots, from its own kernel path."""
    kernel = tmp_path / "kernel.elf"
    kernel.write_bytes(probe_path().read_bytes())
    config = config_of(tmp_path)
    config = attrs.evolve(config, payload=attrs.evolve(config.payload, kernel=str(kernel)))
    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await road.vm.wait_for_console("PROBE ready")
            kernel.unlink()
            with pytest.raises(Exception, match=r"kernel\.elf"):
                await road.move(f"unix:{tmp_path}/m.sock")
            assert road.vm.state is VmState.RUNNING
            kernel.write_bytes(probe_path().read_bytes())
            await road.move(f"unix:{tmp_path}/n.sock")
            assert road.vm.state is VmState.RUNNING


async def test_a_destination_with_a_shorter_disk_refuses_at_setup(tmp_path: Path) -> None:
    """And one with a longer disk shows the guest the sender's: the capacity does not change under a driver."""
    image = tmp_path / "disk.img"
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(tmp_path)) as road:
            await road.vm.wait_for_console("PROBE ready")
            image.rename(tmp_path / "elsewhere.img")
            image.write_bytes(bytes(2 << 20))
            with pytest.raises(MigrationError, match=r"disk\.img.*has 4096 sectors, the sender's disk has 8192"):
                await road.move(f"unix:{tmp_path}/m.sock")
            assert road.vm.state is VmState.RUNNING
            (tmp_path / "elsewhere.img").replace(image)
            os.truncate(image, 8 << 20)
            await road.move(f"unix:{tmp_path}/n.sock")
            os.truncate(image, 4 << 20)  # what the guest was told of is there, so that it can be moved on
            await road.move(f"unix:{tmp_path}/o.sock")
            before = report_of(tmp_path)
            while report_of(tmp_path).blk_act <= before.blk_act + 5:
                await road.vm.console_output()
            assert report_of(tmp_path).errors == 0


# Those two: test_watch_move, test_vsock.
ALONE = sorted({path.name for path in EXAMPLES.glob("*.py")} - {"watch_move.py", "vsock.py"})


@pytest.mark.parametrize("example", ALONE)
async def test_examples_run(example: str, tmp_path: Path) -> None:
    def run() -> Any:
        command = [sys.executable, "-P", str(EXAMPLES / example)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    done = await trio.to_thread.run_sync(run)
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout.lower() or "PROBE ready" in done.stdout
