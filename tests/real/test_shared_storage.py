"""A disk that two hosts have in common: what one of them writes the other one reads, whatever its page cache held.

Two loop devices over one file have a page cache each, as two hosts have. The probe guest writes sectors, reads others
that it wrote before, and says itself whether one was lost; every page of the destination's device is cached, and kept
so by somebody who has it open, before the guest comes.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from trivmm.guest import parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.base import Hypervisor
from trivmm.testing.road import open_road
from trivmm.virtio.block.file import BLKFLSBUF

LIMIT_S = 120
SIZE = 2 << 20
MOVES = 4


def open_soft() -> Hypervisor:
    from trivmm.hypervisor.soft import SoftHypervisor

    if importlib.util.find_spec("unicorn") is None:
        pytest.skip("the soft extra is not installed")
    return SoftHypervisor()


def open_kvm() -> Hypervisor:
    from trivmm.hypervisor.kvm.system import KvmHypervisor

    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm can't be opened")
    return KvmHypervisor()


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two loop devices over one file, all of it in the page cache of each."""
    shared = tmp_path / "shared.img"
    shared.write_bytes(bytes(SIZE))
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            attach = subprocess.run(
                ["losetup", "--find", "--show", str(shared)], capture_output=True, text=True, timeout=60, check=False
            )
            if attach.returncode:
                pytest.skip(f"no loop devices here: {attach.stderr.strip()}")
            device = attach.stdout.strip()
            stack.callback(subprocess.run, ["losetup", "--detach", device], timeout=60, check=True)
            kept = os.open(device, os.O_RDONLY)
            stack.callback(os.close, kept)
            assert os.pread(kept, SIZE, 0) == bytes(SIZE)
            made.append(Path(device))
        yield made[0], made[1]


def forbidden(fd: int, request: int, *argument: Any) -> Any:
    """As whoever is not root finds it."""
    if request == BLKFLSBUF:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return ioctl(fd, request, *argument)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize(
    "hypervisor", [pytest.param(open_soft, marks=pytest.mark.soft), pytest.param(open_kvm, marks=pytest.mark.kvm)]
)
async def test_a_guest_reads_what_it_wrote_on_the_host_before(
    tmp_path: Path,
    devices: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    hypervisor: Callable[[], Hypervisor],
    root: bool,
) -> None:
    if not root:
        monkeypatch.setattr(fcntl, "ioctl", forbidden)
    disk, serial = tmp_path / "disk", tmp_path / "serial.txt"  # the path is the same on both hosts, the device is not
    disk.symlink_to(devices[0])
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=100, mem=4, rate=100, cycle="blk", sectors=32)),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(serial)),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )
    with trio.fail_after(LIMIT_S):
        async with open_road(config, hypervisor=hypervisor()) as road:
            for number in range(1, MOVES + 1):
                wanted = parse_report(serial.read_text(errors="replace")).blk_ios + 80  # all sectors, more than once
                while parse_report(serial.read_text(errors="replace")).blk_ios < wanted:
                    await road.vm.console_output()
                disk.unlink()
                disk.symlink_to(devices[number % 2])
                await road.move(f"unix:{tmp_path}/m{number}.sock")
            wanted = parse_report(serial.read_text(errors="replace")).blk_ios + 80
            while parse_report(serial.read_text(errors="replace")).blk_ios < wanted:
                await road.vm.console_output()
    report = parse_report(serial.read_text(errors="replace"))
    assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
