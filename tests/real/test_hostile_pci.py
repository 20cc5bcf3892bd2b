"""A guest that does anything to PCI: configuration space by both ways, BARs, windows, MSI-X, the hotplug controller.

On a real board. Whatever it does, nothing raises, BARs lie where BARs may lie, and the kernel's doorbells are where the
BARs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.machine.board import Board
from trivmm.machine.build import build_board
from trivmm.machine.saved import check_state, load_state, save_board
from trivmm.memory import layout
from trivmm.platform.pm_timer import PmTimer
from trivmm.state.machine import MachineState, SavedVcpu
from trivmm.testing.scripted import ScriptedHypervisor, ScriptedVm

BAR_SIZE, NOTIFY = 0x80000, 0x6000
PLACES = (
    0,
    0x1000,
    0xA0000,
    layout.BAR32_START,
    layout.BAR32_START + BAR_SIZE,
    layout.BAR32_START + layout.BAR32_SIZE - BAR_SIZE,
    layout.BAR32_START + layout.BAR32_SIZE,
    layout.PCI_MMCONFIG_START,
    layout.FIRMWARE_BARS_START,
    layout.GED_START,
    layout.IOAPIC_START,
    layout.LAPIC_START,
    0xFFFF_FFFF,
    layout.BAR64_START & 0xFFFF_FFFF,
    layout.BAR64_START >> 32,
    layout.BAR64_END - BAR_SIZE & 0xFFFF_FFFF,
    layout.BAR64_END - BAR_SIZE >> 32,
)
REGISTERS = (0x00, 0x04, 0x06, 0x0C, 0x10, 0x14, 0x18, 0x24, 0x30, 0x34, 0x3C, *range(0x40, 0xB0, 2), 0xFC, 0x100)
OFFSETS = (0x00, 0x14, 0x16, 0x1A, 0x10, 0x20, 0x30, 0x2000, 0x4000, 0x5FFF, 0x6000, 0x6004, 0x7FFF, 0x8000, 0x800C)
VALUES = st.one_of(st.sampled_from(PLACES), st.integers(0, (1 << 32) - 1), st.integers(0, 15))
SIZES = st.sampled_from((1, 2, 4, 8))
WAYS = st.sampled_from(("ecam", "cf8"))
STEPS = st.one_of(
    st.tuples(WAYS, st.integers(1, 3), st.sampled_from((0x10, 0x14)), st.just(4), st.sampled_from(PLACES)),
    st.tuples(WAYS, st.integers(1, 3), st.just(4), st.just(2), st.sampled_from((0, 2, 4, 6, 0xFFFF))),
    st.tuples(st.just("ecam"), st.integers(0, 5), st.sampled_from(REGISTERS), SIZES, VALUES),
    st.tuples(st.just("cf8"), st.integers(0, 5), st.sampled_from(REGISTERS), SIZES, VALUES),
    st.tuples(st.just("bar"), st.integers(0, 5), st.sampled_from((*OFFSETS, 0x48000, BAR_SIZE - 4)), SIZES, VALUES),
    st.tuples(st.just("plug"), st.just(0), st.integers(0, 15), SIZES, VALUES),
)


@contextmanager
def a_board(folder: Path) -> Iterator[Board]:
    images = [folder / f"{name}.img" for name in "ab"]
    for image in images:
        image.write_bytes(bytes(1 << 20))
    config = VmConfig(
        PayloadConfig("none"), memory=MemoryConfig(2 << 20), disks=[DiskConfig(str(image)) for image in images]
    )
    board = build_board(config, ScriptedHypervisor(needs_payload=False))
    board.fixed["pm_timer"] = PmTimer(lambda: 0)  # whose count is the time, which these tests compare
    try:
        yield board
    finally:
        board.close()


def step(board: Board, what: str, slot: int, at: int, size: int, value: int) -> None:
    data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    space, gpa = board.mmio, layout.PCI_HOTPLUG_START + at
    if what == "ecam":
        gpa = layout.PCI_MMCONFIG_START + (slot << 15) + at
    elif what == "cf8":
        board.pio.write(0xCF8, (1 << 31 | slot << 11 | at & 0xFC).to_bytes(4, "little"))
        space, gpa = board.pio, 0xCFC + at % 4
    elif what == "bar":
        mapped = [each.transport.config.bars[0].mapped for each in board.devices if each.pci_slot == slot]
        gpa = mapped[0] + at if mapped and mapped[0] is not None else at
    space.write(gpa, data)
    assert len(space.read(gpa, size)) == size


def look(board: Board) -> None:
    vm = board.vm
    assert isinstance(vm, ScriptedVm)
    doorbells = {}
    for device in board.devices:
        config = device.transport.config
        mapped = config.bars[0].mapped
        assert not int.from_bytes(config.read(4, 2), "little") & ~0x0547
        assert config.read(0, 2) == b"\xf4\x1a"
        assert config.read(0x30, 4) == bytes(4)
        if mapped is None:
            continue
        assert mapped % BAR_SIZE == 0
        assert (
            layout.BAR32_START <= mapped <= layout.BAR32_START + layout.BAR32_SIZE - BAR_SIZE
            or layout.FIRMWARE_BARS_START <= mapped <= layout.FIRMWARE_BARS_END - BAR_SIZE
            or layout.BAR64_START <= mapped <= layout.BAR64_END - BAR_SIZE
        )
        found = board.mmio.find(mapped, BAR_SIZE)
        assert found is not None
        assert found.name.startswith(device.backend.name)
        for index, queue in enumerate(device.transport.handles.queues):
            doorbells[mapped + NOTIFY + 4 * index] = queue.doorbell
    assert vm.doorbells == doorbells
    assert sum(" BAR " in each.name for each in board.mmio.ranges) == sum(
        each.transport.config.bars[0].mapped is not None for each in board.devices
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=40))
def test_whatever_it_does_bars_and_doorbells_agree(tmp_path: Path, steps: list[tuple[str, int, int, int, int]]) -> None:
    with a_board(tmp_path) as board, a_twin(tmp_path) as twin:
        for each in steps:
            step(board, *each)
        look(board)
        devices, parts = save_board(board)
        vcpus = tuple(SavedVcpu(cpu.index, cpu.save(), None) for cpu in board.cpus)
        state = MachineState(vcpus, board.vm.save(), devices, parts, None, run=True)
        check_state(twin, state)
        load_state(twin, state)
        look(twin)
        there, its = save_board(twin)
        assert (there, its.pci, its.hotplug) == (devices, parts.pci, parts.hotplug), "what it has made of it travels"


@contextmanager
def a_twin(folder: Path) -> Iterator[Board]:
    there = folder / "there"
    there.mkdir(exist_ok=True)
    with a_board(there) as board:
        yield board


def test_two_bars_that_chase_each_other_for_long(tmp_path: Path) -> None:
    """Each on the other's place, ten thousand times: what is refused is counted, not logged, and nothing piles up."""
    with a_board(tmp_path) as board:
        vm = board.vm
        assert isinstance(vm, ScriptedVm)
        for turn in range(10_000):
            step(board, "ecam", 1 + turn % 2, 0x10, 4, layout.BAR32_START + BAR_SIZE * (turn // 2 % 2))
        look(board)
        assert len(board.mmio.ranges) < 12
        assert board.pci.counters()["bars_refused"] > 1000


@pytest.mark.parametrize("vector", [2, 3, 0x7FF, 0xFFFE])
def test_a_vector_beyond_the_table_is_none(tmp_path: Path, vector: int) -> None:
    with a_board(tmp_path) as board:
        bar = board.devices[0].transport.config.bars[0].mapped
        assert bar is not None
        for register in (0x10, 0x1A):
            board.mmio.write(bar + register, vector.to_bytes(2, "little"))
            assert board.mmio.read(bar + register, 2) == b"\xff\xff"
        for offset in (0x8000 + 16 * 2, 0x8000 + 0x3FFF0, 0x48008, 0x487F8):
            board.mmio.write(bar + offset, b"\xaa" * 8)
            assert board.mmio.read(bar + offset, 8) in (b"\xff" * 8, bytes(8))
