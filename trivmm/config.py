"""A VM's configuration: frozen, plain data, in Cloud Hypervisor's words.

Field names are those of the API contract, so that a JSON body, a command line and a Python call say the same.
Structure only: reading JSON and option strings, and the checks that need the host, live in
``trivmm.control.schema`` and ``trivmm.cli.options``; checks of values that need nothing else are validators here.
A Python call may give a size as ``"512M"``, a path as an ``os.PathLike``, and disks as any list of paths or
``DiskConfig``; any other type is a ``ConfigError`` too, never a bare ``TypeError`` from somewhere inside.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, NotSupported
from trivmm.values import not_boolean, not_integer, not_text, parse_size

__all__ = [
    "CONSOLE_MODES",
    "MAX_VCPUS",
    "ConsoleConfig",
    "CpusConfig",
    "DiskConfig",
    "MemoryConfig",
    "PayloadConfig",
    "PlatformConfig",
    "RateLimiterConfig",
    "RngConfig",
    "SerialConfig",
    "TokenBucketConfig",
    "VmConfig",
    "check_id",
    "typed",
]

MAX_VCPUS: Final = 8  # the probe guest's and the state format's limit; KVM itself allows more
MAX_DISKS: Final = 24  # PCI slots 1..31 less console, rng and room for hotplug
MAX_SERIAL: Final = 20  # bytes: virtio 1.2 section 5.2.6, VIRTIO_BLK_T_GET_ID
MAX_SMBIOS: Final = 60 << 10  # bytes of all its texts: they have the 64 KiB below 1 MiB
MAX_OEM_STRINGS: Final = 255  # one byte counts them
MAX_TOKENS: Final = (1 << 63) - 1  # bytes or operations of a rate limiter, or milliseconds
MAX_ID: Final = 128  # characters; an id names threads, log lines, counters and state
OUR_IDS: Final = ("__", "_virtio-pci-")  # what the VMM's own entries in the device tree and the counters begin with
CONSOLE_MODES: Final = ("Off", "Null", "Tty", "Pty", "File", "Socket")
IMAGE_TYPES: Final = ("Raw", "Qcow2", "Unknown")
FOREIGN_IMAGES: Final = ("Vhdx", "FixedVhd", "FlatVmdk")  # Cloud Hypervisor's others
ALIGNMENT: Final = 2 << 20  # RAM sizes: one x86 large page, so that a region never splits one


def _integers(value: object) -> bool:
    return isinstance(value, tuple) and not any(not_integer(each) for each in value)


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and not any(not_text(each) for each in value)


CHECKS: Final[Mapping[str, Callable[[object], str | None]]] = {
    "bool": not_boolean,
    "int": not_integer,
    "str": not_text,
    "RateLimiterConfig | None": lambda value: (
        None if value is None or isinstance(value, RateLimiterConfig) else "a RateLimiterConfig"
    ),
    "TokenBucketConfig | None": lambda value: (
        None if value is None or isinstance(value, TokenBucketConfig) else "a TokenBucketConfig"
    ),
    "int | None": lambda value: None if value is None else not_integer(value),
    "str | None": lambda value: None if value is None else not_text(value),
    "tuple[int, ...] | None": lambda value: None if value is None or _integers(value) else "a list of whole numbers",
    "tuple[str, ...]": lambda value: None if _texts(value) else "a list of texts",
    "tuple[DiskConfig, ...]": lambda value: None,  # the field's converter has looked at each
    "tuple[Any, ...]": lambda value: None if isinstance(value, tuple) else "a list",  # the board looks at each
}

PathText = str | os.PathLike[str]


def typed(place: str) -> Callable[[type, list[attrs.Attribute[Any]]], list[attrs.Attribute[Any]]]:
    """A field transformer: every field refuses what its annotation does not name, in words. ``place`` is where the
    class stands in a VM's configuration, as a mistake spells it (``disks.``)."""

    def transform(cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
        return [field.evolve(validator=_type_validator(place + field.name, field)) for field in fields]

    return transform


def _type_validator(where: str, field: attrs.Attribute[Any]) -> Callable[[Any, Any, Any], None]:
    inner, annotation = field.validator, str(field.type)
    check = CHECKS.get(annotation) or _instance_check(annotation)

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        wanted = check(value)
        if wanted is not None:
            raise ConfigError(where, value, "wrong type", f"give {wanted}")
        if inner is not None:
            inner(instance, attribute, value)

    return validate


def _instance_check(annotation: str) -> Callable[[object], str | None]:
    wanted: type = globals()[annotation]  # a KeyError at import: an annotation that has no check yet
    return lambda value: None if isinstance(value, wanted) else f"a {annotation}"


def _as_size(value: int | str) -> int:
    return parse_size("memory.size", value) if isinstance(value, str) else value


def _as_path(value: PathText) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        return os.fsdecode(value) if isinstance(value, bytes) else value
    return value


def _as_path_or_none(value: PathText | None) -> str | None:
    return None if value is None else _as_path(value)


def _as_disks(value: Iterable[DiskConfig | PathText]) -> tuple[DiskConfig, ...]:
    remedy = "give a list of paths or of DiskConfig"
    if isinstance(value, str | bytes | os.PathLike | Mapping):
        raise ConfigError("disks", value, "not a list", remedy)
    try:
        disks = tuple(value)
    except TypeError as error:
        raise ConfigError("disks", value, "not a list", remedy) from error
    made = []
    for index, disk in enumerate(disks):
        if isinstance(disk, str | os.PathLike):
            disk = DiskConfig(disk)
        elif not isinstance(disk, DiskConfig):
            raise ConfigError(f"disks[{index}]", disk, "wrong type", "give a DiskConfig, or the path of an image")
        made.append(disk)
    return tuple(made)


def _as_tuple(value: Iterable[Any]) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value  # anything else is refused as it is


def _check_smbios(field: str, value: str) -> None:
    if not value or not value.isprintable():  # an empty one would end the list of them, and so would a NUL
        raise ConfigError(field, f"{value:.40}", "no line of text", "give printable characters, or leave it out")


def check_id(field: str, value: str | None) -> None:
    """Of a device, where it has one. :raises ConfigError: naming ``field``."""
    if value is not None and (len(value) > MAX_ID or not value.isprintable()):
        raise ConfigError(field, value, "not a name", f"give at most {MAX_ID} printable characters, or leave it out")
    if value is not None and value.startswith(OUR_IDS):
        raise ConfigError(field, value, f"ids that begin with {' or '.join(OUR_IDS)} are the VMM's own", "give another")


def _check_image_type(value: str) -> None:
    if value in FOREIGN_IMAGES:
        remedy = "convert it (qemu-img convert -O qcow2 OLD NEW) and give Qcow2"
        raise NotSupported("disks.image_type", value, "only raw and qcow2 images are supported yet", remedy)
    if value not in IMAGE_TYPES:
        raise ConfigError("disks.image_type", f"{value:.80}", "no such type", "give Raw or Qcow2, or leave it out")


def _check_mode(field: str, mode: str, file: str | None, socket: str | None) -> None:
    if mode not in CONSOLE_MODES:
        raise ConfigError(f"{field}.mode", mode, "no such mode", f"use {', '.join(CONSOLE_MODES)}")
    for needs, name, value in (("File", "file", file), ("Socket", "socket", socket)):
        if mode == needs and not value:
            raise ConfigError(f"{field}.{name}", value, f"missing, and the mode is {mode}", "give a path")


@attrs.frozen(field_transformer=typed("cpus."))
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


@attrs.frozen(field_transformer=typed("memory."))
class MemoryConfig:
    """``size`` in bytes, or given as text such as ``512M``. ``shared`` is accepted for compatibility: RAM is always a
    shared memfd mapping."""

    size: int = attrs.field(default=512 << 20, converter=_as_size)
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


@attrs.frozen(field_transformer=typed("payload."))
class PayloadConfig:
    """``kernel`` is a PVH ELF, or a bzImage with one in it, needed at boot and not before; ``initramfs`` a file handed
    to it untouched. ``firmware``, instead of a kernel: a flat image for the top of 4 GiB, or a PVH ELF; it finds what
    it boots itself, and command line and initramfs are not for it."""

    kernel: str = attrs.field(default="", converter=_as_path)
    cmdline: str = ""
    initramfs: str | None = attrs.field(default=None, converter=_as_path_or_none)
    firmware: str | None = attrs.field(default=None, converter=_as_path_or_none)

    def __attrs_post_init__(self) -> None:
        if self.kernel and self.firmware is not None:
            raise ConfigError("payload.firmware", self.firmware, "there is a kernel too", "give one of them")


@attrs.frozen(field_transformer=typed("platform."))
class PlatformConfig:
    """What SMBIOS says of the machine (``trivmm.boot.smbios``); None: a text of ours, or none. ``system_uuid`` in any
    of the usual spellings; ``oem_strings``: texts that a guest finds by ``dmidecode -t 11``."""

    system_manufacturer: str | None = None
    system_product_name: str | None = None
    system_version: str | None = None
    system_serial_number: str | None = None
    system_uuid: str | None = None
    system_sku_number: str | None = None
    system_family: str | None = None
    chassis_asset_tag: str | None = None
    oem_strings: tuple[str, ...] = attrs.field(default=(), converter=_as_tuple)

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if isinstance(value, str):
                _check_smbios(f"platform.{name}", value)
        for index, value in enumerate(self.oem_strings):
            _check_smbios(f"platform.oem_strings[{index}]", value)
        if len(self.oem_strings) > MAX_OEM_STRINGS:
            remedy = f"give at most {MAX_OEM_STRINGS}"
            raise ConfigError("platform.oem_strings", len(self.oem_strings), "too many", remedy)
        texts = [*self.oem_strings, *(each for each in attrs.asdict(self).values() if isinstance(each, str))]
        size = sum(len(text.encode()) + 1 for text in texts)
        if size > MAX_SMBIOS:
            raise ConfigError("platform", f"{size} bytes", "too long for SMBIOS", f"give at most {MAX_SMBIOS}")
        try:
            uuid.UUID(self.system_uuid or 32 * "0")
        except ValueError:
            remedy = "give 32 hex digits, such as 01234567-89ab-cdef-0123-456789abcdef"
            raise ConfigError("platform.system_uuid", self.system_uuid, "not a UUID", remedy) from None


@attrs.frozen(field_transformer=typed("rate_limiter_config."))
class TokenBucketConfig:
    """``size`` tokens, refilled evenly in ``refill_time`` milliseconds, and ``one_time_burst`` more to begin with.
    Where one of the first two is 0 there is no limit."""

    size: int
    refill_time: int
    one_time_burst: int = 0

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if not 0 <= value <= MAX_TOKENS:
                raise ConfigError(f"rate_limiter_config.{name}", value, "out of range", f"give 0 to {MAX_TOKENS}")


@attrs.frozen(field_transformer=typed("rate_limiter_config."))
class RateLimiterConfig:
    """``bandwidth`` has a token for each byte, ``ops`` one for each request."""

    bandwidth: TokenBucketConfig | None = None
    ops: TokenBucketConfig | None = None


@attrs.frozen(field_transformer=typed("disks."))
class DiskConfig:
    """``direct``: past the host's page cache. ``sparse``: what the guest discards or fills with zeroes becomes a hole.
    ``image_type``: ``Raw`` is obeyed, whatever the bytes look like; ``Qcow2`` must be one. ``Unknown`` looks at them
    once, at the first boot, and then says what was found (``trivmm.virtio.block.formats``). ``backing_files``: where
    those of a qcow2 image may lie, anywhere or only beneath its own folder (``trivmm.virtio.block.chain``)."""

    path: str = attrs.field(converter=_as_path)
    readonly: bool = False
    id: str | None = None
    serial: str | None = None
    num_queues: int = 1
    queue_size: int = 128
    pci_device_id: int | None = None
    image_type: str = "Unknown"
    direct: bool = False
    sparse: bool = True
    disable_io_uring: bool = False
    rate_limiter_config: RateLimiterConfig | None = None
    backing_files: bool = False

    def __attrs_post_init__(self) -> None:
        check_id("disks.id", self.id)
        _check_image_type(self.image_type)
        if self.serial is not None and len(self.serial.encode(errors="replace")) > MAX_SERIAL:
            raise ConfigError("disks.serial", self.serial, "too long", f"give at most {MAX_SERIAL} bytes")


@attrs.frozen(field_transformer=typed("rng."))
class RngConfig:
    src: str = attrs.field(default="/dev/urandom", converter=_as_path)
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        check_id("rng.id", self.id)


@attrs.frozen(field_transformer=typed("serial."))
class SerialConfig:
    """``mode`` is one of :data:`CONSOLE_MODES`; ``File`` needs ``file``, ``Socket`` needs ``socket``."""

    mode: str = "Null"
    file: str | None = attrs.field(default=None, converter=_as_path_or_none)
    socket: str | None = attrs.field(default=None, converter=_as_path_or_none)

    def __attrs_post_init__(self) -> None:
        _check_mode("serial", self.mode, self.file, self.socket)


@attrs.frozen(field_transformer=typed("console."))
class ConsoleConfig:
    """virtio-console, as :class:`SerialConfig`; ``Off``: there is no such device."""

    mode: str = "Off"
    file: str | None = attrs.field(default=None, converter=_as_path_or_none)
    socket: str | None = attrs.field(default=None, converter=_as_path_or_none)
    id: str | None = None
    pci_device_id: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_mode("console", self.mode, self.file, self.socket)
        check_id("console.id", self.id)


@attrs.frozen(field_transformer=typed(""))
class VmConfig:
    """``virtio`` are the devices that have no field of their own, each the configuration class of its kind
    (``trivmm.virtio.kinds``)."""

    payload: PayloadConfig = attrs.field(factory=PayloadConfig)
    cpus: CpusConfig = attrs.field(factory=CpusConfig)
    memory: MemoryConfig = attrs.field(factory=MemoryConfig)
    disks: tuple[DiskConfig, ...] = attrs.field(default=(), converter=_as_disks)
    rng: RngConfig = attrs.field(factory=RngConfig)
    serial: SerialConfig = attrs.field(factory=SerialConfig)
    console: ConsoleConfig = attrs.field(factory=ConsoleConfig)
    pvpanic: bool = False
    platform: PlatformConfig = attrs.field(factory=PlatformConfig)
    virtio: tuple[Any, ...] = attrs.field(default=(), converter=_as_tuple)
    deadlines: Deadlines = attrs.field(factory=Deadlines)

    def __attrs_post_init__(self) -> None:
        if len(self.virtio) > MAX_DISKS:
            raise ConfigError("virtio", len(self.virtio), "too many devices", f"give at most {MAX_DISKS}")
        if len(self.disks) > MAX_DISKS:
            raise ConfigError("disks", len(self.disks), "too many disks", f"give at most {MAX_DISKS}")
