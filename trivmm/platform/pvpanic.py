"""pvpanic: the PCI device by which a guest says that it has panicked, or has loaded a crash kernel.

One byte (QEMU's docs/specs/pvpanic.rst): reading it gives the events that there are, writing it says one. The ids, the
class and the words are Cloud Hypervisor's, and so is what follows: it is told, and the VM stays as it is.

A guest may write as fast as it can. Each word is told once in the life of a machine, which ends with a reset, and
counted every time; what was told travels with a migration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from trivmm.bus.space import Effect
from trivmm.platform.pci import PciBus, PciConfigSpace
from trivmm.state.platform import PvpanicState
from trivmm.state.strict import refused

__all__ = ["PVPANIC", "Pvpanic"]

PVPANIC: Final = "__pvpanic"  # its id, Cloud Hypervisor's
PANICKED: Final = 1 << 0
CRASH_LOADED: Final = 1 << 1
WORDS: Final = {PANICKED: "panic", CRASH_LOADED: "crash_loaded"}
UNKNOWN: Final = "unknown_event"
TOLD: Final = (*WORDS.values(), UNKNOWN)  # the bits of what is saved, in this order
BAR: Final = 0
BAR_SIZE: Final = 16  # the smallest that PCI knows, of which one byte is used
OTHER_PERIPHERAL: Final = 0x088000  # PCI class


class Pvpanic:
    """A ``PciFunction``, in ``slot`` once it is plugged in. ``tell(word)`` is called in any thread."""

    name = PVPANIC

    def __init__(self, tell: Callable[[str], None], lock_s: float) -> None:
        self.slot = 0
        self.config = PciConfigSpace(
            vendor_id=0x1B36, device_id=0x0011, class_code=OTHER_PERIPHERAL, revision=1, lock_s=lock_s
        )
        self.config.add_bar(BAR, BAR_SIZE, is_64bit=False)
        self._tell = tell
        self._told: dict[str, object] = {}
        self._counts = dict.fromkeys(TOLD, 0)

    def plug(self, bus: PciBus, slot: int | None = None) -> None:
        """:raises ConfigError: when the slot is taken, or none is left."""
        self.slot = bus.add(self, slot)

    def move(self, bus: PciBus, slot: int) -> None:
        """To where the sender has it, which may have had other devices before. :raises ConfigError: it is taken."""
        if slot != self.slot:
            bus.remove(self.slot)
            self.plug(bus, slot)

    def config_read(self, offset: int, size: int) -> bytes:
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> Effect:
        self.config.write(offset, data)
        return None

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        return (bytes([PANICKED | CRASH_LOADED]) if offset == 0 else b"").ljust(size, b"\0")

    def bar_write(self, bar: int, offset: int, data: bytes) -> Effect:
        if offset == 0:
            word = WORDS.get(data[0], UNKNOWN)
            self._counts[word] += 1  # of two vCPUs that write at once, one may be missed
            mine = object()
            if self._told.setdefault(word, mine) is mine:
                self._tell(word)
        return None

    def bars_changed(self) -> None:
        return None

    def counters(self) -> dict[str, int]:
        """How often the guest said each, since the machine was built."""
        return dict(self._counts)

    # --- state -------------------------------------------------------------------------------------------------

    def save(self) -> PvpanicState:
        told = sum(1 << bit for bit, word in enumerate(TOLD) if word in self._told)
        return PvpanicState(told, self.config.save())

    def check(self, state: PvpanicState, where: str) -> None:
        """:raises ProtocolError: when it says what no guest can have done."""
        if state.told >> len(TOLD):
            raise refused(f"{where}.told", state.told, f"less than {1 << len(TOLD)}")
        self.config.check(state.config, f"{where}.config")

    def load(self, state: PvpanicState) -> None:
        """Take over what :meth:`check` has passed; before the PCI bus, which places its BAR."""
        self._told = {word: None for bit, word in enumerate(TOLD) if state.told >> bit & 1}
        self.config.load(state.config)
