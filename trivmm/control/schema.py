"""JSON bodies to configuration and back: every refusal one line with the JSON path, the value and the remedy.

Two passes. The first walks the body against the contract's tables (keys that nobody knows, which are told to the
caller's collector and left out; keys that do not exist here yet; missing ones); the second lets cattrs build the
frozen classes, with hooks that never convert one type to another. Pure functions; the command line's options go
through here too, so both refuse the same things in the same words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs
from cattrs.errors import BaseValidationError

from trivmm.config import (
    CpusConfig,
    MemoryConfig,
    PayloadConfig,
    PlatformConfig,
    RateLimiterConfig,
    SerialConfig,
    TokenBucketConfig,
    VmConfig,
)
from trivmm.control.bodies import (
    ReceiveMigrationData,
    RemoveDeviceData,
    ResizeData,
    ResizeDiskData,
    ResolveMigrationData,
    SendMigrationData,
)
from trivmm.control.contract import NOT_YET_KEYS, REQUIRED_KEYS
from trivmm.control.unknown import Unknown, UnknownKeys
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, NotSupported, shown
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.notyet import NotYet, NotYetObject
from trivmm.state.jsontext import MAX_DEPTH, is_too_deep
from trivmm.state.strict import Unfit, first_fault, make_converter
from trivmm.values import not_integer, not_text
from trivmm.virtio.kind import AnyKind
from trivmm.virtio.kinds import KINDS, sections

__all__ = [
    "dump_config",
    "load_config",
    "load_device",
    "load_receive",
    "load_remove",
    "load_resize",
    "load_resize_disk",
    "load_resolve",
    "load_send",
    "parse_json",
    "with_descriptors",
    "without_descriptors",
]

T = TypeVar("T")


@attrs.frozen
class _Destination:
    destination_url: str


# Whose fields are the keys of a schema of the contract.
NOT_IN_JSON: Final = ("deadlines", "virtio")
CLASSES: Final[Mapping[str, tuple[type, ...]]] = {
    "VmConfig": (VmConfig,),
    "PayloadConfig": (PayloadConfig,),
    "CpusConfig": (CpusConfig,),
    "MemoryConfig": (MemoryConfig,),
    "SerialConfig": (SerialConfig,),
    "PlatformConfig": (PlatformConfig,),
    **{kind.contract.schema: (kind.config,) for kind in KINDS if not kind.contract.flag},
    "RateLimiterConfig": (RateLimiterConfig,),
    "TokenBucket": (TokenBucketConfig,),
    "SendMigrationData": (_Destination, SendOptions),
    "ReceiveMigrationData": (ReceiveMigrationData,),
    "VmResize": (ResizeData,),
    "VmResizeDisk": (ResizeDiskData,),
    "VmRemoveDevice": (RemoveDeviceData,),
}
OURS: Final[Mapping[str, tuple[type, ...]]] = {"ResolveMigrationData": (ResolveMigrationData,)}
# The fields of Cloud Hypervisor's structs that are options there, but not None in our classes.
NULL_IS_LEFT_OUT: Final = {
    ("VmConfig", "payload"),
    ("PayloadConfig", "kernel"),
    ("PayloadConfig", "cmdline"),
    ("TokenBucket", "one_time_burst"),
    ("VmConfig", "platform"),
    ("PlatformConfig", "oem_strings"),
    *(("VmConfig", kind.contract.section) for kind in KINDS if kind.contract.many),
    *(("VmConfig", section) for section in sections()),
}
NESTED: Final[Mapping[str, str]] = {
    "payload": "PayloadConfig",
    "cpus": "CpusConfig",
    "memory": "MemoryConfig",
    "serial": "SerialConfig",
    "platform": "PlatformConfig",
    **{kind.contract.section: kind.contract.schema for kind in KINDS if not kind.contract.many | kind.contract.flag},
}
ALIASES: Final[Mapping[tuple[str, str], str]] = {
    ("PlatformConfig", "serial_number"): "system_serial_number",
    ("PlatformConfig", "uuid"): "system_uuid",
}  # the contract's older names
FLAGS: Final = {kind.contract.section for kind in KINDS if kind.contract.flag}
INNER: Final[Mapping[str, str]] = {
    "rate_limiter_config": "RateLimiterConfig",
    "bandwidth": "TokenBucket",
    "ops": "TokenBucket",
}  # objects in the objects of devices
LISTED: Final[Mapping[str, str]] = {kind.contract.section: kind.contract.schema for kind in KINDS if kind.contract.many}
BEYOND: Final = sections()  # of devices that have no field in VmConfig


def parse_json(body: bytes) -> object:
    """A JSON document, whatever a client sends. :raises ConfigError: when it isn't one."""
    try:
        if not is_too_deep(body):
            return json.loads(body.decode(), parse_constant=_no_constant)
        problem = f"nested more than {MAX_DEPTH} deep"
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (json.JSONDecodeError, _NotJson) as error:
        problem = str(error)
    except ValueError:  # an integer of thousands of digits
        problem = "a number is too long"
    # Not chained: what Python's parser says of itself is nothing for an API client.
    raise ConfigError("body", body, f"not JSON ({problem})", "send one JSON object")


