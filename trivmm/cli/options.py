"""Cloud Hypervisor's option syntax: ``key=value,key=value`` strings to the JSON of the API, and argument lists to them.

Pure functions without trio. A value with commas is quoted or bracketed; sizes take ``K``, ``M``, ``G``, ``T``; toggles
are ``on``, ``off``, ``true``, ``false``. What comes out goes through ``trivmm.control.schema``, so that the command
line and the API refuse the same things in the same words.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from trivmm.deadlines import TABLE, Deadlines
from trivmm.errors import ConfigError, shown
from trivmm.unixsocket import SocketFd, check_path
from trivmm.values import MAX_DIGITS, parse_size

__all__ = [
    "parse_console",
    "parse_deadlines",
    "parse_event_monitor",
    "parse_pairs",
    "parse_receive",
    "parse_send",
    "parse_socket",
    "parse_socket_path",
    "parse_vm",
    "split_commas",
]

MAX_FD: Final = (1 << 31) - 1  # an int in C
IMAGE_TYPES: Final[Mapping[str, str]] = {
    "raw": "Raw",
    "unknown": "Unknown",
    "qcow2": "Qcow2",
    "vhdx": "Vhdx",
    "vhd": "FixedVhd",
    "fixedvhd": "FixedVhd",
    "vmdk": "FlatVmdk",
    "flatvmdk": "FlatVmdk",
}  # as Cloud Hypervisor's option spells them, and its API

Convert = Callable[[str, str], object]


def split_commas(option: str, text: str) -> list[str]:
    """Split at commas outside of ``"…"`` and ``[…]``; the quotes go. :raises ConfigError: they don't match up."""
    parts, current, depth, quoted = [], "", 0, False
    for char in text.strip():
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted and depth == 0:
            parts.append(current)
            current = ""
        else:
            depth += 0 if quoted else (char == "[") - (char == "]")
            current += char
            if depth < 0:
                break
    if quoted or depth:
        raise ConfigError(option, text, "quotes or brackets do not match", "close what was opened")
    return [*parts, current]


