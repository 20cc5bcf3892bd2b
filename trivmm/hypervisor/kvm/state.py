"""The saved form of a KVM vCPU, and the order in which it is taken and set. Pure order and sizes; no lifetime.

Set in the order MP_STATE, REGS, SREGS, XCRS, XSAVE, LAPIC, MSRS, EVENTS, DEBUGREGS, after the VM's IRQCHIP, PIT2 and
CLOCK. MP_STATE is read first, since reading it makes KVM digest a pending INIT or SIPI. The TSC is set to what it
would be had the guest run meanwhile; TSC_DEADLINE comes last of the MSRs, since it is compared with the TSC.
"""

from __future__ import annotations

import errno
import logging
import struct
import time
from typing import Final

from trivmm._native import ffi
from trivmm.errors import HypervisorError
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.report import extension

__all__ = ["KIND", "check_parts", "load_vcpu", "msr_indices", "save_vcpu", "set_msrs"]

logger = logging.getLogger(__name__)

KIND: Final = "kvm/1"
MSR_TSC: Final = 0x10
MSR_TSC_DEADLINE: Final = 0x6E0
MSR_ENTRY: Final = struct.Struct("<IIQ")  # struct kvm_msr_entry: index, reserved, data
MAX_MSRS: Final = 1024  # KVM lists about 150 today; a stream with more is not one of ours
MSR_BATCH: Final = 128  # the kernel takes at most 256 at once
TIME: Final = struct.Struct("<QQ")  # TSC rate in kHz (0 unknown), CLOCK_REALTIME in ns when the TSC was read
U64: Final = (1 << 64) - 1

FIXED: Final[tuple[tuple[str, str, str], ...]] = (
    # part, its name in the ioctls, its struct; in the order of loading
    ("mp_state", "MP_STATE", "struct kvm_mp_state"),
    ("regs", "REGS", "struct kvm_regs"),
    ("sregs", "SREGS", "struct kvm_sregs"),
    ("xcrs", "XCRS", "struct kvm_xcrs"),
    ("xsave", "XSAVE", "struct kvm_xsave"),
    ("lapic", "LAPIC", "struct kvm_lapic_state"),
    ("msrs", "MSRS", ""),
    ("events", "VCPU_EVENTS", "struct kvm_vcpu_events"),
    ("debugregs", "DEBUGREGS", "struct kvm_debugregs"),
)


def check_parts(whose: str, kind: str, blobs: dict[str, bytes], sizes: dict[str, int]) -> None:
    """:raises HypervisorError: unless ``blobs`` has exactly these parts with these sizes. Nothing is applied before."""
    if kind != KIND:
        raise HypervisorError("load", f"{whose} state of kind {kind!r}; this side is {KIND!r}", "use the same back end")
    for name in sizes.keys() | blobs.keys():
        want, got = sizes.get(name), blobs.get(name)
        if want is None or got is None or len(got) != want:
            have = "missing" if got is None else f"{len(got)} bytes"
            raise HypervisorError("load", f"{whose} state: part {name!r} is {have}, wanted {want if want else 'none'}")


def msr_indices(kvm_fd: int) -> tuple[int, ...]:
    """What KVM_GET_MSR_INDEX_LIST names, the TSC included."""
    count = 0
    for _ in range(2):  # the first call only tells the number, by E2BIG
        table = bytearray(4 + 4 * count)
        struct.pack_into("<I", table, 0, count)
        kvm_call(kvm_fd, "KVM_GET_MSR_INDEX_LIST", table, allow=(errno.E2BIG,))
        (found,) = struct.unpack_from("<I", table)
        if found <= count:
            break
        count = found
    indices = struct.unpack_from(f"<{min(found, count)}I", table, 4)
    return tuple(dict.fromkeys((MSR_TSC, *indices)))


def _get_msrs(fd: int, indices: tuple[int, ...]) -> list[tuple[int, int]]:
    """(index, value) of every MSR that can be read; KVM stops at the first that can't, which is left out."""
    found: list[tuple[int, int]] = []
    rest = list(indices)
    while rest:
        batch = rest[:MSR_BATCH]
        table = bytearray(struct.pack("<II", len(batch), 0) + b"".join(MSR_ENTRY.pack(msr, 0, 0) for msr in batch))
        done = kvm_call(fd, "KVM_GET_MSRS", table)
        for number in range(done):
            index, _, value = MSR_ENTRY.unpack_from(table, 8 + number * MSR_ENTRY.size)
            found.append((index, value))
        rest = rest[done + (done < len(batch)) :]
    return found


def set_msrs(fd: int, values: list[tuple[int, int]]) -> None:
    """:raises HypervisorError: naming the first MSR that is refused, unless it holds that value already."""
    rest = values
    while rest:
        batch = rest[:MSR_BATCH]
        table = struct.pack("<II", len(batch), 0) + b"".join(MSR_ENTRY.pack(msr, 0, value) for msr, value in batch)
        done = kvm_call(fd, "KVM_SET_MSRS", table)
        if done < len(batch):
            msr, value = batch[done]
            if (msr, value) not in _get_msrs(fd, (msr,)):
                raise HypervisorError(
                    "KVM_SET_MSRS",
                    f"MSR {msr:#x} = {value:#x} is refused",
                    "move between hosts with like CPUs and kernels",
                )
            done += 1
        rest = rest[done:]


