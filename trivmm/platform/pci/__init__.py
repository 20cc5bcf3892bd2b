"""PCI: configuration space, the function protocol, bus 0 with its CF8/CFC mechanism, that bus as memory (ECAM), and
the controller that plugs and ejects its devices."""

from trivmm.platform.pci.bus import CONFIG_PORTS, SLOTS, PciBus, pick_slots
from trivmm.platform.pci.config_space import Bar, PciConfigSpace
from trivmm.platform.pci.ecam import Ecam
from trivmm.platform.pci.function import PciFunction
from trivmm.platform.pci.hotplug import HOTPLUG_SIZE, PciHotplug

__all__ = [
    "CONFIG_PORTS",
    "HOTPLUG_SIZE",
    "SLOTS",
    "Bar",
    "Ecam",
    "PciBus",
    "PciConfigSpace",
    "PciFunction",
    "PciHotplug",
    "pick_slots",
]
