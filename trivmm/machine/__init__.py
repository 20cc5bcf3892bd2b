"""The board: guest memory, memory map, loaders, PCI, serial, RTC and the other fixed devices."""