def load_config(value: object, unknown: Unknown | None = None, *, deadlines: Deadlines | None = None) -> VmConfig:
    """A ``VmConfig`` from the body of vm.create. ``deadlines`` are not part of the contract: the process has them.

    ``unknown`` is told each key that the contract does not have; without it they are logged.

    :raises ConfigError: naming the JSON path, the value and the remedy (``NotSupported``: what isn't there yet)."""
    given = _checked("VmConfig", value, "", UnknownKeys() if unknown is None else unknown)
    devices = [
        _structured(each, cls, where)
        for section, cls in BEYOND.items()
        for where, each in _listed(section, given.pop(section, []))
    ]
    config = attrs.evolve(_structured(given, VmConfig), virtio=devices)
    return config if deadlines is None else attrs.evolve(config, deadlines=deadlines)


def load_send(value: object, unknown: Unknown | None = None) -> SendMigrationData:
    """:raises ConfigError: as :func:`load_config`."""
    given = _checked("SendMigrationData", value, "", UnknownKeys() if unknown is None else unknown)
    where = _structured({"destination_url": given.pop("destination_url")}, _Destination)
    return SendMigrationData(where.destination_url, _structured(given, SendOptions))


def _listed(section: str, item: Any) -> list[tuple[str, Any]]:
    """Each of its devices, and where it stands."""
    if isinstance(item, list):
        return [(f"{section}[{index}]", each) for index, each in enumerate(item)]
    return [(section, item)]


def load_device(kind: AnyKind, value: object, unknown: Unknown | None = None) -> Any:
    """The body of a verb that adds a device: its kind's schema. :raises ConfigError: as :func:`load_config`."""
    return _load(kind.contract.schema, kind.config, value, unknown)


def with_descriptors(kind: AnyKind, body: Any, fds: Sequence[int]) -> Any:
    """The body of a verb that adds a device, with the descriptors that came along with it in their place: numbers that
    a client has for them mean nothing here. :raises ConfigError: it names some, and none came."""
    key = kind.descriptors
    if not key or not isinstance(body, dict):
        return body
    if not fds and body.get(key) is not None:
        raise _not_passed(key, body[key])
    return {**body, key: list(fds)} if fds else body


def without_descriptors(body: Any) -> Any:
    """A body with which none come. :raises ConfigError: it names some."""
    for kind in KINDS:
        found = body.get(kind.contract.section) if kind.descriptors and isinstance(body, dict) else None
        for index, each in enumerate(found if isinstance(found, list) else ()):
            if isinstance(each, dict) and each.get(kind.descriptors) is not None:
                raise _not_passed(f"{kind.contract.section}[{index}].{kind.descriptors}", each[kind.descriptors])
    return body