def parse_pairs(option: str, text: str, known: Iterable[str], main: str = "") -> dict[str, str]:
    """``key=value`` pairs; ``main`` is the key that a lone value was probably meant for.

    :raises ConfigError: an unknown key (with the nearest known one), or one without value."""
    names = list(known)
    pairs: dict[str, str] = {}
    if not text.strip():
        return pairs
    for part in split_commas(option, text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals and key not in names and main and not pairs:
            raise ConfigError(option, part, "no key", f"give {main}={_one_line(part.strip())}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{option} {_one_line(key)}", value, "unknown key", hint)
        if not equals:
            raise ConfigError(f"{option} {key}", "", "no value", f"give {key}=…")
        if key in pairs:
            raise ConfigError(f"{option} {key}", value, "given twice", "give it once")
        pairs[key] = value.strip()
    return pairs


def _one_line(text: str) -> str:
    """A line break in it would make two lines of a message's one."""
    return shown(text)[1:-1]


# --- values --------------------------------------------------------------------------------------------------


def parse_integer(option: str, text: str) -> int:
    """:raises ConfigError:"""
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise ConfigError(option, text, "not a number", "give a whole number")
    return int(text)


def parse_toggle(option: str, text: str) -> bool:
    """:raises ConfigError:"""
    match text.lower():
        case "on" | "true":
            return True
        case "off" | "false":
            return False
    raise ConfigError(option, text, "neither on nor off", "give on or off")


def _as_text(option: str, text: str) -> str:
    return text


def _one_of(*names: str) -> Convert:
    def convert(option: str, text: str) -> str:
        for name in names:
            if name.lower() == text.lower():
                return name
        raise ConfigError(option, text, "unknown", f"give {' or '.join(name.lower() for name in names)}")

    return convert


def parse_image_type(option: str, text: str) -> str:
    """Cloud Hypervisor's words, and the API's. :raises ConfigError:"""
    made = IMAGE_TYPES.get(text.lower())
    if made is None:
        raise ConfigError(option, text, "no such type", "give raw, or leave it out")
    return made


# --- options: option key → (JSON key, conversion) ----------------------------------------------------------------

# Keys of the contract that do not exist here are listed too: the schema refuses them by name, unless they hold
# their default.
_BUS: Final[Mapping[str, tuple[str, Convert]]] = {
    "id": ("id", _as_text),
    "pci_segment": ("pci_segment", parse_integer),
    "addr": ("pci_device_id", parse_integer),
    "pci_device_id": ("pci_device_id", parse_integer),
    "iommu": ("iommu", parse_toggle),
}
CPUS: Final[Mapping[str, tuple[str, Convert]]] = {
    "boot": ("boot_vcpus", parse_integer),
    "max": ("max_vcpus", parse_integer),
    "topology": ("topology", _as_text),
    "kvm_hyperv": ("kvm_hyperv", parse_toggle),
    "max_phys_bits": ("max_phys_bits", parse_integer),
    "affinity": ("affinity", _as_text),
    "features": ("features", _as_text),
    "nested": ("nested", parse_toggle),
    "core_scheduling": ("core_scheduling", _one_of("Vm", "Vcpu", "Off")),
    "profile": ("profile", _one_of("Host")),
}
MEMORY: Final[Mapping[str, tuple[str, Convert]]] = {
    "size": ("size", parse_size),
    "shared": ("shared", parse_toggle),
    "mergeable": ("mergeable", parse_toggle),
    "hugepages": ("hugepages", parse_toggle),
    "hugepage_size": ("hugepage_size", parse_size),
    "hotplug_method": ("hotplug_method", _one_of("Acpi", "VirtioMem")),
    "hotplug_size": ("hotplug_size", parse_size),
    "hotplugged_size": ("hotplugged_size", parse_size),
    "prefault": ("prefault", parse_toggle),
    "reserve": ("reserve", parse_toggle),
    "thp": ("thp", parse_toggle),
}
DISK: Final[Mapping[str, tuple[str, Convert]]] = {
    "path": ("path", _as_text),
    "readonly": ("readonly", parse_toggle),
    "serial": ("serial", _as_text),
    "num_queues": ("num_queues", parse_integer),
    "queue_size": ("queue_size", parse_integer),
    "direct": ("direct", parse_toggle),
    "vhost_user": ("vhost_user", parse_toggle),
    "socket": ("vhost_socket", _as_text),
    "queue_affinity": ("queue_affinity", _as_text),
    "rate_limit_group": ("rate_limit_group", _as_text),
    "bw_size": ("rate_limiter_config", _as_text),
    "bw_one_time_burst": ("rate_limiter_config", _as_text),
    "bw_refill_time": ("rate_limiter_config", _as_text),
    "ops_size": ("rate_limiter_config", _as_text),
    "ops_one_time_burst": ("rate_limiter_config", _as_text),
    "ops_refill_time": ("rate_limiter_config", _as_text),
    "_disable_io_uring": ("disable_io_uring", parse_toggle),
    "_disable_aio": ("disable_aio", parse_toggle),
    "backing_files": ("backing_files", parse_toggle),
    "sparse": ("sparse", parse_toggle),
    "image_type": ("image_type", parse_image_type),
    "lock_granularity": ("lock_granularity", _as_text),
    **_BUS,
}
CONSOLE_WORDS: Final = ("off", "null", "tty", "pty")
CONSOLE_PATHS: Final = ("file", "socket")
RNG: Final[Mapping[str, tuple[str, Convert]]] = {"src": ("src", _as_text), **_BUS}
SEND: Final[Mapping[str, tuple[str, Convert]]] = {
    "destination_url": ("destination_url", _as_text),
    "downtime_ms": ("downtime_ms", parse_integer),
    "timeout_s": ("timeout_s", parse_integer),
    "timeout_strategy": ("timeout_strategy", _one_of("Cancel", "Ignore")),
    "connections": ("connections", parse_integer),
    "local": ("local", parse_toggle),
    "preserve_source": ("preserve_source", parse_toggle),
    "tls_dir": ("tls_dir", _as_text),
    "memory_mode": ("memory_mode", _one_of("Precopy", "Postcopy")),
}
RECEIVE: Final[Mapping[str, tuple[str, Convert]]] = {
    "receiver_url": ("receiver_url", _as_text),
    "tls_dir": ("tls_dir", _as_text),
    "memory_mode": ("memory_mode", _one_of("Precopy", "Postcopy")),
    "vfio_fds": ("vfio_fds", _as_text),
    "iommufd_fd": ("iommufd_fd", parse_integer),
    "net_fds": ("net_fds", _as_text),
    "zone_updates": ("zone_updates", _as_text),
}


def _object(option: str, text: str, keys: Mapping[str, tuple[str, Convert]], main: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in parse_pairs(option, text, keys, main).items():
        name, convert = keys[key]
        made[name] = convert(f"{option} {key}", value)
    return made


def parse_console(option: str, text: str, keys: Mapping[str, tuple[str, Convert]] | None = None) -> dict[str, Any]:
    """``off``, ``null``, ``tty``, ``pty``, ``file=PATH`` or ``socket=PATH``, as ``--serial`` and ``--console`` take;
    beside it the pairs that ``keys`` knows. :raises ConfigError:"""
    made: dict[str, Any] = {}
    pairs = []
    for part in split_commas(option, text):
        key, equals, value = part.partition("=")
        if not (key in CONSOLE_WORDS and not equals) and not (key in CONSOLE_PATHS and value):
            pairs.append(part)
            continue
        if "mode" in made:
            raise ConfigError(option, text, "more than one mode", "give one")
        made["mode"] = key.capitalize()
        if value:
            made[key] = value
    if "mode" not in made:
        modes = ", ".join([*CONSOLE_WORDS, *(f"{key}=PATH" for key in CONSOLE_PATHS)])
        raise ConfigError(option, text, "no such mode", f"give one of {modes}")
    if pairs and keys is None:
        raise ConfigError(option, text, "more than a mode", f"leave {pairs[0]} out, or quote a path with commas")
    return made | _object(option, ",".join(f'"{part}"' for part in pairs), keys or {}, "")


def parse_vm(arguments: Any, *, terminal: bool = False) -> dict[str, Any]:
    """The body of vm.create from parsed arguments (``kernel``, ``cmdline``, ``initramfs``, ``cpus``, ``memory``,
    ``disk``, ``rng``, ``serial``, ``console``; None where not given). ``terminal``: there is one, so the serial port
    shows on it unless something else was said. :raises ConfigError:"""
    payload = {"kernel": arguments.kernel, "cmdline": arguments.cmdline, "initramfs": arguments.initramfs}
    body: dict[str, Any] = {"payload": payload}
    cpus = _object("--cpus", arguments.cpus or "", CPUS, "boot")
    cpus.setdefault("boot_vcpus", 1)
    body["cpus"] = {"max_vcpus": cpus["boot_vcpus"], **cpus}
    body["memory"] = {"size": 512 << 20, **_object("--memory", arguments.memory or "", MEMORY, "size")}
    body["disks"] = [_object("--disk", text, DISK, "path") for text in arguments.disk or ()]
    body["rng"] = {"src": "/dev/urandom", **_object("--rng", arguments.rng or "", RNG, "src")}
    body["console"] = parse_console("--console", "off" if arguments.console is None else arguments.console, _BUS)
    shown = "tty" if terminal and body["console"]["mode"] != "Tty" else "null"
    body["serial"] = parse_console("--serial", shown if arguments.serial is None else arguments.serial)
    for number, disk in enumerate(body["disks"]):
        if "path" not in disk:
            raise ConfigError("--disk", arguments.disk[number], "no path", "give path=FILE")
    return body


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


def _migration(verb: str, text: str, url: str, keys: Mapping[str, tuple[str, Convert]]) -> dict[str, Any]:
    if text.startswith(("unix:", "tcp:")):
        text = f"{url}={text}"
    made = _object(verb, text, keys, url)
    if not made.get(url):
        raise ConfigError(verb, text, f"no {url}", f"give {url}=unix:/path or tcp:host:port")
    return made
