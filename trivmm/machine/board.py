"""The board: everything of a machine that is not a task. Built in one go from a configuration, or not at all.

``build_board`` opens files, maps RAM, makes the KVM VM and its vCPUs, and plugs the devices, in any thread, since it
waits for the kernel; a failure anywhere closes what was opened. The board then answers every vCPU exit
(:meth:`Board.handle_exit`, on vCPU threads), and is saved, loaded and closed as a whole. Tasks around
it (actors, vCPUs, drain) belong to ``trivmm.nursery.tree``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.boot.pvh import check_payload, load_payload
from trivmm.bus.space import AddressSpace, BusDevice, Effect, Range
from trivmm.config import VmConfig
from trivmm.errors import ConfigError, MigrationError
from trivmm.hypervisor.base import AnyVcpu, Hypervisor, IoIn, IoOut, MmioRead, MmioWrite, VcpuExit, VmBackend
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import ActivationActor
from trivmm.platform.acpi_port import ACPI_PORTS, AcpiPort
from trivmm.platform.cmos import CMOS_PORTS, Cmos
from trivmm.platform.debug_ports import DEBUG_CONSOLE_PORTS, DEBUG_PORTS, DebugConsole, DebugPort
from trivmm.platform.ged import GED_IRQ, GED_SIZE, POWER_BUTTON, Ged
from trivmm.platform.i8042 import I8042, I8042_PORTS
from trivmm.platform.line import Line
from trivmm.platform.pci import CONFIG_PORTS, Bar, PciBus
from trivmm.platform.serial import COM1, COM1_IRQ, Serial
from trivmm.platform.sinks import ClientSink, LineConfig, Sink, open_sink
from trivmm.state.codec import MAX_DEVICES
from trivmm.state.fields import Fields
from trivmm.state.machine import MachineState
from trivmm.state.setup import config_to_setup
from trivmm.virtio.block import BlockDevice, check_given_once
from trivmm.virtio.console import ConsoleDevice
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.pci import VirtioPciTransport
from trivmm.virtio.port import Storage
from trivmm.virtio.rng import RngDevice

__all__ = ["Board", "DeviceSlot", "build_board", "check_board", "close_sinks", "open_sinks"]

logger = logging.getLogger(__name__)

SERIAL: Final = "__serial"  # ids of Cloud Hypervisor's, which a configuration can't give to anything else
IOAPIC: Final = "__ioapic"

EventSink = Callable[[str, str, int], None]


@attrs.frozen(eq=False)
class DeviceSlot:
    """One virtio device: what it does, how the guest talks to it, and where it stands in its life."""

    backend: WorkerDevice
    transport: VirtioPciTransport
    actor: ActivationActor
    pci_slot: int


@attrs.define(eq=False)
class Board:
    """``devices`` in the order of their PCI slots. ``stuck`` names threads that outlived their deadline; ``in_use``
    says that one of them works on the board itself: then it stays open."""

    config: VmConfig
    hypervisor: Hypervisor
    memory: GuestMemory
    vm: VmBackend
    pio: AddressSpace
    mmio: AddressSpace
    pci: PciBus
    serial: Serial
    ged: Ged
    fixed: dict[str, Any]
    cpus: list[AnyVcpu] = attrs.field(factory=list)
    devices: list[DeviceSlot] = attrs.field(factory=list)
    console: ConsoleDevice | None = None
    stuck: list[str] = attrs.field(factory=list)
    in_use: bool = False
    _closed: bool = False
    _freed: bool = False

    # --- exits: vCPU threads ---------------------------------------------------------------------------------

    def handle_exit(self, vcpu: int, reason: VcpuExit) -> bytes | Effect:
        match reason:
            case MmioWrite(gpa, data):
                return self.mmio.write(gpa, data)
            case MmioRead(gpa, size):
                return self.mmio.read(gpa, size)
            case IoOut(port, size, data):
                if len(data) == size:
                    return self.pio.write(port, data)
                outcome: Effect = None
                for at in range(0, len(data), size):
                    outcome = self.pio.write(port, data[at : at + size]) or outcome
                return outcome
            case IoIn(port, size, count):
                return b"".join(self.pio.read(port, size) for _ in range(count))
            case _:
                return None

    def inline_handler(self, index: int) -> Callable[[VcpuExit], bytes | None]:
        def answer(reason: VcpuExit) -> bytes | None:
            answered = self.handle_exit(index, reason)
            return answered if isinstance(answered, bytes) else None

        return answer

    # --- boot ------------------------------------------------------------------------------------------------

    def load_payload(self, checkpoint: Callable[[], None]) -> None:
        """Put kernel, command line, initramfs and boot data into RAM and point the boot vCPU at them.

        Slow, and bounded: in a thread. What ``checkpoint`` raises between two pieces of work ends it.

        :raises ConfigError: naming the payload's field and what is wrong with the file."""
        if not self.hypervisor.needs_payload:
            return
        boot = load_payload(self.memory, self.config.payload, len(self.cpus), checkpoint)
        self.cpus[0].set_boot_state(boot.entry_gpa, boot.start_info_gpa)

    def check_payload(self, checkpoint: Callable[[], None]) -> None:
        """A destination boots nothing now, but the guest may ask it for a reboot later. As slow as loading it.

        :raises ConfigError: when the kernel can't be used on this host."""
        if self.hypervisor.needs_payload:
            check_payload(self.config.payload, checkpoint)

    # --- consoles --------------------------------------------------------------------------------------------

    @property
    def lines(self) -> dict[str, Line]:
        """``serial``, and ``console`` where there is one."""
        found: dict[str, Line] = {"serial": self.serial}
        return found if self.console is None else found | {"console": self.console.line}

    @property
    def pty_paths(self) -> dict[str, str]:
        """The lines that are pseudo-terminals, and their paths. Empty on the receiving side before COMMIT."""
        sinks = {name: line.sink for name, line in self.lines.items()}
        return {name: sink.path for name, sink in sinks.items() if isinstance(sink, ClientSink) and sink.path}

    def keep_sinks(self) -> dict[str, Sink]:
        """For the board that comes after this one: they stay open when this one is closed."""
        for line in self.lines.values():
            line.keeps_sink = True
        return {name: line.sink for name, line in self.lines.items() if line.sink is not None}

    def own_sinks(self) -> None:
        """From now on they are closed with the board. In the trio thread."""
        for line in self.lines.values():
            line.keeps_sink = False

    def thaw(self) -> None:
        """A saved state of the console lines was not used, or one was loaded: they go on."""
        for line in self.lines.values():
            line.thaw()

    def power_button(self) -> None:
        """The guest finds a press when it next looks, whether it runs or not."""
        self.ged.notify(POWER_BUTTON)

    # --- interrupts: these wait for the kernel -----------------------------------------------------------------

    def connect_interrupts(self) -> None:
        self.vm.connect_irq(self.serial.irq_fd, COM1_IRQ)
        self.vm.connect_irq(self.ged.irq_fd, GED_IRQ)
        # One wait for all routes. A guest that changes one meanwhile costs another wait, no more.
        self.vm.prepare_msi([message for slot in self.devices for message in slot.transport.messages()])
        for slot in self.devices:
            slot.transport.connect_interrupts()

    def disconnect_interrupts(self) -> None:
        """After this no eventfd injects: what the kernel had queued is in the vCPUs, the rest stays in the
        eventfds and is saved as pending bits."""
        for slot in self.devices:
            slot.transport.disconnect_interrupts()
        self.vm.disconnect_irq(self.ged.irq_fd, GED_IRQ)
        self.vm.disconnect_irq(self.serial.irq_fd, COM1_IRQ)

    # --- state -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a destination needs to build the same board (the SETUP section of a migration)."""
        return {
            "config": config_to_setup(self.config),
            "hypervisor": self.vm.name,
            "ram": self._ram(),
            "devices": {
                slot.backend.name: {"slot": slot.pci_slot, "device": slot.backend.describe()} for slot in self.devices
            },
        }

    def _ram(self) -> list[list[int]]:
        return [[region.gpa, region.size] for region in self.memory.regions]

    def check_setup(self, setup: dict[str, Any]) -> None:
        """Make this board the one that the sender has. :raises TrivmmError: naming what it can't be."""
        fields = Fields("SETUP", setup)
        fields.object("config")  # read already: the board is made of it
        for part, here in (("hypervisor", self.vm.name), ("ram", self._ram())):
            there = fields.anything(part)
            if there != here:
                raise MigrationError(f"the sender's {part} is {there!r:.200}, here it is {here!r}")
        devices = fields.objects("devices", MAX_DEVICES)
        fields.end()
        mine = {slot.backend.name: slot for slot in self.devices}
        if set(devices) != set(mine):
            raise MigrationError(f"the sender's devices are {sorted(devices)!r:.200}, here they are {sorted(mine)}")
        for name, described in devices.items():
            each = Fields(name, described)
            pci_slot = each.anything("slot")
            if pci_slot != mine[name].pci_slot:
                raise MigrationError(
                    f"{name}: the sender's PCI slot is {pci_slot!r:.80}, here it is {mine[name].pci_slot}"
                )
            mine[name].backend.become(each.object("device"))
            each.end()

    def save(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """(devices by name, fixed parts by name), JSON-able; after the machine stopped."""
        devices = {
            slot.backend.name: {
                "lifecycle": slot.transport.state.save(),
                "transport": slot.transport.save(),
                "device": slot.backend.save(),
            }
            for slot in self.devices
        }
        board = {name: part.save() for name, part in self.fixed.items()}
        return devices, board

    def load(self, state: MachineState) -> None:
        """Set everything; may be called again. :raises MigrationError: naming the part that makes no sense."""
        if len(state.vcpus) != len(self.cpus):
            raise MigrationError(f"state has {len(state.vcpus)} vCPUs, the machine {len(self.cpus)}")
        if set(state.devices) != {slot.backend.name for slot in self.devices}:
            raise MigrationError(f"state has devices {sorted(state.devices)}, the machine others")
        part = "?"
        try:
            for slot in self.devices:
                part = slot.backend.name
                saved = state.devices[part]
                slot.transport.load(saved["transport"])
                slot.backend.load(saved["device"])
                common = slot.transport.common
                slot.transport.state.load(saved["lifecycle"], common.setup(), common.limits)
            for name, fixed in self.fixed.items():  # the PCI bus among them places the BARs that were just loaded
                part = name
                fixed.load(state.board[name])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise MigrationError(f"state of {part} makes no sense: {error!r}") from error
        self.vm.load(state.vmm)
        for vcpu in state.vcpus:
            self.cpus[vcpu.index].load(vcpu.state)

    def committed(self) -> None:
        """The machine runs here from now on, and so do its console lines: their sinks are opened now.

        :raises ConfigError: when one can't be."""
        configs: dict[str, LineConfig] = {"serial": self.config.serial, "console": self.config.console}
        for name, line in self.lines.items():
            line.attach_sink(open_sink(configs[name], name, incoming=True))
        if self.console is not None:
            self.console.measure()

    # --- reading ---------------------------------------------------------------------------------------------

    def device_tree(self) -> dict[str, Any]:
        """Nodes by id, as Cloud Hypervisor's: ``id``, ``resources``, ``children``, ``parent`` below another node and
        ``pci_bdf`` on PCI. Ours beside them: ``status``, where a device stands in its life."""
        tree: dict[str, Any] = {name: {"id": name, "resources": [], "children": []} for name in (IOAPIC, SERIAL)}
        for slot in self.devices:
            name, transport = slot.backend.name, f"_virtio-pci-{slot.backend.name}"
            tree[transport] = {
                "id": transport,
                "resources": [_bar_resource(bar) for bar in slot.transport.config.bars.values()],
                "children": [name],
                "pci_bdf": f"0000:00:{slot.pci_slot:02x}.0",
            }
            status = slot.transport.state.stage.value
            tree[name] = {"id": name, "resources": [], "parent": transport, "children": [], "status": status}
        return tree

    def config_as_built(self) -> VmConfig:
        """The configuration with what the build found out: the ids of the disks and the types of their images. The
        rng's id does not show, as in Cloud Hypervisor."""
        names = [slot.backend.name for slot in self.devices if isinstance(slot.backend, BlockDevice)]
        disks = tuple(attrs.evolve(disk, id=name) for disk, name in zip(self.config.disks, names, strict=True))
        return attrs.evolve(self.config, disks=disks)

    def counters(self) -> dict[str, dict[str, int]]:
        counted = {slot.backend.name: slot.backend.counters() | slot.actor.counters() for slot in self.devices}
        counted[SERIAL] = self.serial.counters()
        for cpu in self.cpus:
            if own := cpu.counters():
                counted[f"__vcpu{cpu.index}"] = own
        counted["__bus"] = {
            f"{space.name}_unhandled_{kind}": getattr(space, f"unhandled_{kind}")
            for space in (self.pio, self.mmio)
            for kind in ("reads", "writes")
        }
        return counted

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
            self.memory.close()


def build_board(
    config: VmConfig,
    hypervisor: Hypervisor,
    *,
    on_event: EventSink = lambda kind, device, generation: None,
    incoming: bool = False,
    sinks: Mapping[str, Sink] = MappingProxyType({}),
) -> Board:
    """Build everything, or nothing, of a configuration that passed :func:`check_board`. ``incoming``: image locks and
    the sinks of console lines wait for COMMIT. ``sinks`` are what :func:`open_sinks` gave; they stay the caller's until
    :meth:`Board.own_sinks`, since only the trio thread may close them.

    :raises ConfigError: naming the field, the value and the remedy.
    :raises HypervisorError: when the host refuses."""
    undo: list[Callable[[], None]] = []
    try:
        serial = Serial(sinks.get("serial"))
        serial.keeps_sink = True
        undo.append(serial.close)
        memory = GuestMemory(layout.ram_ranges(config.memory.size))
        undo.append(memory.close)
        vm = hypervisor.open_vm()
        undo.append(vm.close)
        board = _assemble(config, hypervisor, memory, vm, serial)
        undo = [board.close]
        _plug_devices(board, on_event, incoming, sinks.get("console"))
        for index in range(config.cpus.boot_vcpus):
            cpu = vm.create_vcpu(index)
            cpu.inline_handler = board.inline_handler(index)
            board.cpus.append(cpu)
            if cpu.write_hook is not None:
                memory.before_told(*cpu.write_hook)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return board


def open_sinks(config: VmConfig, kept: Mapping[str, Sink] | None = None) -> dict[str, Sink]:
    """The sinks of a board's console lines, for :func:`build_board`. In the trio thread. ``kept`` are those of the
    board before (:meth:`Board.keep_sinks`), which was rebooted.

    :raises ConfigError: when one can't be opened; those that were opened here are closed."""
    configs: dict[str, LineConfig] = {"serial": config.serial}
    if config.console.mode != "Off":
        configs["console"] = config.console
    sinks: dict[str, Sink] = {}
    try:
        for name, each in configs.items():
            sink = kept.get(name) if kept else None
            if sink is None:
                sink = open_sink(each, name)
            elif isinstance(sink, ClientSink):
                sink.retake()  # a machine in doubt had let go of its socket
            sinks[name] = sink
    except BaseException:
        close_sinks(sinks)
        raise
    return sinks


def close_sinks(sinks: Mapping[str, Sink]) -> None:
    """Idempotent. In the trio thread."""
    for sink in sinks.values():
        sink.close()


def check_board(config: VmConfig, hypervisor: Hypervisor) -> None:
    """What can be seen without opening anything.

    :raises ConfigError: naming the field, the value and the remedy."""
    if not config.payload.kernel:
        remedy = "give the path of a PVH ELF kernel; firmware is not supported yet"
        raise ConfigError("payload.kernel", None, "missing", remedy)
    check_given_once(config.disks)
    if config.cpus.boot_vcpus > hypervisor.max_vcpus:
        raise ConfigError(
            "cpus.boot_vcpus",
            config.cpus.boot_vcpus,
            f"the {hypervisor.name} back end runs at most {hypervisor.max_vcpus}",
            f"give 1 to {hypervisor.max_vcpus}",
        )
    available = _host_memory()
    if available is not None and config.memory.size > available:
        raise ConfigError(
            "memory.size", config.memory.size, f"more than the host's RAM and swap ({available} bytes)", "give less"
        )
    top = max(gpa + size for gpa, size in layout.ram_ranges(config.memory.size))
    if top > layout.BAR64_START:
        raise ConfigError("memory.size", config.memory.size, "reaches into the PCI window below 1 TiB", "give less")


def _host_memory() -> int | None:
    """MemTotal and SwapTotal in bytes, or None where /proc doesn't say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return sum(int(fields[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, KeyError, ValueError):
        return None


def _assemble(config: VmConfig, hypervisor: Hypervisor, memory: GuestMemory, vm: VmBackend, serial: Serial) -> Board:
    for region in memory.regions:
        vm.add_memory(region.slot, region.gpa, region.size, region.hva)
    pio, mmio = AddressSpace("pio"), AddressSpace("mmio")
    pci = PciBus(mmio, config.deadlines)
    cmos, debug_port = Cmos(config.memory.size), DebugPort()
    guest_log = logging.getLogger("trivmm.guest")
    ports: tuple[tuple[tuple[int, int], BusDevice, str], ...] = (
        (CONFIG_PORTS, pci, "pci"),
        (COM1, serial, "serial"),
        (CMOS_PORTS, cmos, "cmos"),
        (I8042_PORTS, I8042(), "i8042"),
        (ACPI_PORTS, AcpiPort(), "acpi"),
        (DEBUG_PORTS, debug_port, "debug port"),
        (DEBUG_CONSOLE_PORTS, DebugConsole(guest_log.info), "debug console"),
    )
    for (first, count), device, name in ports:
        pio.insert(Range(first, count, device, name))
    vm.attach_pio_hook(*COM1, ffi.addressof(lib, "tv_uart_pio"), serial.native)
    ged = Ged()  # nothing fails from here on: the board closes it
    mmio.insert(Range(layout.GED_START, GED_SIZE, ged, "ged"))
    fixed = {"pci": pci, "serial": serial, "cmos": cmos, "debug_port": debug_port, "ged": ged}
    return Board(config, hypervisor, memory, vm, pio, mmio, pci, serial, ged, fixed)


def _bar_resource(bar: Bar) -> dict[str, Any]:
    kind = "Mmio64" if bar.is_64bit else "Mmio32"
    where = {"index": bar.index, "base": bar.base, "size": bar.size, "type_": kind, "prefetchable": bar.prefetchable}
    return {"PciBar": where}


def _disk_names(config: VmConfig) -> list[str]:
    """Disks without an id are numbered in their order, past numbers that another device was given as its id."""
    given = {config.rng.id, config.console.id, *(disk.id for disk in config.disks)}
    free = (name for number in itertools.count() if (name := f"_disk{number}") not in given)
    return [disk.id or next(free) for disk in config.disks]


def _plug_devices(board: Board, on_event: EventSink, incoming: bool, sink: Sink | None) -> None:
    """In Cloud Hypervisor's order: the console, unless it is off, then disks, then rng."""
    config, memory = board.config, board.memory
    if config.console.mode != "Off":
        console = ConsoleDevice(config.console, memory, sink)
        console.line.keeps_sink = True
        _plug(board, console, on_event, slot=config.console.pci_device_id, use_64bit_bar=True)
        board.console = console
    for disk, name in zip(config.disks, _disk_names(config), strict=True):
        block = BlockDevice(disk, memory, name, lock=not incoming)
        _plug(board, block, on_event, slot=disk.pci_device_id, use_64bit_bar=False)
    # Said from now on, at reboots and to a destination: nobody guesses again once the guest can write there.
    board.config = attrs.evolve(config, disks=tuple(attrs.evolve(disk, image_type="Raw") for disk in config.disks))
    rng = RngDevice(config.rng, memory)
    _plug(board, rng, on_event, slot=config.rng.pci_device_id, use_64bit_bar=True)


def _plug(board: Board, device: WorkerDevice, on_event: EventSink, *, slot: int | None, use_64bit_bar: bool) -> None:
    try:
        if any(each.backend.name == device.name for each in board.devices):
            raise ConfigError("id", device.name, "two devices have this id", "give each its own")
        transport = VirtioPciTransport(device, board.vm, board.config.deadlines, use_64bit_bar=use_64bit_bar)
    except BaseException:
        device.close()
        raise
    actor = ActivationActor(
        device, transport.state, transport.handles, board.config.deadlines, transport.reset_registers, on_event
    )
    device.on_broken = actor.fail
    device.on_config_change = transport.config_changed
    board.devices.append(DeviceSlot(device, transport, actor, 0))
    placed = board.pci.add(transport, slot)
    board.devices[-1] = DeviceSlot(device, transport, actor, placed)