def _not_passed(where: str, value: object) -> ConfigError:
    remedy = "pass them along with a request that adds the device (SCM_RIGHTS)"
    return ConfigError(where, value, "numbers of descriptors mean nothing to another process", remedy)


def load_remove(value: object, unknown: Unknown | None = None) -> RemoveDeviceData:
    """:raises ConfigError: as :func:`load_config`."""
    return _load("VmRemoveDevice", RemoveDeviceData, value, unknown)


def load_receive(value: object, unknown: Unknown | None = None) -> ReceiveMigrationData:
    """:raises ConfigError: as :func:`load_config`."""
    return _load("ReceiveMigrationData", ReceiveMigrationData, value, unknown)


def load_resize(value: object, unknown: Unknown | None = None) -> ResizeData:
    """The body of vm.resize, which may be all null or empty. :raises ConfigError: as :func:`load_config`."""
    return _load("VmResize", ResizeData, value, unknown)


def load_resize_disk(value: object, unknown: Unknown | None = None) -> ResizeDiskData:
    """:raises ConfigError: as :func:`load_config`."""
    return _load("VmResizeDisk", ResizeDiskData, value, unknown)


def load_resolve(value: object, unknown: Unknown | None = None) -> ResolveMigrationData:
    """The body of vm.resolve-migration, which may be empty. :raises ConfigError: as :func:`load_config`."""
    return _load("ResolveMigrationData", ResolveMigrationData, value, unknown)


def dump_config(config: VmConfig) -> dict[str, Any]:
    """The configuration as vm.info gives it: Cloud Hypervisor's keys with its defaults, and none that is null, since
    most of its structs' fields can't be. It accepts this as vm.create's body; so do we: it loads to an equal one."""
    made = _said("VmConfig")
    for key, schema in NESTED.items():
        if key not in BEYOND:
            made[key] = _dumped(schema, getattr(config, key))
    made["pvpanic"] = config.pvpanic
    if config.platform == PlatformConfig():
        del made["platform"]  # as there, where nothing was said
    made["payload"] = {key: item for key, item in made["payload"].items() if item != ""}
    for kind in KINDS:
        contract, found = kind.contract, kind.of(config)
        if contract.flag:
            made[contract.section] = bool(found)
        elif contract.many and found:
            made[contract.section] = [_dumped(contract.schema, each) for each in found]
        elif contract.section in BEYOND and found:
            made[contract.section] = _dumped(contract.schema, found[0])
    return {key: item for key, item in made.items() if item or key != "payload"}


def _dumped(schema: str, config: Any) -> dict[str, Any]:
    return _without_null(attrs.asdict(config)) | _said(schema)


def _without_null(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_null(value) if isinstance(value, dict) else value
        for key, value in item.items()
        if value is not None
    }


def _said(schema: str) -> dict[str, Any]:
    """What vm.info says of the keys that do not exist here."""
    made: dict[str, Any] = {}
    for key, accepted in NOT_YET_KEYS.get(schema, {}).items():
        if isinstance(accepted, NotYetObject):
            if accepted.said:
                made[key] = _said(accepted.schema)
            continue
        row = accepted if isinstance(accepted, NotYet) else NotYet(accepted)
        if row.said and row.default is not None:
            made[key] = row.default
    return made


# --- the first pass: the contract's tables -------------------------------------------------------------------


def _load(schema: str, cls: type[T], value: object, unknown: Unknown | None) -> T:
    return _structured(_checked(schema, value, "", UnknownKeys() if unknown is None else unknown), cls)


