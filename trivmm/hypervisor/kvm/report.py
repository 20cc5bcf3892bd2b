"""What this host's KVM has and lacks, in words a user can act on: for ``trivmm doctor`` and for opening KVM."""

from __future__ import annotations

import errno
import os
from typing import Final

from trivmm._native import lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.kvm.calls import kvm_call

__all__ = ["HostRow", "check_host", "extension", "host_report", "open_device"]

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12  # the only stable one (Linux 2.6.22 and later)

HostRow = tuple[str, bool, str, str]
"""(capability, present, why it is needed, remedy or empty)."""

NEEDED: Final[tuple[tuple[str, str], ...]] = (
    ("KVM_CAP_USER_MEMORY", "guest RAM"),
    ("KVM_CAP_IRQCHIP", "in-kernel interrupt controllers"),
    ("KVM_CAP_PIT2", "in-kernel timer"),
    ("KVM_CAP_SET_TSS_ADDR", "real mode on Intel CPUs"),
    ("KVM_CAP_IRQ_ROUTING", "MSI-X interrupts"),
    ("KVM_CAP_IRQFD", "interrupts straight from device workers"),
    ("KVM_CAP_IOEVENTFD", "doorbells that don't leave the kernel"),
    ("KVM_CAP_IMMEDIATE_EXIT", "kicks that are never lost"),
    ("KVM_CAP_EXT_CPUID", "the guest's CPUID"),
    ("KVM_CAP_MP_STATE", "saving a vCPU"),
    ("KVM_CAP_VCPU_EVENTS", "saving a vCPU"),
    ("KVM_CAP_DEBUGREGS", "saving a vCPU"),
    ("KVM_CAP_XSAVE", "saving a vCPU"),
    ("KVM_CAP_XCRS", "saving a vCPU"),
    ("KVM_CAP_ADJUST_CLOCK", "saving the guest's clock"),
)
WELCOME: Final[tuple[tuple[str, str], ...]] = (
    ("KVM_CAP_IOEVENTFD_ANY_LENGTH", "one doorbell for writes of any width; else four"),
    ("KVM_CAP_TSC_CONTROL", "moving to a host whose TSC runs at another rate"),
    ("KVM_CAP_KVMCLOCK_CTRL", "telling a Linux guest that it was stopped"),
)


def extension(fd: int, name: str) -> int:
    """KVM_CHECK_EXTENSION by the capability's name: 0 when absent. ``fd``: /dev/kvm, or a VM."""
    return max(0, kvm_call(fd, "KVM_CHECK_EXTENSION", int(getattr(lib, name))))


def open_device(path: str = DEVICE) -> int:
    """:raises HypervisorError: that says what to do."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        remedy = {
            errno.ENOENT: "load the module (modprobe kvm_intel or kvm_amd) and enable virtualization in the firmware, "
            "or use --hypervisor soft",
            errno.ENODEV: "load the module (modprobe kvm_intel or kvm_amd), or use --hypervisor soft",
            errno.EACCES: "join its group (usermod -aG kvm $USER, then log in again), or use --hypervisor soft",
            errno.EPERM: "allow the device in the container (--device /dev/kvm), or use --hypervisor soft",
            errno.EBUSY: "stop the other hypervisor that owns the CPU's virtualization",
        }.get(error.errno or 0, "use --hypervisor soft")
        raise HypervisorError(f"open {path}", error.strerror or str(error), remedy, error.errno) from error


def check_host(fd: int) -> None:
    """:raises HypervisorError: naming every needed capability that is missing."""
    version = kvm_call(fd, "KVM_GET_API_VERSION")
    if version != API_VERSION:
        raise HypervisorError("KVM_GET_API_VERSION", f"{version}, wanted {API_VERSION}", "use another kernel")
    missing = [f"{name} ({why})" for name, why in NEEDED if not extension(fd, name)]
    if missing:
        raise HypervisorError(
            "KVM_CHECK_EXTENSION", f"missing {', '.join(missing)}", "use a newer kernel, or --hypervisor soft"
        )


def host_report() -> list[HostRow]:
    """One row for /dev/kvm and one for each capability that is needed or welcome. Never raises."""
    try:
        fd = open_device()
    except HypervisorError as error:
        return [(DEVICE, False, "running guests at full speed", str(error))]
    try:
        rows: list[HostRow] = [(DEVICE, True, "running guests at full speed", "")]
        version = kvm_call(fd, "KVM_GET_API_VERSION")
        right = version == API_VERSION
        rows.append(("KVM API 12", right, "all of it", "" if right else f"use another kernel: this one says {version}"))
        for table, remedy in ((NEEDED, "use a newer kernel"), (WELCOME, "optional")):
            for name, why in table:
                present = extension(fd, name) > 0
                rows.append((name, present, why, "" if present else remedy))
        return rows
    except HypervisorError as error:
        return [(DEVICE, False, "running guests at full speed", str(error))]
    finally:
        os.close(fd)
