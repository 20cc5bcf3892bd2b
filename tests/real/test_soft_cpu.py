"""The soft CPU runs small guests, assembled here: exits, privilege changes, interrupts, kicks, save and load."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from trivmm._native import lib
from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, GuestRequest, Range
from trivmm.bus.ticket import Ticket
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import INTERRUPTED, Crashed, Outcome, PvhEntry, VcpuState, VmBackendState
from trivmm.memory.guest import GuestMemory
from trivmm.nursery.vcpu import Vcpu, drive_thread
from trivmm.testing.driver import MockDriver
from trivmm.testing.recording import NOTED, RecordingBus
from trivmm.testing.scripted import IoIn, IoOut, MmioRead, MmioWrite

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [
    pytest.mark.soft,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to assemble guests"),
]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402
from trivmm.hypervisor.soft.lapic import TIMER_HZ  # noqa: E402
from trivmm.hypervisor.soft.vcpu import SoftVcpu  # noqa: E402
from trivmm.hypervisor.soft.vm import SoftVm  # noqa: E402

RAM = 8 << 20
ENTRY = 0x10_0000
BOUND_S = 60.0
BAR = 0xC000_1000

# From PVH's 32-bit entry to 64-bit ring 0: identity map of 4 GiB (user-accessible), GDT, TSS, IDT, stack.
PRELUDE = r"""
.macro INTO_LONG_MODE target
  mov %cr4, %eax
  or $0x620, %eax
  mov %eax, %cr4
  mov $pml4, %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx
  rdmsr
  or $0x100, %eax
  wrmsr
  mov %cr0, %eax
  or $0x80000001, %eax
  mov %eax, %cr0
  lgdt gdtr
  ljmp $8, $\target
.endm
.code32
.globl _start
_start:
  mov $pml4, %edi
  movl $(pdpt + 7), (%edi)
  mov $pdpt, %edi
  movl $(pd0 + 7), (%edi)
  movl $(pd1 + 7), 8(%edi)
  movl $(pd2 + 7), 16(%edi)
  movl $(pd3 + 7), 24(%edi)
  mov $pd0, %edi
  mov $0x87, %eax
  mov $2048, %ecx
1: mov %eax, (%edi)
  add $0x200000, %eax
  add $8, %edi
  loop 1b
  INTO_LONG_MODE long_mode
.code64
long_mode:
  mov $0x10, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  mov $0x700000, %rsp
  mov $tss, %rax
  movw %ax, gdt + 0x2a
  shr $16, %rax
  movb %al, gdt + 0x2c
  movb %ah, gdt + 0x2f
  mov $0x28, %eax
  ltr %ax
  lidt idtr
  mov $0xff, %al
  out %al, $0x21
  out %al, $0xa1
  jmp main

.macro GATE vector, handler, kind=0x8e
  movabs $\handler, %rax
  mov $(idt + \vector * 16), %rdi
  mov %ax, (%rdi)
  movw $8, 2(%rdi)
  movb $0, 4(%rdi)
  movb $\kind, 5(%rdi)
  shr $16, %rax
  mov %ax, 6(%rdi)
  movl $0, 8(%rdi)
.endm
.macro APIC register, value
  mov $(0xfee00000 + \register), %ebx
  movl $\value, (%rbx)
.endm
.macro RING3 target
  push $0x1b
  push $0x600000
  push $0x3202
  push $0x23
  push $\target
  iretq
.endm
"""
DATA = r"""
.balign 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
     .quad 0x0000890000000067, 0, 0
gdtr: .word 63
      .long gdt
      .long 0
idtr: .word 4095
      .quad idt
.balign 8
tss: .long 0
     .quad 0x6f0000
     .fill 192, 1, 0
