"""examples/small_kernel.sh: the distribution's source makes a kernel that has every driver, with the same initramfs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from trivmm import ConsoleConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig, VmConfig, open_vm
from trivmm.cli import main
from trivmm.image.seed import make_seed
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.vsock.config import VsockConfig

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples/small_kernel.sh"
BUILD_S, LIMIT_S = 3600, 600
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "gcc", "make", "flex", "bison", "bc", "xz")
LOOK = """#!/bin/sh
for driver in /sys/bus/virtio/drivers/*; do
    for device in $driver/virtio*; do
        [ -e $device ] && echo "RUN bound $(basename $driver)"
    done
done
mount -t iso9660 $(findfs LABEL=CIDATA) /mnt && echo "RUN seed $(ls /mnt | tr '\\n' ' ')"
"""


def test_a_small_kernel_has_every_driver(tmp_path: Path) -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} to build a kernel")
    done = subprocess.run([SCRIPT, tmp_path / "small"], capture_output=True, text=True, timeout=BUILD_S, check=False)
    if "missing libelf-dev" in done.stderr:
        pytest.skip("apt-get install libelf-dev")
    assert done.returncode == 0, done.stderr[-2000:]
    trio.run(boots_and_binds, tmp_path, tmp_path / "small/vmlinux")


async def boots_and_binds(folder: Path, kernel: Path) -> None:
    look, disk, seed = folder / "look", folder / "disk.img", folder / "seed"
    look.write_text(LOOK)
    disk.touch()
    os.truncate(disk, 1 << 20)
    seed.write_bytes(make_seed({"user-data": b"#cloud-config\n"}, 0))
    cache = str(folder / "cache")
    assert main(["image", "--fetch", "--cache", cache, "--into", str(folder / "guest"), "--run", str(look)]) == 0
    config = VmConfig(
        PayloadConfig(kernel, "console=ttyS0", initramfs=folder / "guest/initramfs"),
        memory=MemoryConfig(256 << 20),
        disks=(DiskConfig(disk), DiskConfig(seed, readonly=True)),
        console=ConsoleConfig("File", folder / "console.txt"),
        virtio=[
            NetConfig(link=f"listen:{folder}/net.sock"),
            BalloonConfig(),
            VsockConfig(cid=3, socket=f"{folder}/vsock"),
        ],
        pvpanic=True,
    )
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            await vm.wait_for_console("guest login: ")
            said = vm.console_tail.decode(errors="replace")
            await vm.power_button()
            assert (await vm.wait()).kind == "poweroff"
    assert sorted(re.findall(r"^RUN bound (\w+)", said, re.MULTILINE)) == [
        *("virtio_balloon", "virtio_blk", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng"),
        "vmw_vsock_virtio_transport",
    ]
    assert re.search(r"^RUN seed meta-data user-data ", said, re.MULTILINE)
    assert "could not be loaded" not in said
