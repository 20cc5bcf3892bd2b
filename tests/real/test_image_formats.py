"""Disk images of formats that can't be opened: refused by name where nobody said what they are, and never because of
their guest. What is done with qcow2 is in test_qcow2_images.py."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, VmConfig, VmState, open_incoming, open_vm
from trivmm.control.schema import dump_config
from trivmm.errors import ConfigError, NotSupported
from trivmm.guest import probe_path
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.block.formats import foreign_format, open_image

LIMIT_S = 60
QCOW2 = b"QFI\xfb\0\0\0\x03"
SIZE = 1 << 20


def at(offset: int, text: bytes) -> bytes:
    return (bytes(offset) + text).ljust(SIZE, b"\0")


IMAGES = {
    "qcow": at(0, b"QFI\xfb\0\0\0\x01"),
    "VHDX": at(0, b"vhdxfile" + "made by".encode("utf-16-le")),
    "VMDK": at(0, b"KDMV" + struct.pack("<I", 3)),
    "VMDK, of ESX": at(0, b"COWD" + struct.pack("<I", 1)),
    "VMDK, a short descriptor": b"# Disk DescriptorFile\nversion=1\n",
    "QED": at(0, b"QED\0"),
    "VDI": at(0, b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + struct.pack("<I", 0xBEDA107F)),
    "Parallels": at(0, b"WithoutFreeSpace"),
    "VHD, dynamic": at(0, b"conectix"),
    "VHD, fixed": bytes(SIZE) + b"conectix".ljust(512, b"\0"),
    "VHD, fixed, of an old tool": bytes(SIZE) + b"conectix".ljust(511, b"\0"),
    "VHD, nothing but its footer": b"conectix".ljust(512, b"\0"),
}
RAW = {
    "empty": b"",
    "one byte": b"Q",
    "a part of a magic": b"QFI",
    "zeros": bytes(SIZE),
    "a boot sector": at(510, b"\x55\xaa"),
    "GPT": at(512, b"EFI PART"),
    "LUKS": at(0, b"LUKS\xba\xbe\0\x02"),
    "gzip": at(0, b"\x1f\x8b\x08\0"),
    "a magic further in": at(512, QCOW2),
    "a footer's magic further in": at(SIZE - 600, b"conectix"),
    "a descriptor that is only mentioned": at(1, b"# Disk DescriptorFile"),
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_another_format_is_refused_by_name(tmp_path: Path, name: str, readonly: bool) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(IMAGES[name])
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotSupported) as caught:
        open_image(DiskConfig(str(path), readonly=readonly), lock=True)
    said = str(caught.value)
    assert said.startswith(f'disks.path = "{path}": a {name.partition(",")[0]} image; only raw and qcow2 ones')
    assert "qemu-img convert -O qcow2" in said
    assert "image_type=raw" in said
    assert "\n" not in said
    assert os.listdir("/proc/self/fd") == before
    open_image(DiskConfig(str(path), readonly=readonly, image_type="Raw"), lock=True).close()  # said explicitly, obeyed
    assert path.read_bytes() == IMAGES[name]


@pytest.mark.parametrize("name", RAW)
def test_what_guests_keep_on_disks_is_raw(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(RAW[name])
    for readonly in (False, True):
        image = open_image(DiskConfig(str(path), readonly=readonly), lock=True)
        assert image.sectors == len(RAW[name]) // 512
        image.close()


@given(st.binary(max_size=512), st.binary(max_size=512))
def test_whatever_the_bytes_are_a_magic_alone_decides(first: bytes, last: bytes) -> None:
    magics = (
        b"QFI\xfb",
        b"vhdxfile",
        b"conectix",
        b"KDMV",
        b"COWD",
        b"# Disk",
        b"QED\0",
        b"\x7f\x10\xda\xbe",
        b"Without",
    )
    if not any(magic in first + last for magic in magics):
        assert foreign_format(first, last) is None
    assert foreign_format(QCOW2 + first, last) == "qcow2"


@pytest.mark.parametrize("image_type", ["Vhdx", "FixedVhd", "FlatVmdk"])
def test_a_type_that_is_not_there_yet_is_refused_by_name(image_type: str) -> None:
    with pytest.raises(
        NotSupported, match=rf'disks\.image_type = "{image_type}": only raw and qcow2 .*qemu-img convert'
    ):
        DiskConfig("d", image_type=image_type)


@pytest.mark.parametrize("image_type", ["raw", "", "Iso", "x\n" * 500])
def test_a_type_that_is_none_is_a_mistake(image_type: str) -> None:
    with pytest.raises(ConfigError, match=r"disks\.image_type = .*no such type") as caught:
        DiskConfig("d", image_type=image_type)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(SIZE))
    return VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), disks=(DiskConfig(str(disk)),))


def image_type(config: VmConfig) -> object:
    return dump_config(config)["disks"][0]["image_type"]


async def test_what_a_guest_writes_to_its_own_disk_never_shuts_it_out(config: VmConfig, tmp_path: Path) -> None:
    """Reboot, migration, and off and on again: the image is looked at once, before the guest first ran."""
    path = Path(config.disks[0].path)
    hypervisor = ScriptedHypervisor()
    url = f"unix:{tmp_path}/m.sock"
    with trio.fail_after(LIMIT_S):
        async with (
            open_vm(config, hypervisor=hypervisor) as vm,
            open_incoming(url, hypervisor=hypervisor) as incoming,
        ):
            assert image_type(vm.config) == "Unknown"
            await vm.boot()
            assert image_type(vm.config) == "Raw"
            path.write_bytes(IMAGES["VHDX"])  # as the guest would
            await vm.reboot()
            await vm.shutdown()
            await vm.boot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                await vm.migrate_to(url)
            there = incoming.vm
            assert image_type(there.config) == "Raw"
            await there.reboot()
            assert there.state is VmState.RUNNING
    with trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=hypervisor) as vm:  # another VM, of which nobody knows anything
            with pytest.raises(NotSupported, match="a VHDX image"):
                await vm.boot()
            assert (vm.state, image_type(vm.config)) == (VmState.CREATED, "Unknown")
            path.write_bytes(bytes(SIZE))
            await vm.boot()
        raw = attrs.evolve(config, disks=(attrs.evolve(config.disks[0], image_type="Raw"),))
        path.write_bytes(IMAGES["VHDX"])
        async with open_vm(raw, hypervisor=hypervisor) as vm:
            await vm.boot()
            assert image_type(vm.config) == "Raw"