def _checked(schema: str, value: object, path: str, unknown: Unknown) -> dict[str, Any]:
    """The supported keys of ``value``, nested objects too. :raises ConfigError: / :raises NotSupported: by name."""
    if not isinstance(value, dict):
        raise ConfigError(path or "body", value, "not an object", "give a JSON object")
    classes = (CLASSES if schema in CLASSES else OURS)[schema]
    known = [field.name for cls in classes for field in attrs.fields(cls) if field.name not in NOT_IN_JSON]
    known += BEYOND if schema == "VmConfig" else ()
    not_yet = NOT_YET_KEYS.get(schema, {})
    made: dict[str, Any] = {}
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        key = ALIASES.get((schema, str(key)), key)
        if key in made:
            raise ConfigError(where, item, f"{key} is given too", "give one of them")
        if key in known:
            made[key] = _nested(schema, key, item, where, unknown)
        elif key in not_yet:
            _refuse_unless_default(where, item, not_yet[key], unknown)
        else:
            unknown(schema, key, [*known, *not_yet])
    for key in REQUIRED_KEYS.get(schema, ()):
        if made.get(key) is None:
            raise ConfigError(f"{path}.{key}" if path else key, None, "missing", "give it")
    return {key: item for key, item in made.items() if item is not _LEFT_OUT}


_LEFT_OUT: Final = object()


def _nested(schema: str, key: str, item: object, where: str, unknown: Unknown) -> object:
    if item is None and (schema, key) in NULL_IS_LEFT_OUT:
        return _LEFT_OUT
    if schema == "VmConfig" and key in FLAGS:
        if not isinstance(item, bool):
            raise ConfigError(where, item, "wrong type", "give true or false")
        return {} if item else _LEFT_OUT
    if schema == "VmConfig" and key in LISTED:
        if not isinstance(item, list):
            raise ConfigError(where, item, "not a list", f"give a list of {key}")
        return [_checked(LISTED[key], each, f"{where}[{index}]", unknown) for index, each in enumerate(item)]
    if schema == "VmConfig" and key in NESTED:
        return _checked(NESTED[key], item, where, unknown)
    if key in INNER and item is not None:
        return _checked(INNER[key], item, where, unknown)
    return item


def _refuse_unless_default(where: str, item: object, accepted: object, unknown: Unknown) -> None:
    if item is None or item == []:
        return
    if isinstance(accepted, NotYetObject) and isinstance(item, dict):
        keys = NOT_YET_KEYS[accepted.schema]
        for key, inner in item.items():
            if key in keys:
                _refuse_unless_default(f"{where}.{key}", inner, keys[key], unknown)
            else:
                unknown(accepted.schema, key, keys)
        return
    if isinstance(accepted, NotYetObject):
        raise NotSupported(where, item, "not supported yet", "leave it out")
    row = accepted if isinstance(accepted, NotYet) else NotYet(accepted)
    if any(item == value and type(item) is type(value) for value in (row.default, *row.also)):
        return
    remedy = "leave it out" if row.default is None else f"leave it out, or {shown(row.default)}"
    raise NotSupported(where, item, "not supported yet", remedy)


# --- the second pass: types ----------------------------------------------------------------------------------


def _not_unicode(value: object) -> str | None:
    wanted = not_text(value)
    if wanted is None:
        try:
            str(value).encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            wanted = "Unicode text"
    return wanted


def _structure_strategy(value: Any, _: Any) -> Any:
    """:class:`SendOptions` says which there are."""
    wanted = not_text(value)
    if wanted is not None:
        raise Unfit(value, wanted)
    return value


CONVERTER: Final = make_converter(_not_unicode, not_integer)  # the contract's numbers are integers
CONVERTER.register_structure_hook(TimeoutStrategy, _structure_strategy)


def _structured(fields: dict[str, Any], cls: type[T], path: str = "") -> T:
    try:
        return CONVERTER.structure(fields, cls)
    except BaseValidationError as group:
        path, fault = first_fault(group, path)
    if not isinstance(fault, ConfigError):
        if isinstance(fault, Unfit):
            fault = ConfigError(path, fault.value, "wrong type", f"give {fault.wanted}")
        else:
            fault = ConfigError(path or "body", "", str(fault), "see the API contract")
    raise fault  # not chained: that a class was being structured is nothing for an API client


class _NotJson(ValueError):
    """What Python's parser would take."""


def _no_constant(name: str) -> object:
    raise _NotJson(f"{name} is not JSON")
