"""A machine's description as it travels in SETUP: its configuration, and what must be equal on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import attrs

from trivmm.config import VmConfig
from trivmm.errors import ProtocolError, shown
from trivmm.state.machine import MAX_DEVICES
from trivmm.state.strict import refused, structure
from trivmm.values import U8, U64, AtMost, Name

__all__ = ["DeviceSetup", "MachineSetup", "config_from_setup", "config_to_setup"]


@attrs.frozen
class DeviceSetup:
    """``slot`` on the PCI bus; ``device`` is JSON of the device's ``description_type``."""

    slot: U8
    device: dict[str, Any]


@attrs.frozen
class MachineSetup:
    """``config`` is what :func:`config_from_setup` reads; ``ram`` (gpa, size) of each region; ``pvpanic`` its PCI slot,
    where there is one."""

    config: dict[str, Any]
    hypervisor: Name
    ram: tuple[tuple[U64, U64], ...]
    devices: Annotated[dict[Name, DeviceSetup], AtMost(MAX_DEVICES)]
    pvpanic: U8 | None


def config_to_setup(config: VmConfig, sections: Mapping[str, type[Any]]) -> dict[str, Any]:
    """JSON-able. Deadlines stay at home: each side has its own. ``sections`` are the classes of what ``virtio``
    holds, by name."""
    made = attrs.asdict(config)
    del made["deadlines"]
    made["disks"] = list(made["disks"])
    made["platform"]["oem_strings"] = list(made["platform"]["oem_strings"])
    made["virtio"] = {
        name: [attrs.asdict(each) for each in config.virtio if type(each) is cls] for name, cls in sections.items()
    }
    return made


def config_from_setup(value: object, sections: Mapping[str, type[Any]]) -> VmConfig:
    """:raises ProtocolError: when it isn't a configuration. :raises ConfigError: when it is one that can't be."""
    if not isinstance(value, dict):
        return structure("setup.config", value, VmConfig)
    if "deadlines" in value:
        raise ProtocolError('setup.config: unknown field "deadlines"')
    given = value.get("virtio", {})
    if not isinstance(given, dict) or not all(isinstance(each, list) for each in given.values()):
        raise refused("setup.config.virtio", given, "an object of arrays")
    if strangers := set(given) - set(sections):
        raise ProtocolError(f"setup.config.virtio: there is no {shown(min(strangers))} here")
    devices = [
        structure(f"setup.config.virtio.{name}[{index}]", each, cls)
        for name, cls in sections.items()
        for index, each in enumerate(given.get(name, ()))
    ]
    config = structure("setup.config", {key: item for key, item in value.items() if key != "virtio"}, VmConfig)
    return attrs.evolve(config, virtio=devices)
