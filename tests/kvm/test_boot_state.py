"""docs/boot-state.md says what a vCPU boots with: here are real ones, before their first instruction."""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from trivmm.hypervisor.base import LongModeEntry, PvhEntry
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory

PAGE = Path(__file__).parents[2] / "docs" / "boot-state.md"
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")
BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]
ENTRY = 0x20_0000
ENTRIES = {
    "PVH": PvhEntry(ENTRY, layout.PVH_START_INFO),
    "64-bit": LongModeEntry(ENTRY, layout.ZERO_PAGE, layout.PAGE_TABLES, layout.BOOT_GDT),
}
GENERAL_KVM = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"]
GENERAL_SOFT = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"]
SEGMENTS_SOFT = ["es", "cs", "ss", "ds", "fs", "gs"]
SEGMENTS = ["cs", "ds", "es", "fs", "gs", "ss"]
MSRS = {"misc enable": 0x1A0, "PAT": 0x277, "STAR": 0xC000_0081, "KERNEL_GS_BASE": 0xC000_0102}
LINTS = {"LINT0": 0x350, "LINT1": 0x360}


@contextmanager
def booted(back_end: str, entry: PvhEntry | LongModeEntry) -> Iterator[list[Any]]:
    """Two vCPUs, the first of them about to start."""
    with ExitStack() as stack:
        hypervisor = choose_hypervisor(back_end)
        stack.callback(hypervisor.close)
        memory = GuestMemory(((0, 4 << 20),))
        stack.callback(memory.close)
        vm = hypervisor.open_vm()
        stack.callback(vm.close)
        for region in memory.regions:
            vm.add_memory(region.slot, region.gpa, region.size, region.hva)
        cpus: list[Any] = [vm.create_vcpu(index) for index in range(2)]
        cpus[0].set_boot_state(entry)
        yield cpus


def of_kvm(cpus: list[Any]) -> dict[str, list[int]]:
    """By the table's names, as KVM gives them back: Linux' struct kvm_regs, kvm_sregs, kvm_xsave, kvm_lapic_state."""
    blobs = cpus[0].save().blobs
    regs = struct.unpack_from("<18Q", blobs["regs"])
    found = {name: [value] for name, value in zip(GENERAL_KVM, regs[:8], strict=True)}
    found |= {"rip": [regs[16]], "rflags": [regs[17]], "r8 to r15": sorted(set(regs[8:16]))}
    sregs = blobs["sregs"]
    for number, name in enumerate([*SEGMENTS, "tr"]):
        base, limit, selector = struct.unpack_from("<QIH", sregs, number * 24)
        found[name] = [selector, base, limit]
    for number, name in enumerate(["gdt", "idt"]):
        found[name] = list(struct.unpack_from("<QH", sregs, 192 + number * 16))
    cr0, _, cr3, cr4, _, efer = struct.unpack_from("<6Q", sregs, 224)
    found |= {"cr0": [cr0], "cr3": [cr3], "cr4": [cr4], "efer": [efer]}
    found |= {
        "FCW": list(struct.unpack_from("<H", blobs["xsave"])),
        "MXCSR": list(struct.unpack_from("<I", blobs["xsave"], 24)),
    }
    values = {msr: value for msr, _, value in struct.iter_unpack("<IIQ", blobs["msrs"])}
    found |= {name: [values[msr]] for name, msr in MSRS.items()}
    lapics = [cpu.save().blobs["lapic"] for cpu in cpus]
    return found | {name: [struct.unpack_from("<I", lapic, at)[0] for lapic in lapics] for name, at in LINTS.items()}


def of_soft(cpus: list[Any]) -> dict[str, list[int]]:
    """As the engine has them."""
    with cpus[0]._turn():
        env = cpus[0]._engine.fetch()
        found = {name: [env.regs[index]] for index, name in enumerate(GENERAL_SOFT)}
        found |= {"rip": [env.eip], "rflags": [env.eflags], "r8 to r15": sorted(set(env.regs[8:16]))}
        segments = dict(zip(SEGMENTS_SOFT, env.segs, strict=True)) | {"tr": env.tr}
        found |= {name: [each.selector, each.base, each.limit] for name, each in segments.items()}
        found |= {"gdt": [env.gdt.base, env.gdt.limit], "idt": [env.idt.base, env.idt.limit]}
        found |= {"cr0": [env.cr[0]], "cr3": [env.cr[3]], "cr4": [env.cr[4]], "efer": [env.efer]}
        found |= {"MXCSR": [env.mxcsr]}
        found |= {name: [cpus[0]._engine.msr(msr)] for name, msr in MSRS.items()}
    return found | {name: [cpu._lapic.lvts[at] for cpu in cpus] for name, at in LINTS.items()}


def said(protocol: str, back_end: str) -> dict[str, list[int]]:
    """The column of a back end in the tables of a protocol and of both."""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for title in (f"Registers: {protocol}", "MSRs, FPU and LAPIC"):
        table = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()
            if line.startswith("|")
        ]
        column = table[0].index(back_end)
        for row in table[2:]:
            values = [int(word, 16) for word in re.findall(r"`(0x[0-9a-f]+)`", row[column])]
            found |= {name: values for name in row[0].split(", ") if values}
    return found


@pytest.mark.parametrize("protocol", list(ENTRIES))
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_the_page_says_what_a_vcpu_boots_with(back_end: str, protocol: str) -> None:
    with booted(back_end, ENTRIES[protocol]) as cpus:
        found = {"kvm": of_kvm, "soft": of_soft}[back_end](cpus)
    found["rip"] = [] if found["rip"] == [ENTRY] else found["rip"]  # the kernel's own
    assert said(protocol, back_end) == {name: values for name, values in found.items() if values}
