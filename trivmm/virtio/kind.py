"""What a kind of virtio device is to everybody else: one record, in the device's own folder.

The board builds from it, the command line takes its option from it, the API its schema, the documents their tables.
``trivmm.virtio.kinds`` lists them; a new device is a folder with its C and its tests, and one line there.

Light: a record imports nothing of its device but where ``make`` is called, since control verbs read the tables too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar

import attrs

from trivmm.config import VmConfig
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.notyet import NotYet
from trivmm.syntax import Keys, as_text, parse_integer, parse_object, parse_toggle

if TYPE_CHECKING:
    from trivmm.memory.guest import GuestMemory
    from trivmm.platform.sinks import LineConfig, Sink
    from trivmm.virtio.device import WorkerDevice

__all__ = [
    "BUS_KEYS",
    "BUS_NOT_YET",
    "OTHER_CLASS",
    "AnyKind",
    "Contract",
    "DeviceConfig",
    "DeviceKind",
    "Hotplug",
    "Option",
    "Place",
]

OTHER_CLASS: Final = 0xFFFF00  # PCI: does not fit any other class

BUS_NOT_YET: Final[Mapping[str, object]] = {"pci_segment": 0, "iommu": NotYet(False, said=False)}
BUS_KEYS: Final[Keys] = {
    "id": ("id", as_text),
    "pci_segment": ("pci_segment", parse_integer),
    "addr": ("pci_device_id", parse_integer),
    "pci_device_id": ("pci_device_id", parse_integer),
    "iommu": ("iommu", parse_toggle),
}
"""What every device on the bus has, in the contract and as options: :data:`BUS_NOT_YET` of it does not exist here."""


class DeviceConfig(Protocol):
    """A frozen attrs class with at least these; its fields are the keys of its schema."""

    @property
    def id(self) -> str | None: ...

    @property
    def pci_device_id(self) -> int | None: ...


C = TypeVar("C", bound=DeviceConfig)


@attrs.frozen
class Contract:
    """Its place in the API's bodies: ``section`` of the VM's configuration holds one ``schema``, or ``many`` of them.
    ``not_yet`` are the contract's keys that do not exist here (``trivmm.notyet``). ``flag``: there it is a boolean,
    whether there is one, and has no schema."""

    schema: str
    section: str
    many: bool
    required: tuple[str, ...] = ()
    not_yet: Mapping[str, object] = BUS_NOT_YET
    flag: bool = False


@attrs.frozen
class Option:
    """``--name``; ``main`` is the key that a lone value was probably meant for. ``absent`` is the text that is assumed
    when the option is not given, None: there is no such device then. ``base`` are keys that need not be given.
    ``plain`` is what the option means without a value, None: it wants one.
    ``custom`` reads an option that is no list of ``keys``."""

    name: str
    metavar: str
    help: str
    keys: Keys
    main: str = ""
    absent: str | None = None
    plain: str | None = None
    base: Mapping[str, object] = attrs.field(factory=dict)
    custom: Callable[[str, str, Keys], dict[str, Any]] | None = None

    def parse(self, option: str, text: str) -> dict[str, Any]:
        """:raises ConfigError:"""
        if self.custom is not None:
            return self.custom(option, text, self.keys)
        return parse_object(option, text, self.keys, self.main)

    def spelled(self, key: str) -> str:
        """How the help spells a JSON key."""
        words = [word for word in self.metavar.replace("[", ",").split(",") if word.partition("=")[0] == key]
        return words[0] if words else f"{key}=…"


@attrs.frozen
class Hotplug:
    """One can be added to a VM that runs, by the API's ``vm.VERB``, and taken away. ``fails`` is what an error of that
    says first, in Cloud Hypervisor's words."""

    verb: str
    fails: str


@attrs.frozen
class Place:
    """What a device is made in. ``name`` is its id; ``incoming``: locks and sinks wait for a migration's COMMIT;
    ``deadlines`` are its VM's."""

    memory: GuestMemory
    name: str
    incoming: bool
    sink: Sink | None
    deadlines: Deadlines


def _nothing(configs: Sequence[Any]) -> None:
    return None


def _same(config: Any, device: WorkerDevice) -> Any:
    return config


def _always(config: Any) -> bool:
    return True


def _no_line(config: Any) -> LineConfig | None:
    return None


@attrs.frozen(eq=False)
class DeviceKind(Generic[C]):
    """One kind. ``name`` is the id of a device that was given none; with ``{}``, its number.

    ``present`` says whether a configuration stands for a device at all; ``check`` looks at all of a VM's before
    anything is opened; ``as_built`` is that of a device that was made, as it stays from now on, at reboots and at a
    destination; ``line`` is that of the device's console line; ``hotplug`` how it is added to a VM that runs, None: it
    is there from boot to the end. ``descriptors`` is its field for open descriptors, which the API takes along with a
    request and not by number; empty: it has none."""

    config: type[C]
    contract: Contract
    option: Option
    name: str
    make: Callable[[C, Place], WorkerDevice]
    pci_class: int = OTHER_CLASS
    bar_is_64bit: bool = True
    present: Callable[[C], bool] = _always
    check: Callable[[Sequence[C]], None] = _nothing
    as_built: Callable[[C, WorkerDevice], C] = _same
    line: Callable[[C], LineConfig | None] = _no_line
    hotplug: Hotplug | None = None
    descriptors: str = ""

    def of(self, config: VmConfig) -> tuple[C, ...]:
        """This kind's configurations in a VM's, in their order."""
        if self.contract.section in NAMED:
            found = getattr(config, self.contract.section)
            found = found if self.contract.many else (found,)
        else:
            found = tuple(each for each in config.virtio if type(each) is self.config)
        return tuple(each for each in found if self.present(each))

    def descriptors_of(self, config: VmConfig) -> set[int]:
        """That this kind's devices were given."""
        return (
            {fd for each in self.of(config) for fd in getattr(each, self.descriptors) or ()}
            if self.descriptors
            else set()
        )

    def put(self, config: VmConfig, mine: Sequence[C]) -> VmConfig:
        """``config`` with these instead of :meth:`of`'s, as many."""
        if self.contract.section not in NAMED:
            left, there = list(mine), {id(each) for each in self.of(config)}
            virtio = tuple(left.pop(0) if id(each) in there else each for each in config.virtio)
            return attrs.evolve(config, virtio=virtio)
        value: Any = tuple(mine) if self.contract.many else mine[0] if mine else getattr(config, self.contract.section)
        return attrs.evolve(config, **{self.contract.section: value})

    def grown(self, config: VmConfig, one: C) -> VmConfig:
        """``config`` with one more. :raises ConfigError: there can't be more."""
        mine = self.of(config)
        if mine and not self.contract.many:
            raise ConfigError(self.contract.section, one, "there is one already", "remove it first")
        if self.contract.section not in NAMED:
            return attrs.evolve(config, virtio=(*config.virtio, one))
        value: Any = (*mine, one) if self.contract.many else one
        return attrs.evolve(config, **{self.contract.section: value})

    def shrunk(self, config: VmConfig, index: int) -> VmConfig:
        """``config`` without one of :meth:`of`."""
        gone = self.of(config)[index]
        if self.contract.section not in NAMED:
            return attrs.evolve(config, virtio=tuple(each for each in config.virtio if each is not gone))
        left: Any = tuple(each for each in self.of(config) if each is not gone) if self.contract.many else None
        return attrs.evolve(config, **{self.contract.section: left})


AnyKind: TypeAlias = DeviceKind[Any]

NAMED: Final = frozenset(field.name for field in attrs.fields(VmConfig))
