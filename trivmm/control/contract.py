"""Cloud Hypervisor's API contract as tables: which keys and routes it has, and which of them do not exist here yet.

A key that exists in the contract but not here is accepted while it holds its default (clients send them), and refused
by name otherwise. A key that stands in no table is nobody's: it is counted and ignored, as there. Tests compare these
tables with the contract's own OpenAPI file, with the keys of Cloud Hypervisor 54's structs, which has more, and with
recordings of both its sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trivmm.notyet import NotYet, NotYetObject
from trivmm.virtio.kinds import KINDS, hotplug_verbs

__all__ = [
    "API_ROOT",
    "CONTRACT_VERSION",
    "NOT_YET_KEYS",
    "NOT_YET_ROUTES",
    "REQUIRED_KEYS",
    "markdown_not_yet",
]

API_ROOT: Final = "/api/v1/"
CONTRACT_VERSION: Final = "54.0.0"  # of Cloud Hypervisor, whose API this is

REQUIRED_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "CpusConfig": ("boot_vcpus", "max_vcpus"),
    "MemoryConfig": ("size",),
    "SerialConfig": ("mode",),
    **{kind.contract.schema: kind.contract.required for kind in KINDS if not kind.contract.flag},
    "TokenBucket": ("size", "refill_time"),
    "SendMigrationData": ("destination_url",),
    "ReceiveMigrationData": ("receiver_url",),
    "VmRemoveDevice": ("id",),
    "VmResizeDisk": ("id", "desired_size"),
}


NOT_YET_KEYS: Final[Mapping[str, Mapping[str, object]]] = {
    "VmConfig": {
        "rate_limit_groups": None,
        "fs": None,
        "generic_vhost_user": None,
        "debug_console": NotYetObject("DebugConsoleConfig"),
        "devices": None,
        "user_devices": None,
        "vdpa": None,
        "pvmemcontrol": None,
        "numa": None,
        "iommu": False,
        "rtc": None,
        "gdb": NotYet(False, said=False),  # only in builds for debugging
        "pci_segments": None,
        "tpm": None,
        "preserved_fds": None,
        "landlock_enable": False,
        "landlock_rules": None,
        "ivshmem": None,
    },
    "PayloadConfig": {"igvm": None, "host_data": None, "fw_cfg_config": None},
    "CpusConfig": {
        "topology": None,
        "kvm_hyperv": False,
        "max_phys_bits": 46,
        "nested": True,
        "affinity": None,
        "features": NotYetObject("CpuFeatures"),
        "core_scheduling": "Vm",
        "profile": "Host",
    },
    "CpuFeatures": {"amx": False},
    "MemoryConfig": {
        "hotplug_size": None,
        "hotplugged_size": None,
        "mergeable": False,
        "hotplug_method": "Acpi",
        "hugepages": False,
        "hugepage_size": None,
        "prefault": False,
        "reserve": False,
        "thp": True,
        "zones": None,
    },
    **{kind.contract.schema: kind.contract.not_yet for kind in KINDS if not kind.contract.flag},
    "DebugConsoleConfig": {"mode": "Off", "file": None, "iobase": 233},
    "PlatformConfig": {
        "num_pci_segments": 1,
        "iommu_segments": None,
        "iommu_address_width_bits": 64,
        "tdx": False,
        "sev_snp": False,
        "iommufd": False,
        "iommufd_fd": None,
        "vfio_p2p_dma": True,
    },
    "SendMigrationData": {
        "local": False,
        "preserve_source": False,
        "connections": 1,
        "tls_dir": None,
        "memory_mode": "Precopy",
    },
    "ReceiveMigrationData": {
        "tls_dir": None,
        "memory_mode": "Precopy",
        "vfio_fds": None,
        "iommufd_fd": None,
        "net_fds": None,
        "zone_updates": None,
    },
}
"""By the contract's schema: keys that do not exist here yet, with what is accepted: a default, or more (``NotYet``,
``NotYetObject``). Null and an empty list always are."""

NOT_YET_ROUTES: Final = frozenset(
    {
        "vm.add-device",
        "vm.add-disk",
        "vm.add-fs",
        "vm.add-generic-vhost-user",
        "vm.add-net",
        "vm.add-pmem",
        "vm.add-user-device",
        "vm.add-vdpa",
        "vm.add-vsock",
        "vm.coredump",
        "vm.resize-zone",
        "vm.restore",
        "vm.snapshot",
    }
) - {f"vm.{verb}" for verb in hotplug_verbs()}
"""All are PUT. What adds a device is there for the kinds that say so."""


def markdown_not_yet() -> str:
    """What does not work yet, by name, as the README lists it."""
    verbs = ", ".join(f"`{name}`" for name in sorted(NOT_YET_ROUTES))
    rows = ["| where | keys |", "| --- | --- |"]
    for schema, keys in NOT_YET_KEYS.items():
        hints = [name for name, default in keys.items() if isinstance(default, NotYet) and True in default.also]
        rows.append(f"| {schema} | " + ", ".join(f"`{name}`" for name in keys if name not in hints) + " |")
    return f"Verbs: {verbs}.\n\nKeys, refused by name unless they ask for nothing:\n\n" + "\n".join(rows)