.balign 4096
pml4: .fill 4096, 1, 0
pdpt: .fill 4096, 1, 0
pd0: .fill 4096, 1, 0
pd1: .fill 4096, 1, 0
pd2: .fill 4096, 1, 0
pd3: .fill 4096, 1, 0
idt: .fill 4096, 1, 0
"""


def assemble(where: Path, source: str) -> bytes:
    (where / "guest.S").write_text(source)
    common = {"cwd": where, "check": True, "timeout": 60}
    subprocess.run(["gcc", "-c", "-m64", "-o", "guest.o", "guest.S"], **common)  # type: ignore[call-overload]
    link = ["ld", "-Ttext", hex(ENTRY), "-N", "--oformat", "binary", "-o", "guest.bin", "guest.o"]
    subprocess.run(link, **common)  # type: ignore[call-overload]
    return (where / "guest.bin").read_bytes()


@attrs.define(eq=False)
class Guest:
    """One soft VM with a guest loaded, run by hand."""

    memory: GuestMemory
    vm: SoftVm
    cpu: SoftVcpu
    bus: RecordingBus

    def run(self) -> IoOut | MmioWrite | Outcome:
        """Until the next write, or what else ends a run."""
        outcome = self.cpu.run(self.bus)
        return self.bus.writes[-1] if outcome is NOTED else outcome

    def until(self, wanted: Callable[[IoOut | MmioWrite | Outcome], bool]) -> IoOut | MmioWrite | Outcome:
        end = time.monotonic() + BOUND_S
        bell = threading.Timer(BOUND_S, self.cpu.kick)
        bell.start()
        try:
            while time.monotonic() < end:
                seen = self.run()
                if wanted(seen):
                    return seen
                if isinstance(seen, Crashed):
                    break
        finally:
            bell.cancel()
        raise AssertionError(f"not seen; last writes {self.bus.writes[-5:]}\n{self.cpu.describe()}")

    def until_port(self, port: int) -> bytes:
        found = self.until(lambda seen: isinstance(seen, IoOut) and seen.port == port)
        assert isinstance(found, IoOut)
        return found.data

    def outs(self) -> list[IoOut]:
        """Every port write so far."""
        return [write for write in self.bus.writes if isinstance(write, IoOut)]

    def close(self) -> None:
        self.cpu.close()
        self.vm.close()
        self.memory.close()


Build = Callable[..., Guest]


def answer(read: IoIn | MmioRead) -> bytes:
    """The low byte of the address, in each byte."""
    match read:
        case IoIn(port, size, count):
            return (port & 0xFF).to_bytes(1, "little") * size * count
        case MmioRead(gpa, size):
            return (gpa & 0xFF).to_bytes(1, "little") * size


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    guests: list[Guest] = []

    def make(main: str = "", *, prelude: bool = True, code: bytes | None = None) -> Guest:
        if code is None:
            code = assemble(tmp_path, (PRELUDE if prelude else ".code32\n.globl _start\n_start:\n") + main + DATA)
        memory = GuestMemory(((0, RAM),))
        vm = SoftHypervisor().open_vm()
        assert isinstance(vm, SoftVm)
        for region in memory.regions:
            vm.add_memory(region.slot, region.gpa, region.size, region.hva)
        memory.write(ENTRY, code)
        cpu = vm.create_vcpu(0)
        assert isinstance(cpu, SoftVcpu)
        guest = Guest(memory, vm, cpu, RecordingBus(answer))
        cpu.set_boot_state(PvhEntry(ENTRY, 0x6000))
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        guest.close()


def test_boot_registers_and_plain_port_exits(build: Build) -> None:
    guest = build(
        """
        mov %ebx, %eax
        out %eax, $0x40 + 0xc0 - 0x20
        mov $0x1234, %dx
        mov $0x5678, %ax
        out %ax, %dx
        in $0x70, %al
        out %al, $0x80
        hlt
        """,
        prelude=False,
    )
    assert guest.until_port(0xE0) == (0x6000).to_bytes(4, "little")
    assert guest.run() == IoOut(0x1234, 2, b"\x78\x56")
    assert guest.run() == IoOut(0x80, 1, b"\x70")
    assert guest.bus.reads == [IoIn(0x70, 1, 1)]


def test_a_write_leaves_before_the_next_instruction(build: Build) -> None:
    guest = build(
        f"""
        main:
          mov ${BAR}, %ebx
          xor %ecx, %ecx
          movl $7, (%rbx)
          inc %rcx
          mov %rcx, 0x5000
          movw $8, 6(%rbx)
          inc %rcx
          mov %rcx, 0x5000
          out %al, $0x80
          inc %rcx
          mov %rcx, 0x5000
          hlt
        """
    )
    counted = [0]
    for expected in (MmioWrite(BAR, b"\x07\0\0\0"), MmioWrite(BAR + 6, b"\x08\0"), 0x80):
        reason = guest.until(lambda _: True)
        if expected == 0x80:
            assert isinstance(reason, IoOut)
        else:
            assert reason == expected
        counted.append(guest.memory.read(0x5000, 1)[0])
    assert counted == [0, 0, 1, 2]


def test_wide_and_unaligned_mmio_is_one_write(build: Build) -> None:
    guest = build(
        f"""
        main:
          mov ${BAR}, %ebx
          movabs $0x1122334455667788, %rax
          mov %rax, (%rbx)
          mov %eax, 1(%rbx)
          mov 8(%rbx), %rcx
          mov %rcx, 0x5000
          xchg %eax, 0x10(%rbx)
          out %eax, $0x80
          hlt
        """
    )
    assert guest.run() == MmioWrite(BAR, bytes.fromhex("8877665544332211"))
    assert guest.run() == MmioWrite(BAR + 1, bytes.fromhex("88776655"))
    assert guest.run() == MmioWrite(BAR + 0x10, bytes.fromhex("88776655"))
    assert guest.run() == IoOut(0x80, 4, b"\x10" * 4)
    assert guest.memory.read(0x5000, 8) == b"\x08" * 4 + b"\x0c" * 4


def test_string_instructions_leave_one_element_at_a_time(build: Build) -> None:
    guest = build(
        f"""
        main:
          mov $text, %esi
          mov $5, %ecx
          mov $0x402, %edx
          rep outsb
          mov $text, %esi
          mov ${BAR}, %edi
          mov $5, %ecx
          rep movsb
          mov $0x71, %edx
          mov $0x5000, %edi
          mov $3, %ecx
          rep insw
          out %al, $0x80
          hlt
        text: .ascii "hello"
        """
    )
    guest.until_port(0x80)
    assert [each.data for each in guest.outs() if each.port == 0x402] == [bytes([each]) for each in b"hello"]
    moved = [each for each in guest.bus.writes if isinstance(each, MmioWrite)]
    assert moved == [MmioWrite(BAR + index, bytes([each])) for index, each in enumerate(b"hello")]
    assert guest.memory.read(0x5000, 6) == b"\x71" * 6


RING3 = """
        main:
          GATE 3, on_int3, 0xee
          GATE 0x80, on_int80, 0xee
          GATE 0x81, on_int80
          GATE 13, on_gp
          RING3 user
        user:
          mov $1, %r12d
          int3
          int $0x80
          int $0x81
        after: jmp after
        on_int3:
          inc %r12d
          mov %cs, %eax
          out %eax, $0x80
          iretq
        on_int80:
          mov 8(%rsp), %rax
          out %eax, $0x81
          mov 24(%rsp), %rax
          out %eax, $0x82
          iretq
        on_gp:
          pop %rax
          out %eax, $0x83
          mov (%rsp), %rax
          sub $after, %rax
          out %eax, $0x84
          hlt
        """


def test_ring_3_and_back_through_gates(build: Build) -> None:
    guest = build(RING3)
    word = int.from_bytes
    assert word(guest.until_port(0x80), "little") == 8
    assert word(guest.until_port(0x81), "little") == 0x23
    assert word(guest.until_port(0x82), "little") == 0x60_0000
    # A gate that ring 3 may not use: #GP with the gate's number, pointing at the INT itself.
    assert word(guest.until_port(0x83), "little") == 0x81 * 8 + 2
    assert word(guest.until_port(0x84), "little", signed=True) == -2


@pytest.mark.parametrize(
    ("flags", "bitmap", "allowed"), [(0x3202, 0xFFFF, True), (0x202, 0xFFFF, False), (0x202, 104, True)]
)
def test_ring_3_ports_need_iopl_or_the_bitmap(build: Build, flags: int, bitmap: int, allowed: bool) -> None:
    guest = build(
        f"""
        main:
          GATE 13, on_gp
          movw ${bitmap}, tss + 102
          movw $(104 + 64), gdt + 0x28
          movb $0x89, gdt + 0x2d
          mov $0x28, %eax
          ltr %ax
          push $0x1b
          push $0x600000
          push ${flags}
          push $0x23
          push $user
          iretq
        user:
          mov $0x55, %eax
          in $0x70, %al
          out %al, $0x80
          hlt
        on_gp:
          pop %rcx
          out %al, $0x82
          mov (%rsp), %rax
          sub $user, %rax
          out %al, $0x83
          hlt
        """
    )
    if allowed:
        assert guest.until_port(0x80) == b"\x70"
        assert guest.until_port(0x82) == b"\x70"
        assert guest.until_port(0x83) == b"\x09"  # the HLT
    else:
        assert guest.until_port(0x82) == b"\x55"
        assert guest.until_port(0x83) == b"\x05"  # the IN
        assert guest.bus.reads == []


def test_syscall_and_sysret(build: Build) -> None:
    guest = build(
        """
        main:
          mov $0xc0000080, %ecx
          rdmsr
          or $1, %eax
          wrmsr
          mov $0xc0000081, %ecx
          mov $0x00100008, %edx
          xor %eax, %eax
          wrmsr
          mov $0xc0000082, %ecx
          mov $entry, %eax
          xor %edx, %edx
          wrmsr
          mov $0xc0000084, %ecx
          mov $0x200, %eax
          wrmsr
          RING3 user
        user:
          syscall
          mov %cs, %eax
          out %al, $0x81
          hlt
        entry:
          mov %cs, %eax
          out %al, $0x80
          pushfq
          pop %rax
          shr $8, %eax
          out %al, $0x80
          sysretq
        """
    )
    assert guest.until_port(0x80) == b"\x08"
    assert guest.until_port(0x80)[0] & 2 == 0  # the mask closed IF
    assert guest.until_port(0x81) == b"\x23"


def test_32_bit_gates_change_the_stack_through_the_tss(build: Build) -> None:
    guest = build(
        """
          lgdt gdtr32
          ljmp $8, $1f
        1: mov $0x10, %eax
          mov %eax, %ds
          mov %eax, %ss
          mov $0x700000, %esp
          movl $0x6f0000, tss32 + 4
          movl $0x10, tss32 + 8
          mov $tss32, %eax
          movw %ax, gdt32 + 0x2a
          shr $16, %eax
          movb %al, gdt32 + 0x2c
          mov $0x28, %eax
          ltr %ax
          mov $on_int, %eax
          movw %ax, idt + 0x180
          movw $8, idt + 0x182
          movw $0xee00, idt + 0x184
          shr $16, %eax
          movw %ax, idt + 0x186
          lidt idtr
          push $0x23
          push $0x600000
          push $0x3002
          push $0x1b
          push $user
          iret
        user: int $0x30
          mov %cs, %eax
          out %al, $0x81
          hlt
        on_int: mov %cs, %eax
          out %al, $0x80
          mov %esp, %eax
          out %eax, $0x80
          mov 12(%esp), %eax
          out %eax, $0x80
          iret
        .balign 8
        gdt32: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff
          .quad 0x0000890000000067
        gdtr32: .word 47
          .long gdt32
        .balign 8
        tss32: .fill 104, 1, 0
        .code64
        main:
        """,
        prelude=False,
    )
    words = [int.from_bytes(guest.until_port(0x80), "little") for _ in range(3)]
    assert words == [0x08, 0x6F0000 - 20, 0x60_0000]
    assert guest.until_port(0x81) == b"\x1b"


def test_page_fault_reaches_the_guest_with_address_and_code(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 14, on_pf
          movabs $0x123456789000, %rdi
        touch:
          movl $1, (%rdi)
          out %al, $0x81
          hlt
        on_pf:
          pop %rax
          out %eax, $0x80
          mov %cr2, %rax
          out %eax, $0x80
          shr $32, %rax
          out %eax, $0x80
          mov (%rsp), %rax
          sub $touch, %rax
          out %eax, $0x80
          addq $6, (%rsp)
          iretq
        """
    )
    words = [int.from_bytes(guest.until_port(0x80), "little") for _ in range(4)]
    assert words == [2, 0x56789000, 0x1234, 0]
    guest.until_port(0x81)


