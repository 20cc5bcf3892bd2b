"""ACPI tables: RSDP, XSDT, FADT, MADT, MCFG and a DSDT, so that a guest finds CPUs, power registers and the PCI bus.

Pure bytes, made at boot and at every reboot, and never looked at again: from then on they are guest RAM, which a
migration carries. They lie from ``layout.ACPI_START`` on, in RAM that the memory map does not mention.

The machine is *hardware-reduced* (ACPI 6.5 section 4.1): no PM1 registers; reset and S5 are the one byte of
``acpi_port``, the power button and PCI hotplug come through the generic event device of ``ged``. As far as it goes the
namespace is Cloud Hypervisor's, names included: PC00 with a device a slot, PHPR the hotplug controller of ``hotplug``.
"""

from __future__ import annotations

import struct
from typing import Final

from trivmm.boot import aml
from trivmm.memory import layout
from trivmm.platform.acpi_port import ACPI_PORTS, RESET, S5
from trivmm.platform.ged import GED_IRQ, GED_SIZE, PCI_DEVICES_CHANGED, POWER_BUTTON
from trivmm.platform.pci import CONFIG_PORTS, HOTPLUG_SIZE, SLOTS
from trivmm.platform.serial import COM1, COM1_IRQ

__all__ = ["DSDT_POINTER", "DSDT_POINTER_32", "HEADER", "RSDP_SIZE", "XSDT_POINTER", "acpi_tables"]

HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
RSDP_SIZE: Final = 36
XSDT_POINTER: Final = 24  # of the RSDP
DSDT_POINTER, DSDT_POINTER_32 = 140, 40  # of the FADT; SeaBIOS looks at the short one
CREATOR: Final = b"TRIV"
ALIGNMENT: Final = 16

WBINVD: Final = 1 << 0  # FADT flags
NO_FIXED_BUTTONS: Final = 1 << 4 | 1 << 5  # power and sleep: a device of the namespace, or none
RESET_REGISTER, HARDWARE_REDUCED = 1 << 10, 1 << 20
NO_VGA: Final = 1 << 2
SYSTEM_IO: Final = 1
LAPIC_IDS: Final = 255  # of 8 bits; from here on an x2APIC entry is needed
ENABLED: Final = 1

READ_WRITE: Final = 1
ZERO: Final = b"\x00"
PRESSED: Final = 0x80  # what a power button is notified of (section 5.6.6)
DEVICE_CHECK, EJECT_REQUEST = 1, 3  # and a device: look whether there is one, let go of it
THERE: Final = 0x0B  # _STA: present, enabled, working, and not to be shown to a user


def acpi_tables(vcpus: int) -> bytes:
    """Everything from ``layout.ACPI_START`` on, the RSDP first; vCPU n has APIC id n."""
    image = bytearray(RSDP_SIZE)

    def place(table: bytes) -> int:
        image.extend(bytes(-len(image) % ALIGNMENT))
        at = layout.ACPI_START + len(image)
        image.extend(table)
        return at

    dsdt = place(_table(b"DSDT", 2, _namespace()))
    tables = [place(_fadt(dsdt)), place(_madt(vcpus)), place(_mcfg())]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    image[:RSDP_SIZE] = _rsdp(xsdt)
    return bytes(image)


def _sum(data: bytes) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = HEADER.pack(signature, HEADER.size + len(body), revision, 0, b"TRIVMM", b"TRIVMM  ", 1, CREATOR, 1)
    return header[:9] + bytes([_sum(header + body)]) + header[10:] + body


def _rsdp(xsdt: int) -> bytes:
    """ACPI 6.5 section 5.2.5.3: the first sum is over 20 bytes, the second over all."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"TRIVMM", 2, 0)
    first = first[:8] + bytes([_sum(first)]) + first[9:]
    rest = struct.pack("<IQ", RSDP_SIZE, xsdt)
    return first + rest + bytes([_sum(first + rest), 0, 0, 0])


def _fadt(dsdt: int) -> bytes:
    """Section 5.2.9, revision 6.5. Offsets below are the table's."""
    table = bytearray(276)
    register = struct.pack("<BBBBQ", SYSTEM_IO, 8, 0, 1, ACPI_PORTS[0])
    struct.pack_into("<H", table, 109, NO_VGA)
    struct.pack_into("<I", table, 112, WBINVD | NO_FIXED_BUTTONS | RESET_REGISTER | HARDWARE_REDUCED)
    table[116:128] = register
    table[128] = RESET
    table[131] = 5  # minor revision
    struct.pack_into("<I", table, DSDT_POINTER_32, dsdt)
    struct.pack_into("<Q", table, DSDT_POINTER, dsdt)
    table[244:256] = table[256:268] = register  # sleep control, sleep status
    table[268:276] = b"TRIVMM\0\0"
    return _table(b"FACP", 6, bytes(table[HEADER.size :]))


def _madt(vcpus: int) -> bytes:
    """Section 5.2.12: every vCPU, the I/O APIC, and the serial port's line as it is (ISA: edge, active high)."""
    body = bytearray(struct.pack("<II", layout.LAPIC_START, 0))
    for index in range(vcpus):
        if index < LAPIC_IDS:
            body += struct.pack("<BBBBI", 0, 8, index, index, ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, index, ENABLED, index)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC_START, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, COM1_IRQ, COM1_IRQ, 0)
    return _table(b"APIC", 5, bytes(body))


