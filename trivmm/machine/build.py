"""Building a board from a configuration, in one go or not at all.

:func:`build_board` opens files, maps RAM, makes the hypervisor's VM and its vCPUs, and plugs the devices, in any
thread, since it waits for the kernel; a failure anywhere closes what was opened. Sinks of console lines are opened
before, in the trio thread (:func:`open_sinks`), and outlive the board at a reboot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

from trivmm._native import ffi, lib
from trivmm.bus.space import AddressSpace, BusDevice, Range
from trivmm.config import VmConfig
from trivmm.errors import ConfigError
from trivmm.hypervisor.base import Hypervisor, VmBackend
from trivmm.machine.board import Board, DeviceSlot, line_configs
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import ActivationActor
from trivmm.platform.acpi_port import ACPI_PORTS, AcpiPort
from trivmm.platform.cmos import CMOS_PORTS, Cmos
from trivmm.platform.debug_ports import DEBUG_CONSOLE_PORTS, DEBUG_PORTS, DebugConsole, DebugPort
from trivmm.platform.ged import GED_SIZE, Ged
from trivmm.platform.i8042 import I8042, I8042_PORTS
from trivmm.platform.pci import CONFIG_PORTS, PciBus
from trivmm.platform.serial import COM1, Serial
from trivmm.platform.sinks import ClientSink, Sink, open_sink
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.kind import AnyKind, Place
from trivmm.virtio.kinds import KINDS, names_of
from trivmm.virtio.pci import VirtioPciTransport

__all__ = ["build_board", "check_board", "close_sinks", "open_sinks"]

EventSink = Callable[[str, str, int], None]


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
        _plug_devices(board, on_event, incoming, sinks)
        for index in range(config.cpus.boot_vcpus):
            cpu = vm.create_vcpu(index)
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
    sinks: dict[str, Sink] = {}
    try:
        for name, each in line_configs(config).items():
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
    for kind in KINDS:
        kind.check(kind.of(config))
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
    vm.attach_memory(memory.native)
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


def _plug_devices(board: Board, on_event: EventSink, incoming: bool, sinks: Mapping[str, Sink]) -> None:
    for kind, names in names_of(board.config).items():
        configs, built = kind.of(board.config), []
        for config, name in zip(configs, names, strict=True):
            sink = sinks.get(kind.contract.section) if kind.line(config) is not None else None
            device = kind.make(config, Place(board.memory, name, incoming, sink))
            for line in device.lines.values():
                line.keeps_sink = True
            _plug(board, kind, device, on_event, config.pci_device_id)
            built.append(kind.as_built(config, device))
        board.config = kind.put(board.config, built)


def _plug(board: Board, kind: AnyKind, device: WorkerDevice, on_event: EventSink, slot: int | None) -> None:
    try:
        if any(each.backend.name == device.name for each in board.devices):
            raise ConfigError("id", device.name, "two devices have this id", "give each its own")
        transport = VirtioPciTransport(
            device, board.vm, board.config.deadlines, pci_class=kind.pci_class, bar_is_64bit=kind.bar_is_64bit
        )
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