def test_faults_that_follow_each_other_are_no_double_fault(build: Build) -> None:
    """Each one was delivered before the next happened. The engine, which delivers none itself, thinks otherwise."""
    guest = build(
        """
        .macro TELL vector, code
        on_\\vector:
        .if \\code
          pop %rax
        .endif
          mov $\\vector, %al
          out %al, $0x80
          movq $1f, (%rsp)
          mov $next, %rax
          mov (%rax), %rbx
          addq $8, (%rax)
          mov (%rbx), %rbx
          mov %rbx, (%rsp)
          iretq
        1:
        .endm
        main:
          GATE 0, on_0
          GATE 8, on_8
          GATE 13, on_13
          GATE 14, on_14
          mov $order, %rax
          jmp *(%rax)
        page: movabs $0x123456789000, %rdi
          movl $1, (%rdi)
        protection: movabs $0x8000000000000000, %rdi
          movl $1, (%rdi)
        division: xor %ecx, %ecx
          div %ecx
        end: out %al, $0x81
          hlt
        TELL 0, 0
        TELL 8, 1
        TELL 13, 1
        TELL 14, 1
        .balign 8
        next: .quad order + 8
        order: .quad page, page, protection, protection, page, division, division, protection, division, page, end
        """
    )
    guest.until_port(0x81)
    told = [each.data[0] for each in guest.outs() if each.port == 0x80]
    assert told == [14, 14, 13, 13, 14, 0, 0, 13, 0, 14]


