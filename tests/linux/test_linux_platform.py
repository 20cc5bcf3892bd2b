"""A distribution's Linux and the machine it finds: SMBIOS, its own complaints about ACPI, its end by ACPI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import Deadlines, MemoryConfig, PayloadConfig, PlatformConfig, SerialConfig, VmConfig, open_vm

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 900
CMDLINE = "console=ttyS0 mitigations=off cryptomgr.notests panic=-1"
IDENTITY = "00112233-4455-6677-8899-aabbccddeeff"
KNOWN_COMPLAINTS: tuple[str, ...] = ()
"""What this Linux says of ACPI at level warning or worse although nothing is wrong, each with its reason beside it."""


def config(linux: Any, folder: Path, more: str) -> VmConfig:
    return VmConfig(
        PayloadConfig(str(linux.kernel), f"{CMDLINE} {more}", initramfs=str(linux.initramfs)),
        memory=MemoryConfig(256 << 20),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        platform=PlatformConfig(
            system_serial_number="abc 123",
            system_uuid=IDENTITY,
            oem_strings=("one", "two=2"),
            system_family="family",
            chassis_asset_tag="tag",
        ),
        deadlines=Deadlines(pause=10),
    )


async def test_linux_knows_its_machine_and_powers_off(linux_platform: Any, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config(linux_platform, tmp_path, ""), hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
    said = (tmp_path / "serial.txt").read_text(errors="replace")
    assert "GUEST done" in said
    assert "GUEST problem" not in said
    assert "DMI not present" not in said
    assert "SMBIOS 2.8 present" in said
    assert dict(re.findall(r"GUEST dmi (\w+): (.*?)\r?\n", said)) == {
        "sys_vendor": "TriVMM",
        "product_name": "trivmm",
        "product_version": "",
        "product_serial": "abc 123",
        "product_uuid": IDENTITY,
        "product_sku": "",
        "product_family": "family",
        "chassis_asset_tag": "tag",
    }
    assert re.findall(r"GUEST oem: (.*?)\r?\n", said) == ["one", "two=2"]
    complaints = re.findall(r"GUEST complaint \d: (.*?)\r?\n", said)
    assert [each for each in complaints if "ACPI" in each and not each.startswith(KNOWN_COMPLAINTS)] == []


async def test_linux_reboots_by_acpi(linux_platform: Any, tmp_path: Path) -> None:
    serial = tmp_path / "serial.txt"
    told: list[str] = []
    with trio.fail_after(LIMIT_S):
        async with open_vm(config(linux_platform, tmp_path, "reboot=acpi again"), hypervisor=SoftHypervisor()) as vm:
            vm.events.listen(lambda event: told.append(event.event))
            await vm.boot()
            while serial.read_text(errors="replace").count("GUEST done") < 2:  # noqa: ASYNC110 - a file has no event
                await trio.sleep(0.05)
    assert "rebooting" in told
    assert "reboot: Restarting system" in serial.read_text(errors="replace")
