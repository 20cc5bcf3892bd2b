"""The board: everything of a machine that is not a task (those are ``trivmm.nursery.tree``'s).

Its devices answer what vCPUs ask on its bus, on their threads, and it is saved, loaded and closed as a whole.
``trivmm.machine.build`` makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from trivmm.boot.payload import check_payload, load_payload
from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, GuestRequest
from trivmm.config import VmConfig
from trivmm.hypervisor.base import AnyVcpu, Hypervisor, VmBackend
from trivmm.memory.device_memory import DeviceMemory
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import ActivationActor
from trivmm.platform.ged import GED_IRQ, POWER_BUTTON, Ged
from trivmm.platform.line import Line
from trivmm.platform.pci import Bar, PciBus, PciHotplug
from trivmm.platform.pvpanic import PVPANIC, Pvpanic
from trivmm.platform.rom import Rom
from trivmm.platform.serial import COM1_IRQ, Serial
from trivmm.platform.sinks import ClientSink, LineConfig, Sink, open_sink
from trivmm.state.platform import CmosState
from trivmm.virtio.balloon.device import BalloonDevice
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.kind import AnyKind
from trivmm.virtio.kinds import KINDS, without
from trivmm.virtio.pci import VirtioPciTransport
from trivmm.virtio.port import Storage

__all__ = ["Board", "DeviceSlot", "EventSink", "Kept", "line_configs"]

logger = logging.getLogger(__name__)

SERIAL: Final = "__serial"  # ids of Cloud Hypervisor's, which a configuration can't give to anything else
IOAPIC: Final = "__ioapic"

EventSink = Callable[..., None]
"""Called with what happened, the device's id, its generation, and properties of the event by name."""


@attrs.frozen(eq=False)
class DeviceSlot:
    """One virtio device: what it does, how the guest talks to it, and where it stands in its life."""

    kind: AnyKind
    backend: WorkerDevice
    transport: VirtioPciTransport
    actor: ActivationActor
    pci_slot: int

    @property
    def bdf(self) -> str:
        """As Cloud Hypervisor spells it."""
        return f"0000:00:{self.pci_slot:02x}.0"


@attrs.frozen(eq=False)
class Kept:
    """What a machine that is rebooted leaves to the one after it: the sinks of its console lines, which stay open, and
    its CMOS."""

    sinks: Mapping[str, Sink]
    cmos: CmosState


