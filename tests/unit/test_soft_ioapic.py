"""The soft VM's I/O APIC by its registers, as a guest programs it."""

from __future__ import annotations

import json

import pytest

from trivmm.hypervisor.soft.ioapic import LEVEL, MASKED, REGSEL, REMOTE_IRR, WINDOW, IoApic


def get(chip: IoApic, register: int) -> int:
    chip.write(REGSEL, register)
    return chip.read(WINDOW)


def put(chip: IoApic, register: int, value: int) -> None:
    chip.write(REGSEL, register)
    chip.write(WINDOW, value)


def test_reset_every_line_is_masked() -> None:
    chip = IoApic()
    assert get(chip, 1) == 0x0017_0011
    assert [get(chip, 0x10 + 2 * pin) for pin in range(24)] == [MASKED] * 24
    assert [chip.pulse(pin) for pin in range(24)] == [None] * 24


def test_an_edge_becomes_a_message_to_the_entry_s_destination() -> None:
    chip = IoApic()
    put(chip, 0x10 + 8 + 1, 3 << 24)
    put(chip, 0x10 + 8, 0x24)
    assert chip.pulse(4) == (0xFEE0_3000, 0x24)
    assert chip.pulse(4) == (0xFEE0_3000, 0x24)
    assert chip.pulse(5) is None
    put(chip, 0x10 + 8, 0x0000_0924)  # lowest priority, logical
    assert chip.pulse(4) == (0xFEE0_3004, 0x124)
    put(chip, 0x10 + 8, MASKED | 0x24)
    assert chip.pulse(4) is None


def test_a_level_entry_waits_for_its_eoi() -> None:
    chip = IoApic()
    put(chip, 0x10, LEVEL | 0x31)
    assert chip.pulse(0) == (0xFEE0_0000, 0x31)
    assert get(chip, 0x10) & REMOTE_IRR
    assert chip.pulse(0) is None
    chip.end_of_interrupt(0x32)
    assert chip.pulse(0) is None
    chip.end_of_interrupt(0x31)
    assert chip.pulse(0) == (0xFEE0_0000, 0x31)
    put(chip, 0x10, LEVEL | 0x31 | REMOTE_IRR)  # not the guest's to write
    assert get(chip, 0x10) & REMOTE_IRR
    put(chip, 0x10, 0x31)  # edge triggered: nothing is in service
    assert not get(chip, 0x10) & REMOTE_IRR


@pytest.mark.parametrize("register", [0x40, 0xFF, 3, 0xF])
def test_registers_that_are_not_there_read_zero_and_take_nothing(register: int) -> None:
    chip = IoApic()
    before = chip.save()
    put(chip, register, 0xFFFF_FFFF)
    assert get(chip, register) == 0
    assert chip.save() | {"select": 0} == before | {"select": 0}
    assert chip.read(0x20) == 0
    assert chip.pulse(24) is None


def test_saved_and_loaded_it_goes_on() -> None:
    chip, other = IoApic(), IoApic()
    put(chip, 0, 5 << 24)
    put(chip, 0x10, LEVEL | 0x31)
    chip.pulse(0)
    state = json.loads(json.dumps(chip.save()))
    other.load(state)
    assert other.save() == chip.save()
    assert get(other, 0) == 5 << 24
    assert other.pulse(0) is None


@pytest.mark.parametrize("table", [[], ["0"] * 23, ["1" + "0" * 16] * 24, ["-1"] * 24, ["1000"] * 24, ["x"] * 24])
def test_a_wild_table_is_refused(table: list[str]) -> None:
    chip = IoApic()
    before = chip.save()
    with pytest.raises(ValueError):  # noqa: PT011 - of int(), or ours
        chip.load({"select": 0, "ident": 0, "table": table})
    assert chip.save() == before
