"""JSON bodies to configuration and back: strict, every refusal one line with the JSON path, the value and the remedy.

Two passes. The first walks the body against the contract's tables (unknown keys, keys that do not exist here yet,
missing ones); the second lets cattrs build the frozen classes, with hooks that never convert one type to another.
Pure functions; the command line's options go through here too, so both refuse the same things in the same words.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import attrs
import cattrs
from cattrs.errors import BaseValidationError

from trivmm.config import (
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    RngConfig,
    SerialConfig,
    VmConfig,
)
from trivmm.control.contract import NOT_YET_KEYS, REQUIRED_KEYS
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, NotSupported

__all__ = [
    "ReceiveMigrationData",
    "SendMigrationData",
    "dump_config",
    "load_config",
    "load_receive",
    "load_send",
    "parse_json",
]

MAX_TEXT: Final = 1 << 16  # a kernel takes 2 KiB of command line; no path or id is longer than this
MAX_INTEGER: Final = (1 << 64) - 1  # the contract's integers are u64 at most
MAX_VALUE_SHOWN: Final = 80  # characters of a bad value in a message, so that it stays one line
STRATEGIES: Final = ("Cancel", "Ignore")

T = TypeVar("T")


@attrs.frozen
class SendMigrationData:
    """``downtime_ms`` and ``timeout_s`` None take the VM's own deadlines (300 ms, 3600 s unless configured)."""

    destination_url: str
    downtime_ms: int | None = None
    timeout_s: int | None = None
    timeout_strategy: str = "Cancel"

    def __attrs_post_init__(self) -> None:
        for name in ("downtime_ms", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "too small", "give 1 or more")
        if self.timeout_strategy not in STRATEGIES:
            raise ConfigError("timeout_strategy", self.timeout_strategy, "unknown", "give Cancel or Ignore")


@attrs.frozen
class ReceiveMigrationData:
    receiver_url: str


CLASSES: Final[Mapping[str, type]] = {
    "VmConfig": VmConfig,
    "PayloadConfig": PayloadConfig,
    "CpusConfig": CpusConfig,
    "MemoryConfig": MemoryConfig,
    "DiskConfig": DiskConfig,
    "RngConfig": RngConfig,
    "SerialConfig": SerialConfig,
    "ConsoleConfig": ConsoleConfig,
    "SendMigrationData": SendMigrationData,
    "ReceiveMigrationData": ReceiveMigrationData,
}
NESTED: Final[Mapping[str, str]] = {
    "payload": "PayloadConfig",
    "cpus": "CpusConfig",
    "memory": "MemoryConfig",
    "rng": "RngConfig",
    "serial": "SerialConfig",
    "console": "ConsoleConfig",
}


