"""The command line's options to the JSON of the API (in the syntax of ``trivmm.syntax``). Pure functions without trio.

What comes out goes through ``trivmm.control.schema``, so that the command line and the API refuse the same things in
the same words. A device's options are its kind's (``trivmm.virtio.kinds``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs

from trivmm.deadlines import TABLE, Deadlines
from trivmm.errors import ConfigError
from trivmm.syntax import (
    Keys,
    as_text,
    one_of,
    parse_console,
    parse_integer,
    parse_list,
    parse_object,
    parse_pairs,
    parse_toggle,
)
from trivmm.unixsocket import SocketFd, check_path
from trivmm.values import parse_size
from trivmm.virtio.kind import AnyKind
from trivmm.virtio.kinds import KINDS

__all__ = [
    "parse_deadlines",
    "parse_device",
    "parse_event_monitor",
    "parse_receive",
    "parse_send",
    "parse_socket",
    "parse_socket_path",
    "parse_vm",
]

SMBIOS_TEXTS: Final = (
    *("system_manufacturer", "system_product_name", "system_version", "system_serial_number"),
    *("system_uuid", "system_sku_number", "system_family", "chassis_asset_tag"),
)
MAX_FD: Final = (1 << 31) - 1  # an int in C


# --- options: option key → (JSON key, conversion) ----------------------------------------------------------------

# Keys of the contract that do not exist here are listed too: the schema refuses them by name, unless they hold
# their default.
CPUS: Final[Keys] = {
    "boot": ("boot_vcpus", parse_integer),
    "max": ("max_vcpus", parse_integer),
    "topology": ("topology", as_text),
    "kvm_hyperv": ("kvm_hyperv", parse_toggle),
    "max_phys_bits": ("max_phys_bits", parse_integer),
    "affinity": ("affinity", as_text),
    "features": ("features", as_text),
    "nested": ("nested", parse_toggle),
    "core_scheduling": ("core_scheduling", one_of("Vm", "Vcpu", "Off")),
    "profile": ("profile", one_of("Host")),
}
MEMORY: Final[Keys] = {
    "size": ("size", parse_size),
    "shared": ("shared", parse_toggle),
    "mergeable": ("mergeable", parse_toggle),
    "hugepages": ("hugepages", parse_toggle),
    "hugepage_size": ("hugepage_size", parse_size),
    "hotplug_method": ("hotplug_method", one_of("Acpi", "VirtioMem")),
    "hotplug_size": ("hotplug_size", parse_size),
    "hotplugged_size": ("hotplugged_size", parse_size),
    "prefault": ("prefault", parse_toggle),
    "reserve": ("reserve", parse_toggle),
    "thp": ("thp", parse_toggle),
}
PLATFORM: Final[Keys] = {
    **{name: (name, as_text) for name in SMBIOS_TEXTS},
    "serial_number": ("system_serial_number", as_text),
    "uuid": ("system_uuid", as_text),
    "oem_strings": ("oem_strings", parse_list),
    "num_pci_segments": ("num_pci_segments", parse_integer),
    "iommu_segments": ("iommu_segments", parse_list),
    "iommu_address_width": ("iommu_address_width_bits", parse_integer),
    "iommufd": ("iommufd", parse_toggle),
    "iommufd_fd": ("iommufd_fd", parse_integer),
    "vfio_p2p_dma": ("vfio_p2p_dma", parse_toggle),
    "tdx": ("tdx", parse_toggle),
    "sev_snp": ("sev_snp", parse_toggle),
}
SEND: Final[Keys] = {
    "destination_url": ("destination_url", as_text),
    "downtime_ms": ("downtime_ms", parse_integer),
    "timeout_s": ("timeout_s", parse_integer),
    "timeout_strategy": ("timeout_strategy", one_of("Cancel", "Ignore")),
    "connections": ("connections", parse_integer),
    "local": ("local", parse_toggle),
    "preserve_source": ("preserve_source", parse_toggle),
    "tls_dir": ("tls_dir", as_text),
    "memory_mode": ("memory_mode", one_of("Precopy", "Postcopy")),
}
RECEIVE: Final[Keys] = {
    "receiver_url": ("receiver_url", as_text),
    "tls_dir": ("tls_dir", as_text),
    "memory_mode": ("memory_mode", one_of("Precopy", "Postcopy")),
    "vfio_fds": ("vfio_fds", as_text),
    "iommufd_fd": ("iommufd_fd", parse_integer),
    "net_fds": ("net_fds", as_text),
    "zone_updates": ("zone_updates", as_text),
}


def parse_vm(arguments: Any, *, terminal: bool = False) -> dict[str, Any]:
    """The body of vm.create from parsed arguments (``firmware``, ``kernel``, ``cmdline``, ``initramfs``, ``cpus``,
    ``memory``, ``serial``, ``platform``, ``pvpanic``, one of each kind of device; None where not given). ``terminal``:
    there is one, so the serial port shows on it unless something else was said. :raises ConfigError:"""
    payload = {name: getattr(arguments, name) for name in ("firmware", "kernel", "cmdline", "initramfs")}
    body: dict[str, Any] = {"payload": payload}
    cpus = parse_object("--cpus", arguments.cpus or "", CPUS, "boot")
    cpus.setdefault("boot_vcpus", 1)
    body["cpus"] = {"max_vcpus": cpus["boot_vcpus"], **cpus}
    body["memory"] = {"size": 512 << 20, **parse_object("--memory", arguments.memory or "", MEMORY, "size")}
    if arguments.platform:
        body["platform"] = parse_object("--platform", arguments.platform, PLATFORM, "uuid")
    if arguments.pvpanic:
        body["pvpanic"] = True
    for kind in KINDS:
        body |= _devices(kind, getattr(arguments, kind.option.name))
    shown = "tty" if terminal and body["console"]["mode"] != "Tty" else "null"
    body["serial"] = parse_console("--serial", shown if arguments.serial is None else arguments.serial)
    return body


def _devices(kind: AnyKind, given: Any) -> dict[str, Any]:
    """The section of one kind of devices, ``given`` as text, a list of texts, or whether it is; empty where there is
    none."""
    option, section = kind.option, kind.contract.section
    if kind.contract.flag:
        return {section: True} if given else {}
    if isinstance(given, list):
        return {section: [parse_device(kind, text) for text in given]}
    if given is None and option.absent is None:
        return {section: []} if kind.contract.many else {}
    return {section: parse_device(kind, option.absent or "" if given is None else given)}


def parse_device(kind: AnyKind, text: str, verb: str | None = None) -> dict[str, Any]:
    """One of a kind, as its option has it, and the verb that adds it. :raises ConfigError:"""
    option = kind.option
    name = verb or f"--{option.name}"
    made = {**option.base, **option.parse(name, text)}
    for key in kind.contract.required:
        if key not in made:
            raise ConfigError(name, text, f"no {key}", f"give {option.spelled(key)}")
    return made


def parse_socket(text: str) -> str | SocketFd:
    """``path=FILE`` or just ``FILE``: the path; ``fd=N``: an inherited descriptor. :raises ConfigError:"""
    keyed = text.partition("=")[0].isidentifier() and "=" in text  # a file of such a name is ./NAME=…
    given = parse_pairs("--api-socket", text, ("path", "fd")) if keyed else {"path": text}
    if len(given) > 1:
        raise ConfigError("--api-socket", text, "both a path and a descriptor", "give path=FILE or fd=N")
    if "fd" in given:
        number = parse_integer("--api-socket fd", given["fd"])
        if number > MAX_FD:
            raise ConfigError("--api-socket fd", given["fd"], "not a descriptor", "give the number of an open one")
        return SocketFd(number)
    check_path(given["path"], "--api-socket", text)
    return given["path"]


def parse_socket_path(text: str) -> str:
    """Of a server to be asked: only a path will do. :raises ConfigError:"""
    where = parse_socket(text)
    if isinstance(where, SocketFd):
        raise ConfigError("--api-socket", text, "a server is asked by its path", "give path=FILE")
    return where


def parse_event_monitor(text: str) -> tuple[str | None, int | None]:
    """(path, None) of ``path=FILE``, or (None, descriptor) of ``fd=N``. :raises ConfigError:"""
    pairs = parse_pairs("--event-monitor", text, ("path", "fd"))
    if len(pairs) != 1:
        raise ConfigError("--event-monitor", text, "neither path nor fd, or both", "give path=FILE or fd=N")
    if "fd" in pairs:
        return None, parse_integer("--event-monitor fd", pairs["fd"])
    if not pairs["path"]:
        raise ConfigError("--event-monitor", text, "no path", "give path=FILE")
    return pairs["path"], None


def parse_deadlines(texts: Iterable[str]) -> Deadlines:
    """``pause=2,activation=10`` (seconds), any names of the table of waits. :raises ConfigError:"""
    given: dict[str, float] = {}
    for text in texts:
        for name, value in parse_pairs("--deadlines", text, TABLE).items():
            try:
                given[name] = float(value)
            except ValueError:
                raise ConfigError(f"--deadlines {name}", value, "not a time", "give seconds, more than 0") from None
    return attrs.evolve(Deadlines(), **given)


def parse_send(text: str) -> dict[str, Any]:
    """The body of vm.send-migration: ``destination_url=unix:/x,downtime_ms=…``, or just ``unix:/x``."""
    return _migration("send-migration", text, "destination_url", SEND)


def parse_receive(text: str) -> dict[str, Any]:
    """The body of vm.receive-migration: ``receiver_url=unix:/x``, or just ``unix:/x``."""
    return _migration("receive-migration", text, "receiver_url", RECEIVE)


def _migration(verb: str, text: str, url: str, keys: Keys) -> dict[str, Any]:
    if text.startswith(("unix:", "tcp:")):
        text = f"{url}={text}"
    made = parse_object(verb, text, keys, url)
    if not made.get(url):
        raise ConfigError(verb, text, f"no {url}", f"give {url}=unix:/path or tcp:host:port")
    return made
