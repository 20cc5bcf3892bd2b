"""Cloud Hypervisor's API contract as tables: which keys and routes it has, and which of them do not exist here yet.

A key that exists in the contract but not here is accepted while it holds its default (clients send them), and refused
by name otherwise. A test compares these tables with the contract's own OpenAPI file, so none is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["API_ROOT", "NOT_YET_KEYS", "NOT_YET_ROUTES", "REQUIRED_KEYS"]

API_ROOT: Final = "/api/v1/"

REQUIRED_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "VmConfig": ("payload",),
    "PayloadConfig": ("kernel",),  # the contract leaves it open; without firmware support a kernel is needed
    "CpusConfig": ("boot_vcpus", "max_vcpus"),
    "MemoryConfig": ("size",),
    "DiskConfig": ("path",),
    "RngConfig": ("src",),
    "SerialConfig": ("mode",),
    "ConsoleConfig": ("mode",),
    "SendMigrationData": ("destination_url",),
    "ReceiveMigrationData": ("receiver_url",),
}

_BUS: Final[dict[str, object]] = {"pci_segment": 0, "iommu": False}

NOT_YET_KEYS: Final[Mapping[str, Mapping[str, object]]] = {
    "VmConfig": {
        "rate_limit_groups": None,
        "net": None,
        "balloon": None,
        "fs": None,
        "generic_vhost_user": None,
        "pmem": None,
        "debug_console": {"mode": "Off"},
        "devices": None,
        "user_devices": None,
        "vdpa": None,
        "vsock": None,
        "numa": None,
        "iommu": False,
        "watchdog": False,
        "rtc": None,
        "pvpanic": False,
        "pci_segments": None,
        "platform": {
            "num_pci_segments": 1,
            "tdx": False,
            "sev_snp": False,
            "iommufd": False,
            "vfio_p2p_dma": True,
        },
        "tpm": None,
        "landlock_enable": False,
        "landlock_rules": None,
    },
    "PayloadConfig": {"firmware": None, "igvm": None, "host_data": None},
    "CpusConfig": {
        "topology": None,
        "kvm_hyperv": False,
        "max_phys_bits": 46,
        "nested": True,
        "affinity": None,
        "features": {"amx": False},
        "core_scheduling": "Vm",
    },
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
    "DiskConfig": {
        **_BUS,
        "direct": False,
        "vhost_user": False,
        "vhost_socket": None,
        "rate_limiter_config": None,
        "rate_limit_group": None,
        "queue_affinity": None,
        "backing_files": False,
        "sparse": True,
        "image_type": "Raw",
        "lock_granularity": "ByteRange",
    },
    "RngConfig": _BUS,
    "ConsoleConfig": _BUS,
    "SendMigrationData": {"local": False, "connections": 1, "tls_dir": None, "memory_mode": "Precopy"},
    "ReceiveMigrationData": {"tls_dir": None, "memory_mode": "Precopy", "zone_updates": None},
}
"""By the contract's schema: keys that do not exist here yet, with the default that is accepted (null always is)."""

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
        "vm.nmi",
        "vm.power-button",
        "vm.reboot",
        "vm.remove-device",
        "vm.resize",
        "vm.resize-disk",
        "vm.resize-zone",
        "vm.restore",
        "vm.snapshot",
    }
)
"""All are PUT."""