@attrs.define(eq=False)
class Board:
    """``config`` is what it is built of. ``devices`` in the order in which they were plugged; a list that changes is
    another one, so whoever goes through it, in whatever thread, sees one state of it. ``stuck`` names threads that
    outlived their deadline; ``in_use`` says that one of them works on the board itself: then it stays open."""

    config: VmConfig
    hypervisor: Hypervisor
    memory: GuestMemory
    vm: VmBackend
    pio: AddressSpace
    mmio: AddressSpace
    pci: PciBus
    rom: Rom
    serial: Serial
    ged: Ged
    hotplug: PciHotplug
    fixed: dict[str, Any]
    on_event: EventSink = lambda kind, device, generation, **properties: None
    cpus: list[AnyVcpu] = attrs.field(factory=list)
    devices: list[DeviceSlot] = attrs.field(factory=list)
    stuck: list[str] = attrs.field(factory=list)
    buses: list[Bus] = attrs.field(factory=list)
    in_use: bool = False
    on_request: Callable[[GuestRequest], None] = lambda request: None  # the machine's: what a device asks of it
    device_memory: DeviceMemory = attrs.field(
        default=attrs.Factory(
            lambda self: DeviceMemory(self.vm, self.memory, self.config.deadlines.kernel), takes_self=True
        ),
        init=False,
    )
    _connected: set[int] = attrs.field(factory=set)  # ISA lines
    _closed: bool = False
    _freed: bool = False

    def bus(self) -> Bus:
        """For one vCPU."""
        made = Bus(self.pio, self.mmio, self.hypervisor.clock)
        self.buses.append(made)
        return made

    # --- boot ------------------------------------------------------------------------------------------------

    def load_payload(self, checkpoint: Callable[[], None]) -> None:
        """Put kernel, command line, initramfs and boot data into RAM and point the boot vCPU at them.

        Slow, and bounded: in a thread. What ``checkpoint`` raises between two pieces of work ends it.

        :raises ConfigError: naming the payload's field and what is wrong with the file."""
        if not self.hypervisor.needs_payload:
            return
        entry = load_payload(self.memory, self.config.payload, len(self.cpus), checkpoint, self.config.platform)
        if entry is not None:
            self.cpus[0].set_boot_state(entry)

    def check_payload(self, checkpoint: Callable[[], None]) -> None:
        """A destination boots nothing now, but the guest may ask it for a reboot later. As slow as loading it.

        :raises ConfigError: when the kernel can't be used on this host."""
        if self.hypervisor.needs_payload:
            check_payload(self.config.payload, checkpoint)

    # --- consoles --------------------------------------------------------------------------------------------

    @property
    def lines(self) -> dict[str, Line]:
        """``serial``, and those of the devices, such as ``console``."""
        found: dict[str, Line] = {"serial": self.serial}
        for slot in self.devices:
            found |= slot.backend.lines
        return found

    def terminal_resized(self) -> None:
        for slot in self.devices:
            slot.backend.terminal_resized()

    @property
    def pty_paths(self) -> dict[str, str]:
        """The lines that are pseudo-terminals, and their paths. Empty on the receiving side before COMMIT."""
        sinks = {name: line.sink for name, line in self.lines.items()}
        return {name: sink.path for name, sink in sinks.items() if isinstance(sink, ClientSink) and sink.path}

    def keep(self) -> Kept:
        """For the board that comes after this one."""
        for line in self.lines.values():
            line.keeps_sink = True
        sinks = {name: line.sink for name, line in self.lines.items() if line.sink is not None}
        return Kept(sinks, self.fixed["cmos"].save())

    def own_sinks(self) -> None:
        """From now on they are closed with the board. In the trio thread."""
        for line in self.lines.values():
            line.keeps_sink = False

    def thaw(self) -> None:
        """A saved state of the console lines was not used, or one was loaded: they go on."""
        for line in self.lines.values():
            line.thaw()

    # --- hotplug ---------------------------------------------------------------------------------------------

    @property
    def removable_slots(self) -> int:
        """A bit each."""
        return sum(1 << slot.pci_slot for slot in self.devices if slot.kind.hotplug is not None)

    @property
    def kept_config(self) -> VmConfig:
        """What its next boot builds: without the devices that are to go, let go of by the guest or not."""
        config, leaving = self.config, self.hotplug.leaving
        for slot in self.devices:
            if slot.pci_slot in leaving:
                config = without(config, slot.backend.name)
        return config

    def take_out(self, gone: DeviceSlot) -> None:
        """A device that is on the bus no more."""
        self.devices = [slot for slot in self.devices if slot is not gone]
        self.config = without(self.config, gone.backend.name)
        self.hotplug.freed(gone.pci_slot)

    # --- the guest's ends ------------------------------------------------------------------------------------

    def power_button(self) -> None:
        """The guest finds a press when it next looks, whether it runs or not."""
        self.ged.notify(POWER_BUTTON)

    # --- interrupts: these wait for the kernel -----------------------------------------------------------------

    @property
    def _lines(self) -> tuple[tuple[int, int], ...]:
        return (self.serial.irq_fd, COM1_IRQ), (self.ged.irq_fd, GED_IRQ)

    def connect_interrupts(self) -> None:
        """Also after a call of either kind that failed half way: what is connected already stays so."""
        for fd, gsi in self._lines:
            if gsi not in self._connected:
                self.vm.connect_irq(fd, gsi)
                self._connected.add(gsi)
        # One wait for all routes. A guest that changes one meanwhile costs another wait, no more.
        self.vm.prepare_msi([message for slot in self.devices for message in slot.transport.messages()])
        for slot in self.devices:
            slot.transport.connect_interrupts()

    def disconnect_interrupts(self) -> None:
        """After this no eventfd injects: what the kernel had queued is in the vCPUs, the rest stays in the
        eventfds and is saved as pending bits. What it raises leaves some connected: see :meth:`connect_interrupts`."""
        for slot in self.devices:
            slot.transport.disconnect_interrupts()
        for fd, gsi in self._lines:
            if gsi in self._connected:
                self.vm.disconnect_irq(fd, gsi)
                self._connected.discard(gsi)

    def committed(self) -> None:
        """The machine runs here from now on, and so do its console lines: their sinks are opened now.

        :raises ConfigError: when one can't be."""
        configs = line_configs(self.config)
        for name, line in self.lines.items():
            line.attach_sink(open_sink(configs[name], name, incoming=True))
        self.terminal_resized()

    # --- reading ---------------------------------------------------------------------------------------------

    def device_tree(self) -> dict[str, Any]:
        """Nodes by id, as Cloud Hypervisor's: ``id``, ``resources``, ``children``, ``parent`` below another node and
        ``pci_bdf`` on PCI. Ours beside them: ``status``, where a device stands in its life, and ``removal`` of one that
        is to go: ``asked`` for, or ``ejected`` by the guest and being taken away."""
        tree: dict[str, Any] = {name: {"id": name, "resources": [], "children": []} for name in (IOAPIC, SERIAL)}
        for slot in self.devices:
            name, transport = slot.backend.name, f"_virtio-pci-{slot.backend.name}"
            tree[transport] = {
                "id": transport,
                "resources": [_bar_resource(bar) for bar in slot.transport.config.bars.values()],
                "children": [name],
                "pci_bdf": slot.bdf,
            }
            status = slot.transport.state.stage.value
            own = slot.backend.resources
            tree[name] = {"id": name, "resources": own, "parent": transport, "children": [], "status": status}
            if slot.pci_slot in self.hotplug.leaving:
                tree[name]["removal"] = "ejected" if slot.pci_slot in self.hotplug.ejected else "asked"
        if (pvpanic := self.pvpanic) is not None:
            bars = [_bar_resource(bar) for bar in pvpanic.config.bars.values()]
            where = f"0000:00:{pvpanic.slot:02x}.0"
            tree[PVPANIC] = {"id": PVPANIC, "resources": bars, "children": [], "pci_bdf": where}
        return tree

    def counters(self) -> dict[str, dict[str, int]]:
        counted = {slot.backend.name: slot.backend.counters() | slot.actor.counters() for slot in self.devices}
        counted[SERIAL] = self.serial.counters()
        if self.pvpanic is not None:
            counted[PVPANIC] = self.pvpanic.counters()
        for cpu in self.cpus:
            if own := cpu.counters():
                counted[f"__vcpu{cpu.index}"] = own
        spaces = self.pio.counters() | self.mmio.counters() | self.rom.counters()
        counted["__bus"] = spaces | self.pci.counters() | self.hotplug.counters()
        return counted

    def guest_runs(self, running: bool) -> None:
        """See :meth:`WorkerDevice.guest_runs`."""
        for slot in self.devices:
            slot.backend.guest_runs(running)

    @property
    def pvpanic(self) -> Pvpanic | None:
        """The VM's, if it has one."""
        return self.fixed.get("pvpanic")

    @property
    def balloon(self) -> BalloonDevice | None:
        """The VM's, if it has one."""
        return next((slot.backend for slot in self.devices if isinstance(slot.backend, BalloonDevice)), None)

    @property
    def storages(self) -> list[Storage]:
        """Of the devices that have one."""
        return [slot.backend.storage for slot in self.devices if slot.backend.storage is not None]

    def give_locks(self) -> None:
        """Sockets of console lines are locks too: the side that runs the VM has the path."""
        for storage in self.storages:
            storage.release_lock()
        for line in self.lines.values():
            line.release()

    def note_stuck(self, what: str, *, in_use: bool = False) -> None:
        self.stuck.append(what)
        self.in_use |= in_use

    def close(self) -> None:
        """Close everything, in the reverse order of the build. Idempotent. A stuck thread keeps guest memory."""
        self.disconnect()
        self.free()

    def disconnect(self) -> None:
        """The quick half of :meth:`close`: nothing of the outside is held any more. In the trio thread, once something
        of it ran there. Doorbells and interrupts go with the VM: taking each away would wait for the kernel."""
        if self._closed:
            return
        self._closed = True
        if self.in_use:
            self.give_locks()
            return
        for slot in self.devices:
            slot.transport.close()
            slot.backend.close()
        self.serial.close()
        self.ged.close()
        for cpu in self.cpus:
            cpu.close()

    def free(self) -> None:
        """The other half, after it: blocks while the kernel frees what the guest touched, some 0.2 s a GiB. In any
        thread."""
        if self._freed or self.in_use:
            return
        self._freed = True
        self.vm.close()
        if not self.stuck:
            self.device_memory.close()
            self.memory.close()


def line_configs(config: VmConfig) -> dict[str, LineConfig]:
    """What ends each console line, by the line's name."""
    found: dict[str, LineConfig] = {"serial": config.serial}
    for kind in KINDS:
        for each in kind.of(config):
            line = kind.line(each)
            if line is not None:
                found[kind.contract.section] = line
    return found


def _bar_resource(bar: Bar) -> dict[str, Any]:
    kind = "Mmio64" if bar.is_64bit else "Mmio32"
    where = {"index": bar.index, "base": bar.base, "size": bar.size, "type_": kind, "prefetchable": bar.prefetchable}
    return {"PciBar": where}
