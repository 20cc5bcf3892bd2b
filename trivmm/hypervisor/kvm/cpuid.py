"""The guest's CPUID: what KVM supports on this host, with each vCPU's own APIC id and topology. Pure tables."""

from __future__ import annotations

import struct
from typing import Final

import attrs

__all__ = ["ENTRY", "for_vcpu", "pack", "unpack"]

ENTRY: Final = struct.Struct("<IIIIIII12x")  # struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx
INDEXED: Final = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
HYPERVISOR: Final = 1 << 31
TSC_DEADLINE: Final = 1 << 24
SMT, CORE = 1, 2  # level types of leaf 0xB


@attrs.frozen
class Cpuid:
    """One CPUID leaf as given to the guest."""

    function: int
    index: int
    eax: int
    ebx: int
    ecx: int
    edx: int


Row = tuple[Cpuid, int]
"""A leaf and its KVM flags."""


def unpack(table: bytes, count: int) -> list[Row]:
    rows = []
    for number in range(count):
        function, index, flags, eax, ebx, ecx, edx = ENTRY.unpack_from(table, number * ENTRY.size)
        rows.append((Cpuid(function, index, eax, ebx, ecx, edx), flags))
    return rows


def pack(rows: list[Row]) -> bytes:
    """struct kvm_cpuid2."""
    entries = [ENTRY.pack(r.function, r.index, flags, r.eax, r.ebx, r.ecx, r.edx) for r, flags in rows]
    return struct.pack("<II", len(entries), 0) + b"".join(entries)


def for_vcpu(supported: list[Row], apic_id: int, vcpus: int, tsc_deadline: bool) -> list[Row]:
    """One package of ``vcpus`` cores with one thread each. Leaves: Intel SDM vol. 2, CPUID."""
    bits = max(vcpus - 1, 0).bit_length()
    rows: list[Row] = []
    topology = {row.function for row, _ in supported} & {0xB, 0x1F}
    for row, flags in supported:
        eax, ebx, ecx, edx = row.eax, row.ebx, row.ecx, row.edx
        match row.function:
            case 0x1:
                ebx = (ebx & 0xFFFF) | min(vcpus, 255) << 16 | (apic_id & 0xFF) << 24
                ecx |= HYPERVISOR | (TSC_DEADLINE if tsc_deadline else 0)
                edx = edx | 1 << 28 if vcpus > 1 else edx & ~(1 << 28)  # HTT: ebx 23:16 counts
            case 0x4 if eax & 0x1F:
                level = eax >> 5 & 7
                sharing = (1 << bits) - 1 if level >= 3 else 0
                eax = (eax & 0x3FFF) | (sharing & 0xFFF) << 14 | min((1 << bits) - 1, 63) << 26
            case 0xB | 0x1F:
                continue  # replaced below
            case 0x8000_0008:
                ecx = (ecx & ~0xF0FF) | min(vcpus - 1, 255) | bits << 12
            case 0x8000_001D if eax & 0x1F:
                level = eax >> 5 & 7
                eax = (eax & 0x3FFF) | ((vcpus - 1 if level >= 3 else 0) & 0xFFF) << 14
            case 0x8000_001E:
                eax, ebx, ecx = apic_id, (ebx & ~0xFFFF) | (apic_id & 0xFF), 0
            case _:
                pass
        rows.append((Cpuid(row.function, row.index, eax, ebx, ecx, edx), flags))
    for function in sorted(topology):
        rows.append((Cpuid(function, 0, 0, 1, SMT << 8, apic_id), INDEXED))
        rows.append((Cpuid(function, 1, bits, vcpus, CORE << 8 | 1, apic_id), INDEXED))
        rows.append((Cpuid(function, 2, 0, 0, 2, apic_id), INDEXED))
    return rows
