"""All kinds of virtio devices, in the order in which a board plugs them: Cloud Hypervisor's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from trivmm.config import VmConfig
from trivmm.errors import ConfigError
from trivmm.virtio.balloon.kind import BALLOON
from trivmm.virtio.block.kind import BLOCK
from trivmm.virtio.console.kind import CONSOLE
from trivmm.virtio.kind import AnyKind
from trivmm.virtio.net.kind import NET
from trivmm.virtio.pmem.kind import PMEM
from trivmm.virtio.rng.kind import RNG
from trivmm.virtio.vsock.kind import VSOCK
from trivmm.virtio.watchdog.kind import WATCHDOG

__all__ = ["KINDS", "find", "hotplug_verbs", "kind_of", "names_of", "sections", "without"]

KINDS: Final[list[AnyKind]] = [
    CONSOLE,
    BLOCK,
    NET,
    RNG,
    PMEM,
    VSOCK,
    BALLOON,
    WATCHDOG,
]


def names_of(config: VmConfig) -> dict[AnyKind, list[str]]:
    """The id of every device, by kind. One without an id is numbered in its order, past numbers that another device
    was given as its id.

    :raises ConfigError: for a device of no kind, or of one that has a field of its own."""
    beyond = list(sections().values())
    for index, each in enumerate(config.virtio):
        if type(each) not in beyond:
            raise _misplaced(index, each, beyond)
    for kind in KINDS:
        if not kind.contract.many and len(kind.of(config)) > 1:
            raise ConfigError(kind.contract.section, len(kind.of(config)), "a VM has one at most", "give one")
    given = {each.id for kind in KINDS for each in kind.of(config)}
    names: dict[AnyKind, list[str]] = {}
    for kind in KINDS:
        free = (name for number in range(1 << 16) if (name := kind.name.format(number)) not in given)
        names[kind] = [each.id or (next(free) if "{}" in kind.name else kind.name) for each in kind.of(config)]
    return names


def find(config: VmConfig, name: str) -> tuple[AnyKind, int] | None:
    """The kind of the device of that id, and which of its kind it is."""
    for kind, names in names_of(config).items():
        if name in names:
            return kind, names.index(name)
    return None


def without(config: VmConfig, name: str) -> VmConfig:
    """``config`` without that device, if it has it."""
    found = find(config, name)
    return config if found is None else found[0].shrunk(config, found[1])


def kind_of(device: Any) -> AnyKind:
    """:raises ConfigError: it is no device's configuration."""
    for kind in KINDS:
        if type(device) is kind.config:
            return kind
    known = ", ".join(kind.config.__name__ for kind in KINDS)
    raise ConfigError("device", device, "no kind of device", f"give one of {known}")


def hotplug_verbs() -> dict[str, AnyKind]:
    """What adds one to a VM, by its name without ``vm.``."""
    return {kind.hotplug.verb: kind for kind in KINDS if kind.hotplug is not None}


def _misplaced(index: int, device: Any, beyond: Sequence[type[Any]]) -> ConfigError:
    known = ", ".join(each.__name__ for each in beyond)
    problem, remedy = "no kind of device", f"give one of {known}" if known else "leave it out"
    for kind in KINDS:
        if type(device) is kind.config:
            problem, remedy = f"{kind.config.__name__} has a place of its own", f"give it in {kind.contract.section}"
    return ConfigError(f"virtio[{index}]", device, problem, remedy)


def sections() -> dict[str, type[Any]]:
    """The classes of what a VM's configuration holds in ``virtio``, by the contract's section."""
    named = set(VmConfig.__annotations__)
    return {kind.contract.section: kind.config for kind in KINDS if kind.contract.section not in named}
