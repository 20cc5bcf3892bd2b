"""PCI: configuration space, the function protocol, and bus 0 with its CF8/CFC mechanism."""

from trivmm.machine.pci.bus import CONFIG_PORTS, HostBridge, PciBus
from trivmm.machine.pci.config_space import Bar, PciConfigSpace
from trivmm.machine.pci.function import PciFunction

__all__ = ["CONFIG_PORTS", "Bar", "HostBridge", "PciBus", "PciConfigSpace", "PciFunction"]
