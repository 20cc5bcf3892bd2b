"""CMOS, keyboard controller, ACPI port and debug ports."""

from __future__ import annotations

import calendar
import os
from typing import Any

import pytest

from trivmm.bus.space import GuestRequest
from trivmm.errors import ProtocolError
from trivmm.platform.acpi_port import AcpiPort
from trivmm.platform.cmos import Cmos
from trivmm.platform.debug_ports import DebugConsole, DebugPort
from trivmm.platform.ged import POWER_BUTTON, Ged
from trivmm.platform.i8042 import I8042
from trivmm.state.platform import GedState
from trivmm.testing.states import sent

GIB = 1 << 30


def at(second: float = 58.0) -> Cmos:
    moment = calendar.timegm((2026, 11, 23, 15, 4, 0)) + second
    return Cmos(5 * GIB, clock_ns=lambda: int(moment * 1_000_000_000))


def reg(cmos: Cmos, index: int) -> int:
    cmos.write(0, bytes([index]))
    return cmos.read(1, 1)[0]


def test_time_in_bcd_and_binary() -> None:
    cmos = at()
    assert [reg(cmos, each) for each in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0x58, 4, 0x15, 2, 0x23, 0x11, 0x26, 0x20]
    assert reg(cmos, 0x0B) == 2
    cmos.write(0, b"\x0b")
    cmos.write(1, b"\x06")
    assert [reg(cmos, each) for each in (0, 4, 7, 0x32)] == [58, 15, 23, 20]
    cmos.write(0, b"\x0b")
    cmos.write(1, b"\x00")
    assert reg(cmos, 4) == 0x83
    cmos.write(0, b"\x00")
    cmos.write(1, b"\x11")
    assert reg(cmos, 0) == 0x58


def test_update_in_progress() -> None:
    assert reg(at(58.5), 0x0A) == 0x26
    assert reg(at(58.9999), 0x0A) == 0xA6
    assert reg(at(), 0x0D) == 0x80


def test_memory_sizes() -> None:
    cmos = at()
    assert reg(cmos, 0x34) | reg(cmos, 0x35) << 8 == (3 * GIB - (16 << 20)) >> 16
    assert reg(cmos, 0x5B) | reg(cmos, 0x5C) << 8 | reg(cmos, 0x5D) << 16 == 2 * GIB >> 16
    small = Cmos(8 << 20)
    assert reg(small, 0x34) | reg(small, 0x35) == 0


def test_cmos_ram_state_and_reset() -> None:
    cmos = at()
    cmos.write(0, b"\x40")
    assert cmos.write(1, b"\x77") is None
    twin = at()
    twin.load(sent(cmos.save()))
    assert (twin.read(0, 1), twin.read(1, 1)) == (b"\x40", b"\x77")
    assert cmos.read(0, 2) == b"\xff\xff"
    assert cmos.write(0, b"ab") is None
    cmos.write(0, b"\x8f")
    assert cmos.write(1, b"\0") == GuestRequest("reset", "CMOS shutdown status")


@pytest.mark.parametrize("change", [{"index": 256}, {"data": "zz"}, {"data": "AAAA"}, {"data": 1}, {"x": 1}])
def test_hostile_cmos_state(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        sent(at().save(), **change)


def test_i8042() -> None:
    device = I8042()
    assert device.read(0, 1) == b"\x20"
    assert device.read(3, 1) == b"\0"
    assert device.write(3, b"\xd1") is None
    assert device.write(0, b"\xfe") is None
    assert device.write(3, b"\xfe") == GuestRequest("reset", "i8042")


def test_acpi_port() -> None:
    device = AcpiPort()
    assert device.read(0, 1) == b"\0"
    for data in (b"\0", b"\x01\0", b"\x20", b"\x14"):
        assert device.write(0, data) is None
    assert device.write(1, b"\x01") is None
    reset, poweroff = device.write(0, b"\x01"), device.write(0, b"\x34")
    assert isinstance(reset, GuestRequest)
    assert reset.kind == "reset"
    assert isinstance(poweroff, GuestRequest)
    assert poweroff.kind == "poweroff"


def test_ged_events_are_read_once_and_each_interrupts() -> None:
    ged = Ged()
    try:
        assert ged.read(0, 1) == b"\0"
        ged.notify(POWER_BUTTON)
        ged.notify(POWER_BUTTON)
        ged.notify(1)
        assert os.eventfd_read(ged.irq_fd) == 3
        assert ged.write(0, b"\0") is None
        assert [ged.read(0, 1), ged.read(0, 1)] == [b"\x09", b"\0"]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ged.irq_fd)
        os.eventfd_write(ged.irq_fd, (1 << 64) - 2)
        ged.notify(POWER_BUTTON)  # to a guest that has taken none for a very long time
        assert ged.read(0, 1) == b"\x08"
    finally:
        ged.close()
    ged.close()


def test_ged_state() -> None:
    ged, twin = Ged(), Ged()
    try:
        ged.notify(POWER_BUTTON)
        assert ged.save() == GedState(8)
        assert ged.read(0, 1) == b"\x08", "saving does not read it: the save may be undone"
        twin.load(sent(GedState(8)))
        assert os.eventfd_read(twin.irq_fd) == 1, "no interrupt controller has taken the source's, perhaps"
        assert twin.read(0, 1) == b"\x08"
        twin.load(GedState(0))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(twin.irq_fd)
        for hostile in ({"events": 256}, {"events": -1}, {"events": "8"}, {"more": 1}):
            with pytest.raises(ProtocolError):
                sent(GedState(0), **hostile)
        assert twin.read(0, 1) == b"\0"
    finally:
        ged.close()
        twin.close()


def test_debug_port() -> None:
    port = DebugPort()
    port.write(0, b"\x12\x34")
    assert (port.last, port.count, port.read(0, 1)) == (0x34, 2, b"\x34")
    twin = DebugPort()
    twin.load(sent(port.save()))
    assert twin.save() == port.save()
    with pytest.raises(ProtocolError):
        sent(port.save(), last=300)


def test_debug_console() -> None:
    lines: list[str] = []
    console = DebugConsole(lines.append)
    assert console.read(0, 1) == b"\xe9"
    console.write(0, b"hel")
    console.write(0, b"lo\r\n\xff\n")
    console.write(0, b"x" * 2000)
    assert lines == ["hello", "\\xff", "x" * 1024]
