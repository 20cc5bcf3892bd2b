"""What a client sees of a machine's devices: ids, device tree and counters, as Cloud Hypervisor shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio.testing

from trivmm import ConfigError, DiskConfig, MemoryConfig, PayloadConfig, RngConfig, VmConfig, VmState, open_vm
from trivmm.guest import probe_path
from trivmm.machine.board import Board
from trivmm.machine.build import build_board
from trivmm.memory import layout
from trivmm.testing.scripted import ScriptedHypervisor

BAR0, BAR1, COMMAND = 0x10, 0x14, 0x04
BAR_SIZE = 0x80000


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    return VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), disks=disks(tmp_path, None))


def disks(folder: Path, *ids: str | None) -> tuple[DiskConfig, ...]:
    paths = [folder / f"disk{number}.img" for number in range(len(ids))]
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    return tuple(DiskConfig(str(path), id=name) for path, name in zip(paths, ids, strict=True))


@contextmanager
def built(config: VmConfig) -> Iterator[Board]:
    board = build_board(config, ScriptedHypervisor())
    try:
        yield board
    finally:
        board.close()


def write_config(board: Board, slot: int, register: int, value: int) -> None:
    """As the guest does it, by CF8 and CFC."""
    board.pio.write(0xCF8, (1 << 31 | slot << 11 | register).to_bytes(4, "little"))
    board.pio.write(0xCFC, value.to_bytes(4, "little"))


def bar(kind: str, base: int) -> list[dict[str, Any]]:
    return [{"PciBar": {"index": 0, "base": base, "size": BAR_SIZE, "type_": kind, "prefetchable": False}}]


def test_the_tree_has_cloud_hypervisors_nodes(config: VmConfig) -> None:
    with built(config) as board:
        assert board.device_tree() == {
            "__ioapic": {"id": "__ioapic", "resources": [], "children": []},
            "__serial": {"id": "__serial", "resources": [], "children": []},
            "_virtio-pci-_disk0": {
                "id": "_virtio-pci-_disk0",
                "resources": bar("Mmio32", layout.BAR32_START),
                "children": ["_disk0"],
                "pci_bdf": "0000:00:01.0",
            },
            "_disk0": {
                "id": "_disk0",
                "resources": [],
                "parent": "_virtio-pci-_disk0",
                "children": [],
                "status": "reset",
            },
            "_virtio-pci-__rng": {
                "id": "_virtio-pci-__rng",
                "resources": bar("Mmio64", layout.BAR64_END - BAR_SIZE),
                "children": ["__rng"],
                "pci_bdf": "0000:00:02.0",
            },
            "__rng": {
                "id": "__rng",
                "resources": [],
                "parent": "_virtio-pci-__rng",
                "children": [],
                "status": "reset",
            },
        }
        assert set(board.counters()) == {"_disk0", "__rng", "__serial", "__bus"}


def test_a_bar_is_where_the_guest_has_put_it(config: VmConfig) -> None:
    moved = layout.BAR64_START + 0x1000_0000
    with built(config) as board:
        write_config(board, 2, COMMAND, 2)
        write_config(board, 2, BAR0, moved & 0xFFFF_FFFF)
        write_config(board, 2, BAR1, moved >> 32)
        assert board.device_tree()["_virtio-pci-__rng"]["resources"] == bar("Mmio64", moved)
        write_config(board, 2, BAR0, 0xFFFF_FFFF)  # being sized, and turned off: where it was last
        assert board.device_tree()["_virtio-pci-__rng"]["resources"] == bar("Mmio64", moved)
        write_config(board, 2, COMMAND, 0)
        assert board.device_tree()["_virtio-pci-__rng"]["resources"] == bar("Mmio64", moved)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((None, None), ["_disk0", "_disk1"]),
        (("root", None), ["root", "_disk0"]),
        ((None, "_disk0"), ["_disk1", "_disk0"]),
        (("", None), ["_disk0", "_disk1"]),
    ],
)
def test_a_device_has_the_id_that_it_is_given(
    config: VmConfig, tmp_path: Path, given: tuple[str | None, ...], names: list[str]
) -> None:
    with built(attrs.evolve(config, disks=disks(tmp_path, *given), rng=RngConfig(id="entropy"))) as board:
        tree = board.device_tree()
        assert [tree[f"_virtio-pci-{name}"]["children"] for name in names] == [[name] for name in names]
        assert tree["entropy"]["parent"] == "_virtio-pci-entropy"
        assert [disk.id for disk in board.config.disks] == names


def test_the_machines_own_ids_are_not_to_be_had() -> None:
    for mine in ("__serial", "__rng", "_virtio-pci-_disk0"):
        with pytest.raises(ConfigError, match=rf"disks\.id = .*{mine}.*the VMM's own; give another"):
            DiskConfig("x.img", id=mine)
    with pytest.raises(ConfigError, match=r"rng\.id"):
        RngConfig(id="__rng")


async def test_ids_show_from_the_first_boot_on(config: VmConfig, autojump_clock: trio.testing.MockClock) -> None:
    async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
        assert [disk.id for disk in vm.config.disks] == [None]
        assert "device_tree" not in vm.info()
        await vm.boot()
        built = attrs.evolve(config.disks[0], id="_disk0", image_type="Raw", pci_device_id=1)
        assert vm.config == attrs.evolve(config, disks=(built,), rng=RngConfig(pci_device_id=2))
        assert vm.info()["device_tree"]["_disk0"]["parent"] == "_virtio-pci-_disk0"
        await vm.shutdown()
        assert vm.state is VmState.SHUTDOWN
        assert "device_tree" not in vm.info()
        assert [disk.id for disk in vm.config.disks] == ["_disk0"]
        await vm.boot()
        assert set(vm.counters()) == {"_disk0", "__rng", "__serial", "__bus"}


async def test_a_boot_that_fails_leaves_the_configuration_as_it_was(config: VmConfig, tmp_path: Path) -> None:
    config = attrs.evolve(config, payload=PayloadConfig(str(tmp_path / "none.elf")))
    async with open_vm(config, hypervisor=ScriptedHypervisor()) as vm:
        with pytest.raises(ConfigError, match="payload"):
            await vm.boot()
        assert vm.config == config