def test_cpuid_tells_the_clocks(build: Build) -> None:
    """A guest that can't calibrate by counting finds the TSC's rate and the LAPIC timer's in leaf 15H."""
    guest = build(
        """
        main:
          xor %eax, %eax
          cpuid
          out %eax, $0x80
          mov $0x15, %eax
          xor %ecx, %ecx
          cpuid
          out %eax, $0x80
          mov %ebx, %eax
          out %eax, $0x80
          mov %ecx, %esi
          mov $7, %eax
          xor %ecx, %ecx
          cpuid
          mov %ebx, %eax
          out %eax, $0x82
          mov $0x80000007, %eax
          cpuid
          mov %edx, %eax
          out %eax, $0x83
          mov $0x3b, %ecx
          rdmsr
          out %eax, $0x84
          mov %esi, %eax
          out %eax, $0x81
        """
    )
    crystal = int.from_bytes(guest.until_port(0x81), "little")
    highest, below, above = (int.from_bytes(each.data, "little") for each in guest.outs() if each.port == 0x80)
    assert highest >= 0x15
    features, power, adjusted = (
        int.from_bytes(each.data, "little") for each in guest.outs() if 0x82 <= each.port <= 0x84
    )
    assert features & 1 << 1  # the TSC_ADJUST MSR
    assert power == 1 << 8  # invariant: nobody needs to watch it
    assert adjusted == 0
    assert crystal == TIMER_HZ
    assert (crystal // 1000) * above < 1 << 32  # Linux computes in 32 bits
    assert 100e6 < crystal * above / below < 10e9


def test_undefined_instruction_and_division(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 6, on_ud
          GATE 0, on_de
          ud2
          xor %ecx, %ecx
          div %ecx
          out %al, $0x82
          hlt
        on_ud: out %al, $0x80
          addq $2, (%rsp)
          iretq
        on_de: out %al, $0x81
          addq $2, (%rsp)
          iretq
        """
    )
    for port in (0x80, 0x81, 0x82):
        guest.until_port(port)


def test_triple_fault_is_an_exit_with_a_report(build: Build) -> None:
    guest = build("main: lidt nothing\n int3\nnothing: .quad 0, 0\n")
    ended = guest.until(lambda seen: isinstance(seen, GuestRequest))
    assert isinstance(ended, GuestRequest)
    assert (ended.kind, ended.why) == ("reset", "triple fault")
    assert "rip" in ended.details
    assert "code" in ended.details


HALT_AND_MSI = """
        main:
          GATE 0x41, on_msi
          APIC 0xf0, 0x1ff
          xor %r12d, %r12d
          out %al, $0x80
        again:
          cli
          cmp $20, %r12d
          jae done
          sti
          hlt
          jmp again
        done:
          out %al, $0x82
          hlt
        on_msi:
          inc %r12d
          mov %r12d, %eax
          out %al, $0x81
          APIC 0xb0, 0
          iretq
        """


def test_halt_wakes_on_msi_and_none_is_lost(build: Build) -> None:
    guest = build(HALT_AND_MSI)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        token = guest.vm.connect_msi(fd, 0xFEE0_0000, 0x41)
        guest.until_port(0x80)
        for number in range(1, 21):
            timer = threading.Timer(0.002, os.eventfd_write, (fd, 1))
            timer.start()
            assert guest.until_port(0x81) == bytes([number])
            timer.join()
        guest.until_port(0x82)
        guest.vm.disconnect_msi(token)
        os.eventfd_write(fd, 1)
        threading.Timer(0.05, guest.cpu.kick).start()
        assert guest.run() is INTERRUPTED
        assert os.eventfd_read(fd) == 1
    finally:
        os.close(fd)


def test_msi_interrupts_a_ring_3_spinner(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 0x41, on_msi
          APIC 0xf0, 0x1ff
          RING3 user
        user: out %al, $0x80
        1: inc %r13
          jmp 1b
        on_msi:
          mov 8(%rsp), %eax
          out %eax, $0x81
          APIC 0xb0, 0
          iretq
        """
    )
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.connect_msi(fd, 0xFEE0_0000, 0x41)
        guest.until_port(0x80)
        for _ in range(50):
            os.eventfd_write(fd, 1)
            assert guest.until_port(0x81) == (0x23).to_bytes(4, "little")
    finally:
        os.close(fd)


def test_self_ipi_priority_and_task_priority(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 0x31, on_low
          GATE 0x51, on_high
          APIC 0xf0, 0x1ff
          sti
          APIC 0x80, 0x40
          APIC 0x300, 0x40031
          out %al, $0x80
          APIC 0x300, 0x40051
          out %al, $0x81
          APIC 0x80, 0
          out %al, $0x82
          hlt
        on_low: mov $0x31, %al
          out %al, $0x90
          APIC 0xb0, 0
          iretq
        on_high: mov $0x51, %al
          out %al, $0x91
          APIC 0xb0, 0
          iretq
        """
    )
    guest.until_port(0x82)
    assert [each.port for each in guest.outs()] == [0x80, 0x91, 0x81, 0x90, 0x82]


def test_lapic_timer_once_and_again(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 0x61, on_timer
          APIC 0xf0, 0x1ff
          APIC 0x3e0, 0xb
          APIC 0x320, 0x61
          APIC 0x380, 1000000
          sti
          hlt
          out %al, $0x80
          APIC 0x320, 0x20061
          APIC 0x380, 1000000
        1: hlt
          cmp $5, %r12d
          jb 1b
          out %al, $0x81
          hlt
        on_timer: inc %r12d
          APIC 0xb0, 0
          iretq
        """
    )
    guest.until_port(0x80)
    guest.until_port(0x81)


def test_8259_and_pit_interrupt_through_lint0(build: Build) -> None:
    guest = build(
        """
        main:
          GATE 0x20, on_pit
          GATE 0x24, on_serial
          mov $0x11, %al
          out %al, $0x20
          mov $0x20, %al
          out %al, $0x21
          mov $4, %al
          out %al, $0x21
          mov $1, %al
          out %al, $0x21
          mov $0xee, %al
          out %al, $0x21
          mov $0x34, %al
          out %al, $0x43
          mov $0xe8, %al
          out %al, $0x40
          mov $3, %al
          out %al, $0x40
        1: sti
          hlt
          cli
          cmp $5, %r12d
          jb 1b
          mov $0xef, %al
          out %al, $0x21
          out %al, $0x80
          sti
        2: hlt
          jmp 2b
        on_pit: inc %r12d
          mov $0x20, %al
          out %al, $0x20
          iretq
        on_serial: out %al, $0x81
          mov $0x20, %al
          out %al, $0x20
          iretq
        """
    )
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.connect_irq(fd, 4)
        guest.until_port(0x80)
        for _ in range(3):
            os.eventfd_write(fd, 1)
            guest.until_port(0x81)
        guest.vm.disconnect_irq(fd, 4)
    finally:
        os.close(fd)


def test_the_io_apic_interrupts_through_the_lapic(build: Build) -> None:
    guest = build(
        """
        .macro IOAPIC register, value
          mov $0xfec00000, %ebx
          movb $\\register, (%rbx)
          movl $\\value, 0x10(%rbx)
        .endm
        main:
          GATE 0x60, on_pit
          GATE 0x64, on_serial
          APIC 0xf0, 0x1ff
          APIC 0x350, 0x10700
          IOAPIC 0x11, 0
          IOAPIC 0x10, 0x60
          IOAPIC 0x19, 0
          IOAPIC 0x18, 0x8064
          mov $0x34, %al
          out %al, $0x43
          mov $0xe8, %al
          out %al, $0x40
          mov $3, %al
          out %al, $0x40
        1: sti
          hlt
          cli
          cmp $5, %r12d
          jb 1b
          IOAPIC 0x10, 0x10060
          out %al, $0x80
          sti
        2: hlt
          jmp 2b
        on_pit: inc %r12d
          APIC 0xb0, 0
          iretq
        on_serial: APIC 0xb0, 0
          out %al, $0x81
          iretq
        """
    )
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.connect_irq(fd, 4)
        guest.until_port(0x80)
        for _ in range(3):  # level triggered: each one needs the EOI of the one before
            os.eventfd_write(fd, 1)
            guest.until_port(0x81)
        guest.vm.disconnect_irq(fd, 4)
    finally:
        os.close(fd)


def test_doorbell_rings_without_an_exit(build: Build) -> None:
    guest = build(
        f"""
        main:
          mov ${BAR}, %ebx
          movw $1, (%rbx)
          movl $1, (%rbx)
          movq $1, (%rbx)
          out %al, $0x80
          movw $1, 4(%rbx)
          hlt
        """
    )
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        guest.vm.add_doorbell(fd, BAR)
        assert isinstance(guest.run(), IoOut)
        assert os.eventfd_read(fd) == 3
        assert guest.run() == MmioWrite(BAR + 4, b"\x01\0")
    finally:
        os.close(fd)


COUNTER = """
        main:
          xor %ecx, %ecx
          out %al, $0x80
        1: inc %rcx
          incq 0x5000
          add %rcx, %rax
          push %rcx
          lock incq 0x5008
          pop %rdx
          jmp 1b
        """


def _counts(guest: Guest) -> tuple[int, int, int]:
    words = (int.from_bytes(guest.memory.read(at, 8), "little") for at in (0x5000, 0x5008))
    return guest.cpu._engine.fetch().regs[1], *words


def test_the_vcpu_program_pauses_it_and_parks_it_at_a_barrier(build: Build) -> None:
    guest = build(
        f"""
        main:
          mov ${BAR}, %ebx
        1: incq 0x5000
          movl $4, (%rbx)
          incq 0x5008
          jmp 1b
        """
    )
    tickets: list[Ticket] = []
    written = threading.Semaphore(0)
    changed = threading.Event()

    class Device:
        def read(self, offset: int, size: int) -> bytes:
            raise AssertionError("the guest only writes")

        def write(self, offset: int, data: bytes) -> Ticket:
            tickets.append(Ticket("__rng", len(tickets), "activation"))
            written.release()
            return tickets[-1]

    def no(*_arguments: object) -> None:
        raise AssertionError("the guest neither asks nor crashes")

    bus = Bus(AddressSpace("pio"), AddressSpace("mmio"))
    bus.mmio.insert(Range(BAR, 0x1000, Device(), "__rng"))
    vcpu = Vcpu(guest.cpu, bus, changed.set, no, no)
    thread = threading.Thread(target=drive_thread, args=(guest.cpu, vcpu.program(), bus))
    thread.start()
    try:
        vcpu.release_pause()
        for count in range(30):
            assert written.acquire(timeout=BOUND_S)
            before, after = (guest.memory.read(at, 8)[0] for at in (0x5000, 0x5008))
            assert (before, after) == (count + 1, count)
            # The barrier is a checkpoint: a pause reaches it at once, and after resume it still holds.
            changed.clear()
            vcpu.request_pause()
            assert changed.wait(BOUND_S)
            assert vcpu.is_paused()
            saved = guest.cpu.save()
            guest.cpu.load(saved)
            vcpu.release_pause()
            assert guest.memory.read(0x5008, 1)[0] == count
            tickets[-1].settle()
    finally:
        for ticket in tickets:
            ticket.settle()
        vcpu.request_stop()
        thread.join(BOUND_S)
    assert not thread.is_alive()


def test_200_kicks_stop_a_spinner_between_two_instructions(build: Build) -> None:
    guest = build(COUNTER)
    guest.until_port(0x80)
    randomness = random.Random(7)
    for _ in range(200):
        timer = threading.Timer(randomness.random() * 0.003, guest.cpu.kick)
        timer.start()
        assert guest.run() is INTERRUPTED
        timer.join()
        registers, plain, locked = _counts(guest)
        # A stop inside a read-modify-write would run it twice: the words would be ahead of the register.
        assert 0 <= registers - plain <= 1
        assert 0 <= registers - locked <= 1


def test_a_kick_before_run_and_park_is_not_lost(build: Build) -> None:
    guest = build(COUNTER)
    guest.until_port(0x80)
    guest.cpu.kick()
    guest.cpu.kick()
    assert guest.run() is INTERRUPTED
    guest.cpu.kick()
    began = time.monotonic()
    guest.cpu.park(BOUND_S)
    assert time.monotonic() - began < BOUND_S / 2
    guest.cpu.park(0.01)
    threading.Timer(0.02, guest.cpu.kick).start()
    guest.cpu.park(BOUND_S)
    assert time.monotonic() - began < BOUND_S / 2


def test_a_kick_ends_a_halt(build: Build) -> None:
    guest = build("main: cli\n1: hlt\n jmp 1b\n")
    for _ in range(20):
        timer = threading.Timer(0.002, guest.cpu.kick)
        timer.start()
        assert guest.run() is INTERRUPTED
        timer.join()


def _moved(build: Build, source: Guest) -> Guest:
    """The guest again in a fresh VM, memory and state through plain bytes."""
    target = build(code=b"\xf4")
    target.memory.write(0, source.memory.read(0, RAM))
    target.vm.load(source.vm.save())
    saved = source.cpu.save()
    target.cpu.load(VcpuState(saved.kind, {name: bytes(blob) for name, blob in saved.blobs.items()}))
    return target


def test_saved_in_a_loop_it_goes_on_in_a_fresh_vm(build: Build) -> None:
    guest = build(COUNTER)
    guest.until_port(0x80)
    for _ in range(5):
        threading.Timer(0.005, guest.cpu.kick).start()
        assert guest.run() is INTERRUPTED
        before = _counts(guest)
        guest = _moved(build, guest)
        assert _counts(guest) == before
        after = before
        while after[0] == before[0]:
            threading.Timer(0.005, guest.cpu.kick).start()
            assert guest.run() is INTERRUPTED
            after = _counts(guest)
        assert 0 <= after[0] - after[1] <= 1


def test_saved_in_halt_and_in_ring_3_it_goes_on(build: Build) -> None:
    guest = build(HALT_AND_MSI)
    guest.until_port(0x80)
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        for number in range(1, 6):
            threading.Timer(0.01, guest.cpu.kick).start()
            assert guest.until(lambda seen: seen is INTERRUPTED)
            guest = _moved(build, guest)
            guest.vm.connect_msi(fd, 0xFEE0_0000, 0x41)
            os.eventfd_write(fd, 1)
            assert guest.until_port(0x81) == bytes([number])
            guest.vm.disconnect_msi(fd)
    finally:
        os.close(fd)


def test_sse_and_x87_survive_a_move(build: Build) -> None:
    guest = build(
        """
        main:
          fninit
          fldpi
          mov $0x4009, %eax
          cvtsi2sd %rax, %xmm7
        1: out %al, $0x80
          movq %xmm7, 0x5000
          fstl 0x5008
          jmp 1b
        """
    )
    guest.until_port(0x80)
    guest.until_port(0x80)
    before = guest.memory.read(0x5000, 16)
    guest = _moved(build, guest)
    guest.memory.write(0x5000, bytes(16))
    guest.until_port(0x80)
    assert guest.memory.read(0x5000, 16) == before


def test_foreign_and_damaged_states_are_refused(build: Build) -> None:
    guest = build(COUNTER)
    saved = guest.cpu.save()
    with pytest.raises(HypervisorError, match="kvm/1"):
        guest.cpu.load(VcpuState("kvm/1", saved.blobs))
    with pytest.raises(HypervisorError, match="bytes"):
        guest.cpu.load(VcpuState(saved.kind, {**saved.blobs, "cpu": b"short"}))
    wild = bytearray(saved.blobs["cpu"])
    wild[604:608] = b"\xff\xff\xff\x7f"
    with pytest.raises(HypervisorError, match="x87"):
        guest.cpu.load(VcpuState(saved.kind, {**saved.blobs, "cpu": bytes(wild)}))
    for damaged in (b"", b"[]", b'{"halted": false, "lapic": {}}', b"\xff"):
        with pytest.raises(HypervisorError, match="no sense"):
            guest.cpu.load(VcpuState(saved.kind, {**saved.blobs, "run": damaged}))
    guest.cpu.load(saved)
    chips = guest.vm.save()
    wild_chips = re.sub(rb'"port61": *[0-9]+', b'"port61": 1e999', chips.blobs["chips"])
    with pytest.raises(HypervisorError, match="no sense"):
        guest.vm.load(VmBackendState(chips.kind, {**chips.blobs, "chips": wild_chips}))


def test_hostile_registers_hurt_only_the_guest(build: Build) -> None:
    guest = build(COUNTER)
    guest.until_port(0x80)
    saved = guest.cpu.save()
    randomness = random.Random(11)
    for _ in range(60):
        wild = bytearray(saved.blobs["cpu"])
        for _ in range(randomness.choice((1, 4, 40))):
            low, high = randomness.choice(((0, 600), (136, 184), (590, 830), (600, 5568), (5380, 5568)))
            wild[randomness.randrange(low, high)] = randomness.randrange(256)
        try:
            guest.cpu.load(VcpuState(saved.kind, {**saved.blobs, "cpu": bytes(wild)}))
        except HypervisorError:
            continue
        timer = threading.Timer(0.005, guest.cpu.kick)
        timer.start()
        guest.run()
        timer.join()


def test_code_that_the_host_changed_runs_after_a_flush(build: Build) -> None:
    guest = build("main:\n1: mov $1, %al\n out %al, $0x80\n jmp 1b\n")
    assert guest.until_port(0x80) == b"\x01"
    code = guest.memory.read(ENTRY, 0x400)
    at = code.index(bytes.fromhex("b001e680"))
    guest.memory.write(ENTRY + at + 1, b"\x02")
    guest.vm.flush_code()
    assert guest.until_port(0x80) == b"\x02"


def test_code_that_a_polled_device_wrote_runs_anew(build: Build) -> None:
    """A boot loader's way: no interrupt, it watches the used index and jumps into what was read."""
    guest = build(
        """
        main:
          mov $0x300000, %ebx
          movl $0xc301b0, (%rbx) /* mov $1, %al; ret */
          mov $0x18002, %esi     /* the used index */
        1: mov (%rsi), %cx
          call *%rbx
          out %al, $0x80
        2: cmp %cx, (%rsi)
          je 2b
          jmp 1b
        """
    )
    guest.memory.before_told(*guest.cpu.write_hook)
    driver = MockDriver(guest.memory)
    try:
        queue = driver.open()
        assert guest.until_port(0x80) == b"\x01"

        def answer() -> None:
            lib.tv_queue_push(queue, 0, 512)
            lib.tv_queue_publish(queue)

        for value in (2, 3, 4):
            guest.memory.write(0x300001, bytes([value]))
            device = threading.Timer(0.05, answer)
            device.start()
            assert guest.until_port(0x80) == bytes([value])
            device.join()
    finally:
        driver.close()


def test_a_cpu_halted_for_good_sleeps_though_an_interrupt_waits(build: Build) -> None:
    """It woke itself again and again: a dead guest took a whole host CPU."""
    guest = build(
        """
        main:
          APIC 0xf0, 0x1ff
          APIC 0x300, 0x44050
          out %al, $0x80
          cli
          hlt
        """
    )
    guest.until_port(0x80)
    slices = 0
    inner = guest.cpu._slice

    def counted(bus: Bus) -> Outcome | None:
        nonlocal slices
        slices += 1
        return inner(bus)

    guest.cpu._slice = counted  # type: ignore[method-assign]
    bell = threading.Timer(0.5, guest.cpu.kick)
    bell.start()
    assert guest.cpu.run(guest.bus) is INTERRUPTED
    bell.join()
    assert slices < 100


def test_cpuid_of_caches_that_are_not_there_is_not_kept() -> None:
    from trivmm.hypervisor.soft import cpuid

    before = cpuid.engine_says.cache_info().currsize
    clock = cpuid.Clock()
    assert all(cpuid.answer(4, leaf, 0, clock, TIMER_HZ, 0, 2) == (0, 0, 0, 0) for leaf in range(4, 500))
    assert cpuid.engine_says.cache_info().currsize == before
