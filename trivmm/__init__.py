"""TriVMM: a virtual machine monitor for Linux/KVM on trio.

The embedding API is re-exported here and loaded on first use (PEP 562), so that light verbs such as
``trivmm remote`` never import trio::

    import trivmm

    async with trivmm.open_vm(trivmm.VmConfig(trivmm.PayloadConfig("vmlinux"))) as vm:
        await vm.boot()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivmm.config import (
        ConsoleConfig,
        CpusConfig,
        DiskConfig,
        MemoryConfig,
        PayloadConfig,
        PlatformConfig,
        RngConfig,
        SerialConfig,
        VmConfig,
    )
    from trivmm.console import ConsoleMatch
    from trivmm.deadlines import Deadlines
    from trivmm.errors import (
        CommitRefused,
        ConfigError,
        DeadlineError,
        GuestCrash,
        HypervisorError,
        MigrationCancelled,
        MigrationError,
        MigrationInDoubt,
        NoSuchDevice,
        NotSupported,
        PauseTimeout,
        RunsElsewhere,
        TrivmmError,
        VmMigrating,
        WrongState,
    )
    from trivmm.events import Event, EventBus, Subscription
    from trivmm.hypervisor.select import choose_hypervisor
    from trivmm.incoming import Incoming, open_incoming
    from trivmm.migration.destination.verdicts import Verdicts
    from trivmm.migration.progress import MigrationProgress, MigrationReport
    from trivmm.virtio.balloon.config import BalloonConfig
    from trivmm.virtio.net.config import NetConfig
    from trivmm.virtio.pmem.config import PmemConfig
    from trivmm.virtio.vsock.config import VsockConfig
    from trivmm.virtio.watchdog.config import WatchdogConfig
    from trivmm.vm import ExitReason, PciDeviceInfo, Vm, VmState, open_vm

__version__ = "0.1.0"

_HOME = {
    "trivmm.config": (
        "ConsoleConfig CpusConfig DiskConfig MemoryConfig PayloadConfig PlatformConfig RngConfig SerialConfig VmConfig"
    ),
    "trivmm.console": "ConsoleMatch",
    "trivmm.deadlines": "Deadlines",
    "trivmm.errors": (
        "CommitRefused ConfigError DeadlineError GuestCrash HypervisorError MigrationCancelled MigrationError "
        "MigrationInDoubt NoSuchDevice NotSupported PauseTimeout RunsElsewhere TrivmmError VmMigrating WrongState"
    ),
    "trivmm.events": "Event EventBus Subscription",
    "trivmm.hypervisor.select": "choose_hypervisor",
    "trivmm.incoming": "Incoming open_incoming",
    "trivmm.migration.destination.verdicts": "Verdicts",
    "trivmm.migration.progress": "MigrationProgress MigrationReport",
    "trivmm.vm": "ExitReason PciDeviceInfo Vm VmState open_vm",
    "trivmm.virtio.balloon.config": "BalloonConfig",
    "trivmm.virtio.net.config": "NetConfig",
    "trivmm.virtio.pmem.config": "PmemConfig",
    "trivmm.virtio.vsock.config": "VsockConfig",
    "trivmm.virtio.watchdog.config": "WatchdogConfig",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "BalloonConfig",
    "CommitRefused",
    "ConfigError",
    "ConsoleConfig",
    "ConsoleMatch",
    "CpusConfig",
    "DeadlineError",
    "Deadlines",
    "DiskConfig",
    "Event",
    "EventBus",
    "ExitReason",
    "GuestCrash",
    "HypervisorError",
    "Incoming",
    "MemoryConfig",
    "MigrationCancelled",
    "MigrationError",
    "MigrationInDoubt",
    "MigrationProgress",
    "MigrationReport",
    "NetConfig",
    "NoSuchDevice",
    "NotSupported",
    "PauseTimeout",
    "PayloadConfig",
    "PciDeviceInfo",
    "PlatformConfig",
    "PmemConfig",
    "RngConfig",
    "RunsElsewhere",
    "SerialConfig",
    "Subscription",
    "TrivmmError",
    "Verdicts",
    "Vm",
    "VmConfig",
    "VmMigrating",
    "VmState",
    "VsockConfig",
    "WatchdogConfig",
    "WrongState",
    "__version__",
    "choose_hypervisor",
    "open_incoming",
    "open_vm",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'trivmm' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
