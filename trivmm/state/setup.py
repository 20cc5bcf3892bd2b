"""A machine's description as it travels in SETUP: its configuration, and what must be equal on both sides."""

from __future__ import annotations

from typing import Any

import attrs

from trivmm.config import VmConfig
from trivmm.errors import ProtocolError
from trivmm.state.strict import structure

__all__ = ["config_from_setup", "config_to_setup"]


def config_to_setup(config: VmConfig) -> dict[str, Any]:
    """JSON-able. Deadlines stay at home: each side has its own."""
    made = attrs.asdict(config)
    del made["deadlines"]
    made["disks"] = list(made["disks"])
    return made


def config_from_setup(value: object) -> VmConfig:
    """:raises ProtocolError: when it isn't a configuration. :raises ConfigError: when it is one that can't be."""
    if isinstance(value, dict) and "deadlines" in value:
        raise ProtocolError('setup.config: unknown field "deadlines"')
    return structure("setup.config", value, VmConfig)