def parse_json(body: bytes) -> object:
    """A JSON document, whatever a client sends. :raises ConfigError: when it isn't one."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of 5000 digits, 10000 brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError("body", _shown(body), f"not JSON ({problem})", "send one JSON object") from error


def load_config(value: object, *, deadlines: Deadlines | None = None) -> VmConfig:
    """A ``VmConfig`` from the body of vm.create. ``deadlines`` are not part of the contract: the process has them.

    :raises ConfigError: naming the JSON path, the value and the remedy (``NotSupported``: what isn't there yet)."""
    fields = _checked("VmConfig", value, "")
    config = _structured(fields, VmConfig)
    return config if deadlines is None else attrs.evolve(config, deadlines=deadlines)


def load_send(value: object) -> SendMigrationData:
    """:raises ConfigError: as :func:`load_config`."""
    return _structured(_checked("SendMigrationData", value, ""), SendMigrationData)


def load_receive(value: object) -> ReceiveMigrationData:
    """:raises ConfigError: as :func:`load_config`."""
    return _structured(_checked("ReceiveMigrationData", value, ""), ReceiveMigrationData)


def dump_config(config: VmConfig) -> dict[str, Any]:
    """The configuration as vm.info gives it: every key of the contract, defaults filled in. Loads to an equal one."""
    made = attrs.asdict(config)
    del made["deadlines"]
    made["disks"] = [{**NOT_YET_KEYS["DiskConfig"], **disk} for disk in made["disks"]]
    for key, schema in NESTED.items():
        made[key] = {**NOT_YET_KEYS.get(schema, {}), **made[key]}
    # Objects that do not exist here are null as a whole, as in Cloud Hypervisor's own answer.
    absent = {key: None if isinstance(default, dict) else default for key, default in NOT_YET_KEYS["VmConfig"].items()}
    return {**made, **absent}


# --- the first pass: the contract's tables -------------------------------------------------------------------


def _checked(schema: str, value: object, path: str) -> dict[str, Any]:
    """The supported keys of ``value``, nested objects too. :raises ConfigError: / :raises NotSupported: by name."""
    if not isinstance(value, dict):
        raise ConfigError(path or "body", _shown(value), "not an object", "give a JSON object")
    known = {field.name: field for field in attrs.fields(CLASSES[schema]) if field.name != "deadlines"}
    missing_here = NOT_YET_KEYS.get(schema, {})
    made: dict[str, Any] = {}
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if key in known:
            made[key] = _nested(schema, key, item, where)
        elif key in missing_here:
            _refuse_unless_default(where, item, missing_here[key])
        else:
            near = difflib.get_close_matches(key, [*known, *missing_here], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(str(_shown(where, quote=False)), _shown(item), "unknown key", hint)
    for key in REQUIRED_KEYS.get(schema, ()):
        if made.get(key) is None:
            remedy = (
                "give the path of a PVH ELF kernel; firmware is not supported yet" if key == "kernel" else "give it"
            )
            raise ConfigError(f"{path}.{key}" if path else key, None, "missing", remedy)
    return {key: item for key, item in made.items() if item is not _LEFT_OUT}


_LEFT_OUT: Final = object()


def _nested(schema: str, key: str, item: object, where: str) -> object:
    if schema == "VmConfig" and key == "disks":
        if item is None:
            return []
        if not isinstance(item, list):
            raise ConfigError(where, _shown(item), "not a list", "give a list of disks")
        return [_checked("DiskConfig", disk, f"{where}[{index}]") for index, disk in enumerate(item)]
    if schema == "VmConfig" and key in NESTED:
        return _checked(NESTED[key], item, where)
    if schema == "PayloadConfig" and key == "cmdline" and item is None:
        return _LEFT_OUT
    return item


def _refuse_unless_default(where: str, item: object, default: object) -> None:
    if item is None or item in ([], {}) or (item == default and type(item) is type(default)):
        return
    if isinstance(default, dict) and isinstance(item, dict):
        for key, inner in item.items():
            _refuse_unless_default(f"{where}.{_shown(key, quote=False)}", inner, default.get(key))
        return
    remedy = "leave it out" if default is None or isinstance(default, dict) else f"leave it out, or {default!r}"
    raise NotSupported(where, _shown(item), "not supported yet", remedy)


# --- the second pass: types ----------------------------------------------------------------------------------


class _WrongType(ValueError):
    def __init__(self, value: object, wanted: str) -> None:
        self.value = value
        self.wanted = wanted
        super().__init__(f"{value!r:.80} is not {wanted}")


def _text(value: object, _: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        raise _WrongType(value, f"text of at most {MAX_TEXT} characters without a zero")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise _WrongType(value, "Unicode text") from error
    return value


def _integer(value: object, _: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        raise _WrongType(value, "an integer from 0 to 2^64-1")
    return value


def _boolean(value: object, _: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongType(value, "true or false")
    return value


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(int, _integer)
    converter.register_structure_hook(bool, _boolean)
    return converter


CONVERTER: Final = _make_converter()


def _structured(fields: dict[str, Any], cls: type[T]) -> T:
    try:
        return CONVERTER.structure(fields, cls)
    except ConfigError:
        raise
    except BaseValidationError as group:
        raise _first_fault(group) from group


def _first_fault(group: BaseException, path: str = "") -> ConfigError:
    """The first leaf of cattrs' tree of errors, with the path that its notes give."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
        for note in getattr(group, "__notes__", ()):
            name, index = getattr(note, "name", None), getattr(note, "index", None)
            if name is not None:
                path = f"{path}.{name}" if path else str(name)
            elif index is not None:
                path = f"{path}[{index}]"
    if isinstance(group, ConfigError):
        return group
    if isinstance(group, _WrongType):
        return ConfigError(path, _shown(group.value), "wrong type", f"give {group.wanted}")
    return ConfigError(path or "body", "", str(group), "see the API contract")


def _shown(value: object, *, quote: bool = True) -> object:
    """A value as a message may carry it: short. Small plain values stay what they are."""
    if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) <= MAX_INTEGER):
        return value
    text = value if isinstance(value, str) else repr(value)[: MAX_VALUE_SHOWN * 2]
    text = text if len(text) <= MAX_VALUE_SHOWN else text[:MAX_VALUE_SHOWN] + "…"
    return text if quote else text.encode("unicode_escape").decode()


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
