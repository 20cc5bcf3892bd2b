"""The x86 memory map, Cloud Hypervisor's: where RAM, boot data, the MMIO hole and 64-bit BARs lie."""

from __future__ import annotations

from typing import Final

__all__ = ["ram_ranges"]

BOOT_GDT: Final = 0x500
PVH_START_INFO: Final = 0x6000
PVH_MODLIST: Final = 0x6040
PVH_MEMMAP: Final = 0x7000
ZERO_PAGE: Final = 0x7000  # Linux' boot parameters, where it is booted by its own entry
PAGE_TABLES: Final = 0xA000  # six pages, likewise
CMDLINE_START: Final = 0x20000
CMDLINE_MAX_SIZE: Final = 0x10000
EBDA_START: Final = 0xA0000  # end of usable low RAM
ACPI_START: Final = EBDA_START  # the RSDP and all it leads to; RAM that the memory map leaves out
SHADOW_START: Final = 0xC0000  # RAM that begins as a copy of a firmware image's end, as a PC's shadow RAM
SHADOW_SIZE: Final = 0x40000
SMBIOS_START: Final = 0xF0000  # where an OS looks for its entry point
HIGH_RAM_START: Final = 0x100000

MMIO_HOLE_START: Final = 0xC000_0000  # 3 GiB
BAR32_START: Final = 0xC000_0000
BAR32_SIZE: Final = 640 << 20
PCI_MMCONFIG_START: Final = 0xE800_0000
PCI_MMCONFIG_SIZE: Final = 1 << 20  # of the one bus; Cloud Hypervisor's, and its 256 MiB are reserved
# Ours: SeaBIOS, which knows no other machine's windows, places BARs from here down, largest address first.
FIRMWARE_BARS_START: Final = 0xF800_0000
FIRMWARE_BARS_END: Final = 0xFEC0_0000
IOAPIC_START: Final = 0xFEC0_0000
# Ours: Cloud Hypervisor's platform devices end its address space, where here a BAR window does. The DSDT tells it.
GED_START: Final = 0xFED0_0000
PCI_HOTPLUG_START: Final = 0xFED0_1000
LAPIC_START: Final = 0xFEE0_0000
KVM_TSS_START: Final = 0xFEF0_0000
KVM_IDENTITY_MAP: Final = 0xFEF0_3000
ROM_SIZE: Final = 16 << 20
ROM_START: Final = 0x1_0000_0000 - ROM_SIZE  # a firmware image lies at its end, where a CPU's reset vector points
RAM_64BIT_START: Final = 0x1_0000_0000

BAR64_END: Final = 1 << 40  # unicorn has 40 physical address bits, and so have small machines
BAR64_SIZE: Final = 64 << 30
BAR64_START: Final = BAR64_END - BAR64_SIZE
# Memory that devices bring (virtio-pmem) lies below that window and above RAM, from the top down. Cloud Hypervisor's is
# among the BARs: here no BAR can be moved over it.
DEVICE_MEMORY_END: Final = BAR64_START
DEVICE_MEMORY_ALIGNMENT: Final = 2 << 20


def ram_ranges(size: int) -> tuple[tuple[int, int], ...]:
    """``(gpa, size)`` of each RAM region for ``size`` bytes: below the MMIO hole, and the rest from 4 GiB."""
    low = min(size, MMIO_HOLE_START)
    if size == low:
        return ((0, low),)
    return ((0, low), (RAM_64BIT_START, size - low))
