"""PCI: configuration space, the function protocol, and bus 0 with its CF8/CFC mechanism."""

from trivmm.platform.pci.bus import CONFIG_PORTS, PciBus
from trivmm.platform.pci.config_space import Bar, PciConfigSpace
from trivmm.platform.pci.function import PciFunction

__all__ = ["CONFIG_PORTS", "Bar", "PciBus", "PciConfigSpace", "PciFunction"]
