"""The fixed parts of the machine: PCI, serial port and console lines, clock, reset, power and debug ports."""