def _xsave_size(vm_fd: int) -> int:
    return max(extension(vm_fd, "KVM_CAP_XSAVE2"), int(ffi.sizeof("struct kvm_xsave")))


def save_vcpu(fd: int, kvm_fd: int, vm_fd: int) -> dict[str, bytes]:
    """All parts of a parked vCPU."""
    blobs: dict[str, bytes] = {}
    for name, call, struct_name in FIXED:
        if name == "msrs":
            khz = kvm_call(fd, "KVM_GET_TSC_KHZ", allow=(errno.EIO, errno.EINVAL))
            blobs["time"] = TIME.pack(max(khz, 0), time.time_ns())
            blobs[name] = b"".join(MSR_ENTRY.pack(msr, 0, value) for msr, value in _get_msrs(fd, msr_indices(kvm_fd)))
            continue
        size, suffix = ffi.sizeof(struct_name), ""
        if name == "xsave" and extension(vm_fd, "KVM_CAP_XSAVE2"):
            size, suffix = _xsave_size(vm_fd), "2"
        buffer = bytearray(size)
        kvm_call(fd, f"KVM_GET_{call}{suffix}", buffer)
        blobs[name] = bytes(buffer)
    nested = _nested(fd, vm_fd)
    if nested:
        blobs["nested"] = nested
    return blobs


def _nested(fd: int, vm_fd: int) -> bytes:
    """Empty where nested virtualization is off (EINVAL although the capability is there) or unused."""
    size = extension(vm_fd, "KVM_CAP_NESTED_STATE")
    if not size:
        return b""
    buffer = bytearray(size)
    struct.pack_into("<I", buffer, 4, size)  # struct kvm_nested_state: flags, format, size, …
    if kvm_call(fd, "KVM_GET_NESTED_STATE", buffer, allow=(errno.EINVAL,)) < 0:
        return b""
    used = int.from_bytes(buffer[4:8], "little")
    return bytes(buffer[: min(used, size)])


def load_vcpu(fd: int, kvm_fd: int, vm_fd: int, kind: str, blobs: dict[str, bytes]) -> None:
    """Check every part, then set them in order. May be called again.

    :raises HypervisorError: naming the part or MSR that this host cannot take."""
    parts = dict(blobs)
    nested = parts.pop("nested", b"")
    room = extension(vm_fd, "KVM_CAP_NESTED_STATE")
    if nested and not 8 <= len(nested) <= room:
        raise HypervisorError("load", f"vCPU state: nested part of {len(nested)} bytes, this host takes {room}")
    if nested and int.from_bytes(nested[4:8], "little") != len(nested):
        raise HypervisorError("load", "vCPU state: the nested part lies about its own size")
    xsave_size = _xsave_size(vm_fd)
    if ffi.sizeof("struct kvm_xsave") <= len(parts.get("xsave", b"")) < xsave_size:
        parts["xsave"] = parts["xsave"].ljust(xsave_size, b"\0")  # from a CPU with fewer features
    sizes = {name: ffi.sizeof(struct_name) for name, _, struct_name in FIXED if struct_name}
    raw_msrs = parts.get("msrs", b"")
    if len(raw_msrs) % MSR_ENTRY.size or len(raw_msrs) > MAX_MSRS * MSR_ENTRY.size:
        raise HypervisorError("load", f"vCPU state: {len(raw_msrs)} bytes are no list of MSRs")
    sizes |= {"xsave": xsave_size, "msrs": len(raw_msrs), "time": TIME.size}
    check_parts("vCPU", kind, parts, sizes)
    values = [(index, value) for index, _, value in MSR_ENTRY.iter_unpack(raw_msrs)]
    strangers = {index for index, _ in values} - set(msr_indices(kvm_fd))
    if strangers:
        names = ", ".join(f"{index:#x}" for index in sorted(strangers))
        raise HypervisorError("KVM_SET_MSRS", f"this host has no MSR {names}", "move between hosts with like kernels")

    khz, stamp = TIME.unpack(parts["time"])
    if khz and extension(vm_fd, "KVM_CAP_TSC_CONTROL"):
        kvm_call(fd, "KVM_SET_TSC_KHZ", khz)
    else:
        here = kvm_call(fd, "KVM_GET_TSC_KHZ", allow=(errno.EIO, errno.EINVAL))
        if khz and here > 0 and abs(here - khz) > khz // 1000:
            logger.warning("TSC runs at %d kHz here, %d kHz at the source: the guest's clock may drift", here, khz)
    for name, call, _ in FIXED:
        if name == "msrs":
            set_msrs(fd, _timed(values, khz, stamp))
            kvm_call(fd, "KVM_KVMCLOCK_CTRL", allow=(errno.EINVAL, errno.ENOTTY))  # EINVAL: no kvmclock in use
        else:
            kvm_call(fd, f"KVM_SET_{call}", parts[name])
            if name == "sregs" and nested:
                kvm_call(fd, "KVM_SET_NESTED_STATE", nested)


def _timed(values: list[tuple[int, int]], khz: int, stamp: int) -> list[tuple[int, int]]:
    passed = max(0, time.time_ns() - stamp) * khz // 1_000_000
    ahead = [(MSR_TSC, (value + passed) & U64) for index, value in values if index == MSR_TSC]
    last = [pair for pair in values if pair[0] == MSR_TSC_DEADLINE]
    return ahead + [pair for pair in values if pair[0] not in (MSR_TSC, MSR_TSC_DEADLINE)] + last