def _mcfg() -> bytes:
    """PCI Firmware 3.2 section 4.1.2: segment 0, bus 0."""
    window = struct.pack("<QHBBI", layout.PCI_MMCONFIG_START, 0, 0, 0, 0)
    return _table(b"MCFG", 1, bytes(8) + window)


def _namespace() -> bytes:
    bus = (
        aml.address_range(0x88, 2, 0, "H", 0, 0)
        + aml.io_ports(*CONFIG_PORTS)
        + aml.address_range(0x87, 0, READ_WRITE, "I", layout.BAR32_START, layout.BAR32_START + layout.BAR32_SIZE - 1)
        + aml.address_range(0x87, 0, READ_WRITE, "I", layout.FIRMWARE_BARS_START, layout.FIRMWARE_BARS_END - 1)
        + aml.address_range(0x8A, 0, READ_WRITE, "Q", layout.BAR64_START, layout.BAR64_END - 1)
    )
    bus_is = aml.name(b"_CID", aml.eisa("PNP0A03")) + aml.name(b"_SEG", ZERO) + aml.name(b"_BBN", ZERO)
    ecam = aml.memory_range(layout.PCI_MMCONFIG_START, layout.PCI_MMCONFIG_SIZE)
    devices = (
        aml.device(b"PC00", aml.eisa("PNP0A08"), bus, bus_is + _slots())
        + aml.device(b"MBRD", aml.eisa("PNP0C02"), ecam)  # an OS uses ECAM only where a device has it
        + _hotplug_controller()
        + aml.device(b"COM1", aml.eisa("PNP0501"), aml.io_ports(*COM1) + aml.isa_irq(COM1_IRQ))
        + aml.device(b"PWRB", aml.eisa("PNP0C0C"))
        + _event_devices()
    )
    return aml.scope(b"\\_SB_", devices) + aml.name(b"_S5_", aml.package(aml.byte(S5), *[ZERO] * 3))


def _slot(number: int) -> bytes:
    return b"S%03d" % number


def _slots() -> bytes:
    """Every slot but the host bridge's can be ejected (section 6.3.3). None says whether it is occupied: an OS reads
    its configuration space for that. DVNT notifies those whose bit is set in its first argument."""
    eject = aml.path(b"_SB_", b"PHPR", b"PCEJ")
    devices = [
        aml.slot(
            _slot(number),
            aml.name(b"_SUN", aml.integer(number))
            + aml.name(b"_ADR", aml.integer(number << 16))
            + aml.method(b"_EJ0", 1, aml.call(eject, b"_SUN")),
        )
        for number in range(1, SLOTS)
    ]
    notify = [
        aml.if_(aml.and_(aml.ARG0, aml.integer(1 << number)), aml.notify(_slot(number), aml.ARG1))
        for number in range(1, SLOTS)
    ]
    return b"".join(devices) + aml.method(b"DVNT", 2, b"".join(notify))


def _hotplug_controller() -> bytes:
    """Its registers, PCEJ to eject a slot, PSCN to tell the slots what has changed."""
    notify = aml.path(b"_SB_", b"PC00", b"DVNT")
    scan = aml.call(notify, b"PCIU", aml.integer(DEVICE_CHECK)) + aml.call(notify, b"PCID", aml.integer(EJECT_REQUEST))
    body = (
        aml.name(b"_STA", aml.byte(THERE))
        + aml.memory_dwords(b"PCST", (b"PCIU", b"PCID", b"B0EJ", b"PSEG"), layout.PCI_HOTPLUG_START)
        + aml.method(b"PCEJ", 1, aml.shift_left(aml.integer(1), aml.ARG0, b"B0EJ"))
        + aml.method(b"PSCN", 0, scan)
    )
    return aml.device(b"PHPR", aml.eisa("PNP0A06"), aml.memory_range(layout.PCI_HOTPLUG_START, HOTPLUG_SIZE), body, 1)


def _event_devices() -> bytes:
    """Two, since an OS takes each resource of the GED for an event: one that has the register, one its interrupt."""
    register = aml.memory_range(layout.GED_START, GED_SIZE)
    pressed = aml.notify(aml.path(b"_SB_", b"PWRB"), aml.byte(PRESSED))
    scan = (
        aml.store(b"GDAT", aml.LOCAL0)
        + aml.if_(aml.and_(aml.LOCAL0, aml.byte(PCI_DEVICES_CHANGED)), aml.path(b"_SB_", b"PHPR", b"PSCN"))
        + aml.if_(aml.and_(aml.LOCAL0, aml.byte(POWER_BUTTON)), pressed)
    )
    controller = aml.memory_byte(b"GDST", b"GDAT", layout.GED_START) + aml.method(b"ESCN", 0, scan)
    call = aml.method(b"_EVT", 1, aml.path(b"_SB_", b"GEC_", b"ESCN"))
    return aml.device(b"GEC_", aml.eisa("PNP0A06"), register, controller) + aml.device(
        b"GED_", aml.text("ACPI0013"), aml.edge_interrupt(GED_IRQ), call
    )
