"""A VM's configuration: frozen, plain data, in Cloud Hypervisor's words.

Field names are those of the API contract, so that a JSON body, a command line and a Python call say the same.
Structure only: reading JSON and option strings, and the checks that need the host, live in
``trivmm.control.schema`` and ``trivmm.cli.options``; checks of values that need nothing else are validators here.
"""

from __future__ import annotations

from typing import Final

import attrs

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError

__all__ = [
    "CONSOLE_MODES",
    "MAX_VCPUS",
    "ConsoleConfig",
    "CpusConfig",
    "DiskConfig",
    "MemoryConfig",
    "PayloadConfig",
    "RngConfig",
    "SerialConfig",
    "VmConfig",
]

MAX_VCPUS: Final = 8  # the probe guest's and the state format's limit; KVM itself allows more
MAX_DISKS: Final = 24  # PCI slots 1..31 less console, rng and room for hotplug
MAX_ID: Final = 128  # characters; an id names threads, log lines, counters and state
CONSOLE_MODES: Final = ("Off", "Null", "Tty", "Pty", "File", "Socket")
ALIGNMENT: Final = 2 << 20  # RAM sizes: one x86 large page, so that a region never splits one


def _check_id(field: str, value: str | None) -> None:
    if value is not None and (len(value) > MAX_ID or not value.isprintable()):
        shown = value if len(value) <= MAX_ID else value[:MAX_ID] + "…"
        raise ConfigError(field, shown, "not a name", f"give at most {MAX_ID} printable characters, or leave it out")


def _check_mode(field: str, mode: str, file: str | None, socket: str | None) -> None:
    if mode not in CONSOLE_MODES:
        raise ConfigError(f"{field}.mode", str(mode)[:MAX_ID], "no such mode", f"use {', '.join(CONSOLE_MODES)}")
    for needs, name, value in (("File", "file", file), ("Socket", "socket", socket)):
        if mode == needs and not value:
            raise ConfigError(f"{field}.{name}", value, f"missing, and the mode is {mode}", "give a path")


@attrs.frozen
class CpusConfig:
    boot_vcpus: int = 1
    max_vcpus: int = attrs.field(default=attrs.Factory(lambda self: self.boot_vcpus, takes_self=True))

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.boot_vcpus <= MAX_VCPUS:
            raise ConfigError("cpus.boot_vcpus", self.boot_vcpus, "out of range", f"give 1 to {MAX_VCPUS}")
        if self.max_vcpus < self.boot_vcpus:
            raise ConfigError(
                "cpus.max_vcpus",
                self.max_vcpus,
                f"less than boot_vcpus ({self.boot_vcpus})",
                "leave it out, or raise it",
            )


@attrs.frozen
class MemoryConfig:
    """``size`` in bytes. ``shared`` is accepted for compatibility: RAM is always a shared memfd mapping."""

    size: int = 512 << 20
    shared: bool = False

    def __attrs_post_init__(self) -> None:
        if self.size <= 0:
            raise ConfigError("memory.size", self.size, "no memory", "give a size such as 512M")
        if self.size % ALIGNMENT:
            raise ConfigError(
                "memory.size",
                self.size,
                "not a multiple of 2 MiB",
                f"give {-(-self.size // ALIGNMENT) * ALIGNMENT}",
            )


@attrs.frozen
class PayloadConfig:
    """``kernel`` is a PVH ELF; ``initramfs`` a file handed to it untouched."""

    kernel: str
    cmdline: str = ""
    initramfs: str | None = None


@attrs.frozen
class DiskConfig:
    path: str
    readonly: bool = False
    id: str | None = None
    serial: str | None = None
    num_queues: int = 1
    queue_size: int = 128
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_id("disks.id", self.id)


@attrs.frozen
class RngConfig:
    src: str = "/dev/urandom"
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_id("rng.id", self.id)


@attrs.frozen
class SerialConfig:
    """``mode`` is one of :data:`CONSOLE_MODES`; ``File`` needs ``file``, ``Socket`` needs ``socket``."""

    mode: str = "Null"
    file: str | None = None
    socket: str | None = None

    def __attrs_post_init__(self) -> None:
        _check_mode("serial", self.mode, self.file, self.socket)


@attrs.frozen
class ConsoleConfig:
    """virtio-console, as :class:`SerialConfig`; ``Off``: there is no such device."""

    mode: str = "Off"
    file: str | None = None
    socket: str | None = None
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_mode("console", self.mode, self.file, self.socket)
        _check_id("console.id", self.id)


@attrs.frozen
class VmConfig:
    payload: PayloadConfig
    cpus: CpusConfig = attrs.field(factory=CpusConfig)
    memory: MemoryConfig = attrs.field(factory=MemoryConfig)
    disks: tuple[DiskConfig, ...] = ()
    rng: RngConfig = attrs.field(factory=RngConfig)
    serial: SerialConfig = attrs.field(factory=SerialConfig)
    console: ConsoleConfig = attrs.field(factory=ConsoleConfig)
    deadlines: Deadlines = attrs.field(factory=Deadlines)

    def __attrs_post_init__(self) -> None:
        if len(self.disks) > MAX_DISKS:
            raise ConfigError("disks", len(self.disks), "too many disks", f"give at most {MAX_DISKS}")
