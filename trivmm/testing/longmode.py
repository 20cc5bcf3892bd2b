"""A vCPU in 64-bit mode with an identity map, set up from outside: for tests of single instructions."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.hypervisor.base import INTERRUPTED, Outcome
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.system import KvmHypervisor
from trivmm.hypervisor.kvm.vcpu import KvmVcpu
from trivmm.hypervisor.kvm.vm import KvmVm
from trivmm.memory.guest import GuestMemory
from trivmm.testing.recording import RecordingBus

MEMORY: Final = 4 << 20
PML4, PDPT, DIRECTORY, TABLE = 0x1000, 0x2000, 0x3000, 0x4000
GDT, IDT, TSS, HANDLERS, STACK = 0x6000, 0x7000, 0x8000, 0xB000, 0xE000
CODE: Final = 0x10000
DATA: Final = 0x20000
UNMAPPED: Final = 0x1F0000  # the last pages of the first 2 MiB are not present
PORT: Final = 0xE0  # a guest that writes here has come to its end

GENERAL: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{number}" for number in range(8, 16)))
REGISTERS: Final = (*GENERAL, "rip", "rflags")  # struct kvm_regs
SREGS: Final = struct.Struct("<" + "QIHBBBBBBBBBx" * 8 + "QHxxxxxx" * 2 + "QQQQQQQ" + "32s")
CODE_SEGMENT = (0, 0xFFFFFFFF, 0x08, 11, 1, 0, 0, 1, 1, 1, 0, 0)
DATA_SEGMENT = (0, 0xFFFFFFFF, 0x10, 3, 1, 0, 1, 1, 0, 1, 0, 0)
TASK_SEGMENT = (TSS, 0x2068, 0x28, 11, 1, 0, 0, 0, 0, 0, 0, 0)
NO_SEGMENT = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)
CR0, CR4, EFER = 0x8005_0033, 0x4_0620, 0x500  # PG AM WP NE ET MP PE; OSXSAVE OSXMMEXCPT OSFXSR PAE; LMA LME


@attrs.define(eq=False)
class LongMode:
    memory: GuestMemory
    vm: KvmVm
    cpu: KvmVcpu
    bus: RecordingBus = attrs.field(factory=RecordingBus)

    @property
    def fd(self) -> int:
        return int(self.cpu._native.fd)

    @property
    def assist(self) -> Any:
        return self.cpu._native.assist

    def registers(self) -> dict[str, int]:
        raw = bytearray(ffi.sizeof("struct kvm_regs"))
        kvm_call(self.fd, "KVM_GET_REGS", raw)
        return dict(zip(REGISTERS, struct.unpack("<18Q", raw), strict=True))

    def put_registers(self, **values: int) -> None:
        raw = [(self.registers() | values)[name] for name in REGISTERS]
        kvm_call(self.fd, "KVM_SET_REGS", struct.pack("<18Q", *raw))

    def system(self) -> list[Any]:
        raw = bytearray(ffi.sizeof("struct kvm_sregs"))
        kvm_call(self.fd, "KVM_GET_SREGS", raw)
        return list(SREGS.unpack(raw))

    def enter(self, *, ring: int = 0, cr0: int = CR0, cr4: int = CR4, idt_limit: int = 0xFFF) -> None:
        """64-bit mode in that ring, everything else as after a reset; no exception waits."""
        kvm_call(self.fd, "KVM_SET_VCPU_EVENTS", bytes(8) + self.events()[8:])
        now = self.system()
        code = (*CODE_SEGMENT[:2], 0x08 | ring if not ring else 0x23, *CODE_SEGMENT[3:5], ring, *CODE_SEGMENT[6:])
        data = (*DATA_SEGMENT[:2], 0x10 if not ring else 0x1B, *DATA_SEGMENT[3:5], ring, *DATA_SEGMENT[6:])
        segments = [code, data, data, data, data, data, TASK_SEGMENT, NO_SEGMENT]
        flat = [value for segment in segments for value in segment]
        tail = [GDT, 0x3F, IDT, idt_limit, cr0, 0, PML4, cr4, 0, EFER, now[-2], bytes(32)]
        kvm_call(self.fd, "KVM_SET_SREGS", SREGS.pack(*flat, *tail))

    def xsave(self) -> bytearray:
        raw = bytearray(ffi.sizeof("struct kvm_xsave"))
        kvm_call(self.fd, "KVM_GET_XSAVE", raw)
        return raw

    def put_xsave(self, raw: bytes) -> None:
        kvm_call(self.fd, "KVM_SET_XSAVE", bytes(raw))

    def events(self) -> bytes:
        raw = bytearray(ffi.sizeof("struct kvm_vcpu_events"))
        kvm_call(self.fd, "KVM_GET_VCPU_EVENTS", raw)
        return bytes(raw)

    def injected(self) -> tuple[int, int] | None:
        """(vector, error code) of the exception that waits for the guest."""
        injected, vector, _, pending, error = struct.unpack_from("<BBBBI", self.events())
        return (vector, error) if injected or pending else None

    def finish(self, code: bytes, at: int = CODE) -> bool:
        """As after an emulation failure at ``code``: whether the assist has dealt with it."""
        self.memory.write(at, code)
        self.put_registers(rip=at)
        return bool(lib.tv_assist(self.assist, ffi.NULL))

    def run(self) -> Outcome:
        while (outcome := self.cpu.run(self.bus)) is INTERRUPTED:
            pass
        return outcome


def _tables(memory: GuestMemory) -> None:
    memory.write(PML4, struct.pack("<Q", PDPT | 7))
    memory.write(PDPT, struct.pack("<Q", DIRECTORY | 7))
    memory.write(DIRECTORY, struct.pack("<QQ", TABLE | 7, 0x200000 | 0x87))
    entries = [page << 12 | 7 if page << 12 < UNMAPPED else 0 for page in range(512)]
    memory.write(TABLE, struct.pack("<512Q", *entries))
    flat = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF]
    memory.write(GDT, struct.pack("<5Q", *flat) + struct.pack("<QQ", 0x0000_8B00_0000_2068 | TSS << 16, 0))
    memory.write(TSS, bytes(4) + struct.pack("<Q", STACK) + bytes(102 - 12) + struct.pack("<H", 104))
    memory.write(TSS + 104, bytes(8192) + b"\xff")  # every port is ring 3's
    for vector in range(32):
        # mov $vector, %al; out %al, $PORT; hlt
        memory.write(HANDLERS + 16 * vector, bytes((0xB0, vector, 0xE6, PORT, 0xF4)))
        handler = HANDLERS + 16 * vector
        gate = handler & 0xFFFF | 0x08 << 16 | 0xEE << 40 | (handler >> 16) << 48
        memory.write(IDT + 16 * vector, struct.pack("<QQ", gate, 0))


@contextmanager
def long_mode() -> Iterator[LongMode]:
    hypervisor = KvmHypervisor()
    memory = GuestMemory([(0, MEMORY)])
    vm = hypervisor.open_vm()
    try:
        for region in memory.regions:
            vm.add_memory(region.slot, region.gpa, region.size, region.hva)
        vm.attach_memory(memory.native)
        _tables(memory)
        guest = LongMode(memory, vm, vm.create_vcpu(0))
        guest.cpu.attach_thread()
        guest.enter()
        guest.put_registers(rsp=STACK, rflags=2)
        yield guest
        guest.cpu.detach_thread()
    finally:
        vm.close()
        memory.close()
        hypervisor.close()
