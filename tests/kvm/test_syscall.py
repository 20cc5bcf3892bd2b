"""SYSCALL on a KVM that leaves it in ring 3 (``ffi/assist_syscall.c``), and on every other the same guest."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest

from trivmm._native import lib
from trivmm.cli.doctor import doctor
from trivmm.hypervisor.kvm.calls import kvm_call
from trivmm.hypervisor.kvm.ring0 import SLOW_HOST_OPTIONS, look_at_ring0
from trivmm.hypervisor.kvm.state import set_msrs
from trivmm.testing.longmode import (
    CODE,
    CR0,
    CR4,
    EFER,
    GDT,
    HANDLERS,
    IDT,
    NO_SEGMENT,
    PML4,
    PORT,
    SREGS,
    STACK,
    TASK_SEGMENT,
    UNMAPPED,
    LongMode,
    long_mode,
)
from trivmm.testing.scripted import IoOut

pytestmark = pytest.mark.kvm

ENTRY, USER_STACK = 0x12000, 0x30000
STAR, LSTAR, FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084
LINUX_FMASK, IF, DF, AC = 0x257FD5, 0x200, 0x400, 0x40000
PAGE_FAULT, TRAP = 14, 1
END = bytes((0xE6, PORT, 0xF4))  # out %al, $PORT; hlt
CAME = b"\xb0\x99" + END  # mov $0x99, %al


@pytest.fixture
def guest() -> Iterator[LongMode]:
    """In ring 3 with Linux's selectors; SYSCALL goes to a page that ring 3 may not fetch of."""
    with long_mode() as machine:
        memory = machine.memory
        flat = [0, *[0x00AF9B000000FFFF] * 2, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF]
        memory.write(GDT, struct.pack("<7Q", *flat, 0x00AFFB000000FFFF))
        memory.write(0x4000 + (ENTRY >> 12) * 8, struct.pack("<Q", ENTRY | 3))
        memory.write(ENTRY, CAME)
        code = (0, 0xFFFFFFFF, 0x33, 11, 1, 3, 0, 1, 1, 1, 0, 0)
        data = (0, 0xFFFFFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 1, 0, 0)
        segments = [code, data, data, data, data, data, TASK_SEGMENT, NO_SEGMENT]
        values = [value for segment in segments for value in segment]
        tail = [GDT, 0x3F, IDT, 0xFFF, CR0, 0, PML4, CR4, 0, EFER | 1, machine.system()[-2], bytes(32)]
        kvm_call(machine.fd, "KVM_SET_SREGS", SREGS.pack(*values, *tail))
        set_msrs(machine.fd, [(STAR, 0x0023 << 48 | 0x10 << 32), (LSTAR, ENTRY), (FMASK, LINUX_FMASK)])
        machine.put_registers(rip=CODE, rsp=USER_STACK, rflags=2 | IF)
        yield machine


def ran(guest: LongMode, code: bytes) -> int:
    """What the guest says at its end."""
    guest.memory.write(CODE, code)
    guest.run()
    written = guest.bus.writes[-1]
    assert isinstance(written, IoOut)
    assert written.port == PORT
    return written.data[0]


def test_a_syscall_comes_to_ring_0(guest: LongMode) -> None:
    assert ran(guest, b"\x0f\x05") == 0x99
    now = guest.registers()
    assert (now["rcx"], now["r11"] & ~0x44, now["rsp"]) == (CODE + 2, 2 | IF, USER_STACK)
    assert now["rflags"] & LINUX_FMASK == 0
    assert (guest.system()[2], guest.system()[12 * 5 + 2]) == (0x10, 0x18)  # CS, SS
    assert guest.cpu.counters().get("assist_syscall", 0) == look_at_ring0().syscall_lost


