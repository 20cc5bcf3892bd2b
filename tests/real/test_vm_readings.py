"""What the owner of a VM reads of it after it has moved: over a real socket, with scripted vCPUs."""

from __future__ import annotations

from pathlib import Path

import trio

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.guest import probe_path
from trivmm.testing.road import open_road
from trivmm.testing.scripted import ScriptedHypervisor

LIMIT_S = 60


async def test_ids_show_where_a_vm_arrives(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), disks=(DiskConfig(str(disk)),))
    with trio.fail_after(LIMIT_S):
        async with open_road(config, hypervisor=ScriptedHypervisor()) as road:
            source = road.vm
            await road.move(f"unix:{tmp_path}/m.sock", downtime_ms=5_000)
            assert road.vm is not source
            assert [disk.id for disk in road.vm.config.disks] == ["_disk0"]
            assert set(road.vm.info()["device_tree"]) >= {"_disk0", "_virtio-pci-_disk0", "__rng"}
