"""Building a board from a configuration, in one go or not at all.

:func:`build_board` opens files, maps RAM, makes the hypervisor's VM and its vCPUs, and plugs the devices, in any
thread, since it waits for the kernel; a failure anywhere closes what was opened. Sinks of console lines are opened
before, in the trio thread (:func:`open_sinks`), and outlive the board at a reboot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from trivmm._native import ffi, lib
from trivmm.boot.firmware import firmware_items
from trivmm.boot.payload import wants_rom
from trivmm.bus.space import AddressSpace, BusDevice, Range
from trivmm.config import VmConfig
from trivmm.errors import ConfigError
from trivmm.hypervisor.base import Hypervisor, VmBackend
from trivmm.machine.board import Board, DeviceSlot, EventSink, line_configs
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.activation import ActivationActor
from trivmm.platform.acpi_port import ACPI_PORTS, AcpiPort
from trivmm.platform.cmos import CMOS_PORTS, Cmos
from trivmm.platform.debug_ports import DEBUG_CONSOLE_PORTS, DEBUG_PORTS, DebugConsole, DebugPort
from trivmm.platform.fw_cfg import FW_CFG_PORTS, FwCfg
from trivmm.platform.ged import GED_SIZE, Ged
from trivmm.platform.i8042 import I8042, I8042_PORTS
from trivmm.platform.pci import CONFIG_PORTS, HOTPLUG_SIZE, Ecam, PciBus, PciHotplug, pick_slots
from trivmm.platform.pm_timer import PM_TIMER_PORTS, PmTimer
from trivmm.platform.pvpanic import Pvpanic
from trivmm.platform.rom import Rom
from trivmm.platform.serial import COM1, Serial
from trivmm.platform.sinks import ClientSink, Sink, open_sink
from trivmm.virtio.device import WorkerDevice
from trivmm.virtio.kind import AnyKind, Place
from trivmm.virtio.kinds import KINDS, names_of
from trivmm.virtio.pci import VirtioPciTransport

__all__ = ["as_plugged", "build_board", "check_board", "close_sinks", "open_sinks", "plug"]


def build_board(
    config: VmConfig,
    hypervisor: Hypervisor,
    *,
    on_event: EventSink = lambda kind, device, generation, **properties: None,
    on_panic: Callable[[str], None] = lambda word: None,
    incoming: bool = False,
    sinks: Mapping[str, Sink] = MappingProxyType({}),
) -> Board:
    """Build everything, or nothing, of a configuration that passed :func:`check_board`. ``incoming``: image locks and
    the sinks of console lines wait for COMMIT. ``sinks`` are what :func:`open_sinks` gave; they stay the caller's until
    :meth:`Board.own_sinks`, since only the trio thread may close them. ``on_panic(word)`` is called in any thread.

    :raises ConfigError: naming the field, the value and the remedy.
    :raises HypervisorError: when the host refuses."""
    undo: list[Callable[[], None]] = []
    try:
        serial = Serial(sinks.get("serial"))
        serial.keeps_sink = True
        undo.append(serial.close)
        rom = (layout.ROM_START, layout.ROM_SIZE) if hypervisor.needs_payload and wants_rom(config.payload) else None
        memory = GuestMemory(layout.ram_ranges(config.memory.size), rom)
        undo.append(memory.close)
        vm = hypervisor.open_vm()
        undo.append(vm.close)
        board = _assemble(config, hypervisor, memory, vm, serial, on_event)
        undo = [board.close]
        _plug_devices(board, incoming, sinks)
        if config.pvpanic:
            _plug_pvpanic(board, on_panic)
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
    board before (:meth:`Board.keep`), which was rebooted.

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
    if not config.payload.kernel and config.payload.firmware is None:
        raise ConfigError("payload.kernel", None, "missing", "give the path of a PVH ELF kernel, or firmware")
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


def _assemble(
    config: VmConfig,
    hypervisor: Hypervisor,
    memory: GuestMemory,
    vm: VmBackend,
    serial: Serial,
    on_event: EventSink,
) -> Board:
    for region in memory.regions:
        vm.add_memory(region.slot, region.gpa, region.size, region.hva, rom=region.rom)
    vm.attach_memory(memory.native)
    pio, mmio = AddressSpace("pio"), AddressSpace("mmio")
    has_rom = any(region.rom for region in memory.regions)
    pci = PciBus(mmio, config.deadlines, for_firmware=has_rom)
    cmos = Cmos(config.memory.size, config.cpus.boot_vcpus, for_firmware=has_rom)
    debug_port, rom, pm_timer = DebugPort(), Rom(), PmTimer()
    guest_log = logging.getLogger("trivmm.guest")
    ports: tuple[tuple[tuple[int, int], BusDevice, str], ...] = (
        (CONFIG_PORTS, pci, "pci"),
        (COM1, serial, "serial"),
        (CMOS_PORTS, cmos, "cmos"),
        (I8042_PORTS, I8042(), "i8042"),
        (ACPI_PORTS, AcpiPort(), "acpi"),
        (PM_TIMER_PORTS, pm_timer, "pm timer"),
        (DEBUG_PORTS, debug_port, "debug port"),
        (DEBUG_CONSOLE_PORTS, DebugConsole(guest_log.info), "debug console"),
    )
    for (first, count), device, name in ports:
        pio.insert(Range(first, count, device, name))
    fw_cfg = FwCfg(firmware_items(memory.ram, config.cpus.boot_vcpus, config.platform) if has_rom else {})
    if has_rom:
        pio.insert(Range(*FW_CFG_PORTS, fw_cfg, "fw_cfg"))
    vm.attach_pio_hook(*COM1, ffi.addressof(lib, "tv_uart_pio"), serial.native)
    if has_rom:
        mmio.insert(Range(layout.ROM_START, layout.ROM_SIZE, rom, "rom"))
    ged = Ged()  # nothing fails from here on: the board closes it
    mmio.insert(Range(layout.GED_START, GED_SIZE, ged, "ged"))
    mmio.insert(Range(layout.PCI_MMCONFIG_START, layout.PCI_MMCONFIG_SIZE, Ecam(pci), "pci"))
    hotplug = PciHotplug(pci, lambda: board.removable_slots, config.deadlines.lock)
    mmio.insert(Range(layout.PCI_HOTPLUG_START, HOTPLUG_SIZE, hotplug, "pci hotplug"))
    fixed = {
        "pci": pci,
        "serial": serial,
        "cmos": cmos,
        "debug_port": debug_port,
        "ged": ged,
        "hotplug": hotplug,
        "fw_cfg": fw_cfg,
        "pm_timer": pm_timer,
    }
    board = Board(config, hypervisor, memory, vm, pio, mmio, pci, rom, serial, ged, hotplug, fixed, on_event)
    return board


def _plug_devices(board: Board, incoming: bool, sinks: Mapping[str, Sink]) -> None:
    """Slots that are asked for are taken out of the order in which the others are given theirs."""
    names = names_of(board.config)
    slots = iter(pick_slots([each.pci_device_id for kind in names for each in kind.of(board.config)]))
    for kind, mine in names.items():
        built = []
        for config, name in zip(kind.of(board.config), mine, strict=True):
            sink = sinks.get(kind.contract.section) if kind.line(config) is not None else None
            device = kind.make(config, Place(board.memory, name, incoming, sink, board.config.deadlines))
            for line in device.lines.values():
                line.keeps_sink = True
            number = next(slots)
            board.devices = [*board.devices, plug(board, kind, device, number)]
            built.append(as_plugged(kind, config, device, number))
        board.config = kind.put(board.config, built)


def _plug_pvpanic(board: Board, on_panic: Callable[[str], None]) -> None:
    pvpanic = Pvpanic(on_panic, board.config.deadlines.lock)
    pvpanic.plug(board.pci)
    board.fixed = {"pvpanic": pvpanic, **board.fixed}  # loaded before the PCI bus, which places its BAR


def as_plugged(kind: AnyKind, config: Any, device: WorkerDevice, number: int) -> Any:
    """A device's configuration as it stays from now on: at reboots, and wherever it moves to, whatever comes and goes
    beside it, it has its name and its slot."""
    fixed: dict[str, object] = {"pci_device_id": number}
    if "{}" in kind.name:
        fixed["id"] = device.name
    return attrs.evolve(kind.as_built(config, device), **fixed)


def plug(board: Board, kind: AnyKind, device: WorkerDevice, number: int) -> DeviceSlot:
    """A device on the bus, where its guest finds it; its actor is there and doesn't run yet. In any thread; the device
    is closed where it fails.

    :raises ConfigError: another device has its id, or there is no room for it."""
    undo = [device.close]
    try:
        if any(each.backend.name == device.name for each in board.devices):
            raise ConfigError("id", device.name, "two devices have this id", "give each its own")
        transport = VirtioPciTransport(
            device, board.vm, board.config.deadlines, pci_class=kind.pci_class, bar_is_64bit=kind.bar_is_64bit
        )
        undo.append(transport.close)
        device.plug(board.device_memory)
        undo.append(device.unplug)
        board.pci.add(transport, number)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    actor = ActivationActor(
        device, transport.state, transport.handles, board.config.deadlines, transport.reset_registers, board.on_event
    )
    device.on_broken = actor.fail
    device.on_request = lambda request: board.on_request(request)
    device.on_config_change = transport.config_changed

    def tell(event: str, **properties: str) -> None:
        board.on_event(event, device.name, transport.state.generation, **properties)

    device.on_event = tell
    return DeviceSlot(kind, device, transport, actor, number)