def test_a_jump_to_the_entry_is_no_syscall(guest: LongMode) -> None:
    jump = b"\xb8" + struct.pack("<I", ENTRY) + b"\xb9" + struct.pack("<I", CODE + 2) + b"\xff\xe0"  # RCX is a lie
    assert ran(guest, jump) == PAGE_FAULT
    assert guest.cpu.counters().get("assist_syscall", 0) == 0


def test_a_jump_is_no_syscall_where_that_leaves_the_flags(guest: LongMode) -> None:
    set_msrs(guest.fd, [(FMASK, 0)])
    jump = b"\xb8" + struct.pack("<I", ENTRY) + b"\xb9" + struct.pack("<I", CODE + 2) + b"\xff\xe0"
    assert ran(guest, jump) == PAGE_FAULT


def test_a_syscall_that_leaves_the_flags(guest: LongMode) -> None:
    set_msrs(guest.fd, [(FMASK, 0)])
    assert ran(guest, b"\x0f\x05") == 0x99
    assert guest.registers()["rflags"] & IF


def test_other_page_faults_are_the_guests(guest: LongMode) -> None:
    assert ran(guest, b"\xa1" + struct.pack("<Q", UNMAPPED)) == PAGE_FAULT  # mov UNMAPPED, %eax
    assert struct.unpack("<6Q", guest.memory.read(STACK - 48, 48))[1] == CODE


@pytest.mark.parametrize("first", ["90", "6690", "0f1f00", "f30f1efa", "0f01ca", "fc", "0f1f4000", ""])
def test_the_handlers_first_instruction_is_done_once(guest: LongMode, first: str) -> None:
    """It may be done by hand, with what it does to the flags, or stepped over."""
    code = bytes.fromhex(first) + bytes.fromhex("41 ff c0 b0 0e") + END  # inc %r8d; mov $14, %al
    guest.memory.write(HANDLERS + 16 * PAGE_FAULT, code)
    guest.put_registers(r8=7)
    flags = bytes.fromhex("9c 810c2400040400 9d")  # pushf; orl $AC | DF, (%rsp); popf
    assert ran(guest, flags + b"\xa1" + struct.pack("<Q", UNMAPPED)) == PAGE_FAULT
    now = guest.registers()
    assert now["r8"] == 8
    assert bool(now["rflags"] & DF) == (first != "fc")
    assert not (first == "0f01ca" and now["rflags"] & AC)
    lost = look_at_ring0().syscall_lost
    assert guest.cpu.counters().get("assist_page_faults", 0) == lost
    by_hand = first not in ("0f1f4000", "")
    assert guest.cpu.counters().get(f"exit_{lib.KVM_EXIT_DEBUG}", 0) == lost * (1 if by_hand else 2)


def test_a_guest_that_steps_itself_has_its_trap(guest: LongMode) -> None:
    step = bytes.fromhex("9c 810c2400010000 9d 90 90 90")  # pushf; orl $TF, (%rsp); popf; nops
    assert ran(guest, step + b"\xf4") == TRAP


def test_the_entry_may_move(guest: LongMode) -> None:
    """WRMSR of LSTAR exits here, and is done; the next SYSCALL goes there."""
    guest.memory.write(ENTRY + 0x100, b"\xb0\x98" + END)
    moves = b"\xb9" + struct.pack("<I", LSTAR) + b"\xb8" + struct.pack("<I", ENTRY + 0x100) + b"\x31\xd2\x0f\x30"
    back = b"\xb9" + struct.pack("<I", CODE + 2) + b"\x41\xbb" + struct.pack("<I", 2 | IF) + b"\x48\x0f\x07"  # SYSRET
    guest.memory.write(ENTRY, moves + back)
    assert ran(guest, b"\x0f\x05\x0f\x05") == 0x98


def test_doctor_has_the_command_line_for_such_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    line = " ".join(option for option, _ in SLOW_HOST_OPTIONS)
    doctor([])
    assert (line in capsys.readouterr().out) == look_at_ring0().emulated
    doctor(["--json"])
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert any(line in each for each in advice) == look_at_ring0().emulated
