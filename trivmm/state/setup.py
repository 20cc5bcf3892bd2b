"""A machine's description as it travels in SETUP: its configuration, and what must be equal on both sides."""

from __future__ import annotations

import os
from typing import Any

import attrs
import cattrs

from trivmm.config import VmConfig
from trivmm.errors import ConfigError, ProtocolError, TrivmmError

__all__ = ["config_from_setup", "config_to_setup"]


def config_to_setup(config: VmConfig) -> dict[str, Any]:
    """JSON-able. Deadlines stay at home: each side has its own."""
    made = attrs.asdict(config)
    del made["deadlines"]
    made["disks"] = list(made["disks"])
    return made


def config_from_setup(value: object) -> VmConfig:
    """:raises ProtocolError: when it isn't a configuration. :raises ConfigError: when it is one that can't be."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
    converter.register_structure_hook(str, _text)
    converter.register_structure_hook(int, _integer)
    converter.register_structure_hook(bool, _boolean)
    if not isinstance(value, dict) or "deadlines" in value:
        raise ProtocolError("setup: config is not a configuration")
    try:
        return converter.structure(value, VmConfig)
    except ConfigError:
        raise
    except TrivmmError:
        raise
    except Exception as error:  # whatever a hostile stream makes cattrs raise
        raise ProtocolError(f"setup: config is malformed ({error})") from error


def _text(value: object, _: object) -> str:
    if not isinstance(value, str) or len(value) > 1 << 16:
        raise ValueError(f"{value!r:.80} is not text")
    os.fsencode(value)  # a lone surrogate, which JSON can spell, is a ValueError
    return value


def _integer(value: object, _: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.80} is not an integer")
    return value


def _boolean(value: object, _: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.80} is not true or false")
    return value
