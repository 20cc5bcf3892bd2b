"""A machine's description as it travels in SETUP: its configuration, and what must be equal on both sides."""

from __future__ import annotations

from typing import Annotated, Any

import attrs

from trivmm.config import VmConfig
from trivmm.errors import ProtocolError
from trivmm.state.machine import MAX_DEVICES
from trivmm.state.strict import structure
from trivmm.values import U8, U64, AtMost, Name

__all__ = ["DeviceSetup", "MachineSetup", "config_from_setup", "config_to_setup"]


@attrs.frozen
class DeviceSetup:
    """``slot`` on the PCI bus; ``device`` is JSON of the device's ``description_type``."""

    slot: U8
    device: dict[str, Any]


@attrs.frozen
class MachineSetup:
    """``config`` is what :func:`config_from_setup` reads; ``ram`` (gpa, size) of each region."""

    config: dict[str, Any]
    hypervisor: Name
    ram: tuple[tuple[U64, U64], ...]
    devices: Annotated[dict[Name, DeviceSetup], AtMost(MAX_DEVICES)]


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
