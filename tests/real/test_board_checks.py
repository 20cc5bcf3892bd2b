"""What a board refuses before it opens anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trivmm.config import DiskConfig, PayloadConfig, VmConfig
from trivmm.errors import ConfigError, HypervisorError
from trivmm.machine.build import build_board, check_board
from trivmm.testing.control import FakeHypervisor


def build(config: VmConfig) -> str:
    """What is wrong with it; nothing is left open. The double has no VM to give, so a good one fails there."""
    before = os.listdir("/proc/self/fd")
    hypervisor = FakeHypervisor()

    def boot() -> None:
        check_board(config, hypervisor)
        build_board(config, hypervisor)

    with pytest.raises((ConfigError, HypervisorError)) as caught:
        boot()
    assert os.listdir("/proc/self/fd") == before
    return str(caught.value)


def test_a_boot_needs_a_kernel() -> None:
    assert build(VmConfig()) == "payload.kernel = null: missing; give the path of a PVH ELF kernel, or firmware"


def test_one_image_twice(tmp_path: Path) -> None:
    image, other, link, hard = (tmp_path / name for name in ("a.img", "b.img", "link.img", "hard.img"))
    for path in (image, other):
        path.write_bytes(bytes(512))
    link.symlink_to(image)
    hard.hardlink_to(image)
    payload = PayloadConfig("/k")

    def told(*disks: DiskConfig | Path) -> str:
        return build(VmConfig(payload, disks=disks))

    for again in (image, link, hard, DiskConfig(image, readonly=True)):
        path = again.path if isinstance(again, DiskConfig) else again
        assert told(image, other, again) == (
            f'disks[2].path = "{path}": the same image as disks[0].path; '
            "give each disk its own, or give both readonly=on"
        )
    for fine in (
        (image, other),
        (DiskConfig(image, readonly=True), DiskConfig(link, readonly=True)),
        (Path("/dev/null"), tmp_path / "absent.img", tmp_path / "absent.img"),  # told when it is opened
    ):
        assert "nothing to run a VM with" in told(*fine)
