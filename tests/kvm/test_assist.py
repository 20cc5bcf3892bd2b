"""Instructions that KVM's emulator lacks, finished by the VMM: against this CPU in ring 3, one by one and at random."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from trivmm._native import ffi
from trivmm.testing.longmode import (
    CODE,
    CR0,
    CR4,
    DATA,
    GENERAL,
    HANDLERS,
    IDT,
    PORT,
    STACK,
    UNMAPPED,
    LongMode,
    long_mode,
)
from trivmm.testing.scripted import IoOut

pytestmark = pytest.mark.kvm

OUT = bytes((0xE6, PORT))
AC, IOPL3, ZF = 1 << 18, 3 << 12, 1 << 6
TRIALS, ALL_TRIALS = 3_000, 100_000
TF = 1 << 8
PAGE_FAULT, PROTECTION, UNDEFINED, NO_MATH, SIMD = 14, 13, 6, 7, 19
PTE_ACCESSED, PTE_DIRTY = 0x20, 0x40


@pytest.fixture(scope="module")
def machine() -> Iterator[LongMode]:
    with long_mode() as guest:
        yield guest


@pytest.fixture
def guest(machine: LongMode) -> LongMode:
    fresh(machine)
    return machine


def fresh(guest: LongMode, **registers: int) -> None:
    guest.enter()
    values = dict.fromkeys(
        ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"], 0
    )
    guest.put_registers(**(values | {"rsp": STACK, "rflags": 2} | registers))


def table_entry(guest: LongMode, address: int) -> int:
    return int.from_bytes(guest.memory.read(0x4000 + (address >> 12) * 8, 8), "little")


# --- one by one ----------------------------------------------------------------------------------------------


def test_stac_and_clac(guest: LongMode) -> None:
    assert guest.finish(bytes.fromhex("0f01cb"))
    assert (guest.registers()["rflags"], guest.registers()["rip"]) == (2 | AC, CODE + 3)
    assert guest.finish(bytes.fromhex("0f01ca"))
    assert guest.registers()["rflags"] == 2


def test_stac_in_ring_3_is_undefined(guest: LongMode) -> None:
    guest.enter(ring=3)
    assert guest.finish(bytes.fromhex("0f01cb"))
    assert guest.injected() == (UNDEFINED, 0)
    assert guest.registers()["rip"] == CODE


def test_a_breakpoint_goes_through_the_guests_idt(guest: LongMode) -> None:
    guest.put_registers(rflags=2 | 0x200)
    assert guest.finish(b"\xcc")
    now = guest.registers()
    assert (now["rip"], now["rflags"], now["rsp"]) == (HANDLERS + 16 * 3, 2, STACK - 40)  # an interrupt gate: IF is off
    frame = struct.unpack("<5Q", guest.memory.read(STACK - 40, 40))
    assert frame == (CODE + 1, 0x08, 2 | 0x200, STACK, 0x10)


def test_a_breakpoint_of_ring_3_takes_the_tasks_stack(guest: LongMode) -> None:
    guest.enter(ring=3)
    guest.put_registers(rsp=0x30000)
    assert guest.finish(b"\xcc")
    assert guest.registers()["rsp"] == STACK - 40
    assert struct.unpack("<5Q", guest.memory.read(STACK - 40, 40)) == (CODE + 1, 0x23, 2, 0x30000, 0x1B)
    assert guest.run() is not None
    assert guest.bus.writes[-1] == IoOut(PORT, 1, b"\x03")  # the handler runs in ring 0


def test_a_breakpoint_without_a_gate(guest: LongMode) -> None:
    guest.enter(idt_limit=0x1F)
    assert guest.finish(b"\xcc")
    assert guest.injected() == (PROTECTION, 3 * 8 + 2)


def test_a_breakpoint_whose_gate_is_not_there(guest: LongMode) -> None:
    kept = guest.memory.read(IDT + 48, 16)
    guest.memory.write(IDT + 48 + 5, b"\x0e")
    try:
        assert guest.finish(b"\xcc")
        assert guest.injected() == (11, 3 * 8 + 2)
    finally:
        guest.memory.write(IDT + 48, kept)


@pytest.mark.parametrize(("held", "equal"), [((1, 2), True), ((1, 3), False)])
def test_cmpxchg16b(guest: LongMode, held: tuple[int, int], equal: bool) -> None:
    guest.memory.write(DATA, struct.pack("<QQ", *held))
    guest.put_registers(rax=1, rdx=2, rbx=5, rcx=6, rdi=DATA)
    assert guest.finish(bytes.fromhex("f0480fc70f"))
    now = guest.registers()
    assert bool(now["rflags"] & ZF) == equal
    assert struct.unpack("<QQ", guest.memory.read(DATA, 16)) == ((5, 6) if equal else held)
    assert (now["rax"], now["rdx"]) == ((1, 2) if equal else held)
    assert table_entry(guest, DATA) & (PTE_ACCESSED | PTE_DIRTY) == PTE_ACCESSED | PTE_DIRTY
    assert guest.memory.regions[0].dirty[0] >> (DATA >> 12) & 1  # a migration hears of it


def test_cmpxchg16b_out_of_line(guest: LongMode) -> None:
    guest.put_registers(rdi=DATA + 8)
    assert guest.finish(bytes.fromhex("480fc70f"))
    assert guest.injected() == (PROTECTION, 0)


@pytest.mark.parametrize(("code", "error"), [("f3480fb807", 0), ("0f11 07", 2)], ids=["popcnt", "movups"])
def test_a_page_that_is_not_there(guest: LongMode, code: str, error: int) -> None:
    guest.put_registers(rdi=UNMAPPED)
    assert guest.finish(bytes.fromhex(code))
    assert guest.injected() == (PAGE_FAULT, error)
    assert guest.system()[-7 + 1 - 2 - 0] is not None
    assert guest.registers()["rip"] == CODE


def test_a_store_over_the_edge_of_what_is_there_changes_nothing(guest: LongMode) -> None:
    guest.memory.write(UNMAPPED - 8, b"\x55" * 8)
    guest.put_registers(rdi=UNMAPPED - 8)
    assert guest.finish(bytes.fromhex("0f1107"))
    assert guest.injected() == (PAGE_FAULT, 2)
    assert guest.memory.read(UNMAPPED - 8, 8) == b"\x55" * 8


def test_user_pages_behind_smap(guest: LongMode) -> None:
    guest.enter(cr4=CR4 | 1 << 21)
    guest.put_registers(rdi=DATA, rflags=2)
    assert guest.finish(bytes.fromhex("f3480fb807"))
    assert guest.injected() == (PAGE_FAULT, 1)
    fresh(guest, rdi=DATA)
    guest.enter(cr4=CR4 | 1 << 21)
    guest.put_registers(rflags=2 | AC)
    assert guest.finish(bytes.fromhex("f3480fb807"))
    assert guest.injected() is None


@pytest.mark.parametrize(
    ("code", "cr0", "cr4", "vector"),
    [
        ("660ffec1", CR0 | 4, CR4, UNDEFINED),  # EM
        ("660ffec1", CR0, CR4 & ~0x200, UNDEFINED),  # OSFXSR
        ("660ffec1", CR0 | 8, CR4, NO_MATH),  # TS
        ("c5f5fec1", CR0, CR4 & ~(1 << 18), UNDEFINED),  # OSXSAVE
        ("480fae27", CR0, CR4 & ~(1 << 18), UNDEFINED),
        ("d9e8", CR0 | 8, CR4, NO_MATH),
        ("9b", CR0 | 8, CR4, NO_MATH),
    ],
)
def test_what_the_control_registers_forbid(guest: LongMode, code: str, cr0: int, cr4: int, vector: int) -> None:
    guest.enter(cr0=cr0, cr4=cr4)
    guest.put_registers(rdi=DATA)
    assert guest.finish(bytes.fromhex(code))
    assert guest.injected() == (vector, 0)


def test_a_misaligned_operand(guest: LongMode) -> None:
    guest.put_registers(rdi=DATA + 8)
    assert guest.finish(bytes.fromhex("660ffe07"))
    assert guest.injected() == (PROTECTION, 0)
    fresh(guest, rdi=DATA + 8)
    assert guest.finish(bytes.fromhex("c5f9fe07"))  # VEX does not mind
    assert guest.injected() is None


def test_an_unmasked_exception_is_the_guests(guest: LongMode) -> None:
    state = guest.xsave()
    struct.pack_into("<I", state, 24, 0x1F80 & ~0x200)  # division by zero unmasked
    state[160:192] = struct.pack("<8f", 1, 1, 1, 1, 0, 1, 1, 1)
    struct.pack_into("<Q", state, 512, 3)
    guest.put_xsave(state)
    assert guest.finish(bytes.fromhex("0f5ec1"))
    assert guest.injected() == (SIMD, 0)
    assert guest.xsave()[160:176] == state[160:176]
    assert guest.xsave()[24] & 4  # the flag tells it which
    struct.pack_into("<I", state, 24, 0x1F80)
    guest.put_xsave(state)


@pytest.mark.parametrize(
    "code", ["0f0b", "f4", "0f01d0", "62f17c4858c1", "0ff7c1", "c4e26990040a", "f0f3480fb8c3", "d927", "8b07"]
)
def test_what_it_refuses(guest: LongMode, code: str) -> None:
    before = guest.registers() | {"rip": CODE}
    refused = guest.assist.refused
    assert not guest.finish(bytes.fromhex(code))
    assert (guest.registers(), guest.injected(), guest.assist.refused) == (before, None, refused + 1)


def test_vzeroall_leaves_mxcsr(guest: LongMode) -> None:
    state = guest.xsave()
    struct.pack_into("<I", state, 24, 0x9FC0)
    struct.pack_into("<Q", state, 512, 7)
    guest.put_xsave(state)
    assert guest.finish(bytes.fromhex("c5fc77"))
    assert struct.unpack_from("<I", guest.xsave(), 24) == (0x9FC0,)


def test_x87_remembers_the_guests_addresses(guest: LongMode) -> None:
    guest.put_registers(rdi=DATA)
    assert guest.finish(bytes.fromhex("d907"))  # fld dword [rdi]
    assert struct.unpack_from("<QQ", guest.xsave(), 8) in ((CODE, DATA), (0, 0))  # some CPUs tell it with an error only


@pytest.mark.parametrize(("control", "done"), [(0x37F, True), (0x37B, False)])
def test_without_ne_it_does_x87_that_cannot_err(guest: LongMode, control: int, done: bool) -> None:
    """Memtest86+ leaves CR0.NE clear, as a PC starts; only an error that is not masked would go to IRQ 13 then."""
    kept = guest.xsave()
    state = bytearray(kept)
    struct.pack_into("<HHH", state, 0, control, 0, 0)
    struct.pack_into("<Q", state, 512, 3)
    guest.put_xsave(state)
    guest.enter(cr0=CR0 & ~0x20)
    assert guest.finish(bytes.fromhex("d9ee")) is done  # fldz
    assert guest.injected() is None
    guest.put_xsave(kept)


BURST = bytes.fromhex("660ffec1") * 40  # paddd xmm0, xmm1


def test_some_more_of_the_same_sort_are_done_at_once(guest: LongMode) -> None:
    state = guest.xsave()
    state[160:192] = struct.pack("<8I", 0, 0, 0, 0, 1, 2, 3, 4)
    struct.pack_into("<Q", state, 512, 3)
    guest.put_xsave(state)
    assert guest.finish(BURST + bytes.fromhex("90"))
    assert guest.registers()["rip"] == CODE + len(BURST)  # NOP is KVM's
    assert struct.unpack_from("<4I", guest.xsave(), 160) == (40, 80, 120, 160)


def test_a_fault_in_the_middle_of_some_more(guest: LongMode) -> None:
    """What came before it has been, and nothing of it: neither memory nor registers."""
    state = guest.xsave()
    state[160:192] = struct.pack("<8I", 0, 0, 0, 0, 1, 2, 3, 4)
    struct.pack_into("<Q", state, 512, 3)
    guest.put_xsave(state)
    guest.put_registers(rdi=UNMAPPED)
    assert guest.finish(BURST + bytes.fromhex("660ffe07") + BURST)
    assert guest.injected() == (PAGE_FAULT, 0)
    assert guest.registers()["rip"] == CODE + len(BURST)
    assert struct.unpack_from("<4I", guest.xsave(), 160) == (40, 80, 120, 160)


def test_a_traced_guest_is_told_of_every_instruction(guest: LongMode) -> None:
    guest.put_registers(rflags=2 | TF)
    assert guest.finish(BURST)
    assert guest.registers()["rip"] == CODE + 4


def test_a_burst_ends(guest: LongMode) -> None:
    """A page of nothing else is no way to keep the VMM from its kicks."""
    guest.memory.write(CODE, BURST * 60)
    assert guest.finish(BURST[:4])
    assert guest.registers()["rip"] == CODE + 4 * 1024


def test_code_behind_a_hole(guest: LongMode) -> None:
    assert not guest.finish(bytes.fromhex("f348"), UNMAPPED - 2)  # the rest of it is not there
    assert guest.registers()["rip"] == UNMAPPED - 2


@pytest.mark.parametrize("address", [0xFFFF_FFFF_FFFF_FFF8, 0x7FFF_FFFF_FFFF, 0x8000_0000_0000, 3 << 20])
def test_addresses_that_lead_nowhere(guest: LongMode, address: int) -> None:
    guest.put_registers(rdi=address, rsp=address)
    for code in ("f3480fb807", "0f1107", "480fc70f", "480fae27", "cc"):
        guest.finish(bytes.fromhex(code))
        fresh(guest, rdi=address, rsp=address)


def test_page_tables_that_lead_outside_ram_and_to_themselves(guest: LongMode) -> None:
    kept = guest.memory.read(0x4000 + (DATA >> 12) * 8, 8)
    for entry in (0x000F_FFFF_FFFF_F007, 0x4007, 0x1007, (1 << 63) | 7, 0xFFFF_FFFF_FFFF_FFFF):
        guest.memory.write(0x4000 + (DATA >> 12) * 8, struct.pack("<Q", entry))
        fresh(guest, rdi=DATA)
        guest.finish(bytes.fromhex("f3480fb807"))
    guest.memory.write(0x4000 + (DATA >> 12) * 8, kept)


# --- against this CPU, in ring 3 -----------------------------------------------------------------------------

PREFIXES = (b"", b"\x66", b"\xf3", b"\xf2")
X87_OPCODES = tuple(range(0xD8, 0xE0))


def some_instruction(dice: random.Random) -> bytes:
    """Any that has the shape of one that the assist may take; memory operands are [rdi + a few]."""
    modrm = dice.randrange(256)
    if dice.random() < 0.5:
        modrm = 0x40 | (modrm & 0x38) | 7
        tail = bytes((modrm, dice.choice((0, 16, 32, 1, 8, 240))))
    else:
        tail = bytes((modrm | 0xC0,))
    kind = dice.random()
    if kind < 0.1:
        return bytes((dice.choice(X87_OPCODES),)) + tail
    opcode = dice.choice([*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x80), 0xB8, 0xBC, 0xBD, 0xC2, 0xC3,
                          0xC4, 0xC5, 0xC6, *range(0xD0, 0xFF)])  # fmt: skip
    space = dice.choice((1, 1, 2, 3))
    if space == 2:
        opcode = dice.choice(
            [*range(0x60), *range(0x78, 0x7A), *range(0x96, 0xC0), *range(0xC8, 0xE0), *range(0xF0, 0xF8)]
        )
    elif space == 3:
        opcode = dice.choice([*range(0x23), *range(0x38, 0x4D), *range(0x60, 0x64), 0xCC, 0xCE, 0xCF, 0xDF, 0xF0])
    immediate = bytes((dice.randrange(256),))
    if kind < 0.6:
        rex = bytes((0x40 | dice.choice((0, 8, 4, 13)),)) if dice.random() < 0.5 else b""
        if tail[0] < 0xC0:
            rex = bytes(byte & 0xFE for byte in rex)
        start = {1: b"", 2: b"\x38", 3: b"\x3a"}[space]
        return dice.choice(PREFIXES) + rex + b"\x0f" + start + bytes((opcode,)) + tail + immediate
    first = 0xE0 | space
    if tail[0] >= 0xC0 and dice.random() < 0.5:
        first ^= dice.choice((0x80, 0x20, 0xA0))
    second = dice.randrange(256) & 0x7F | dice.choice((0, 0x80))
    return bytes((0xC4, first, second, opcode)) + tail + immediate


def some_state(dice: random.Random, state: bytearray) -> None:
    """Floats that are often ordinary ones."""
    struct.pack_into("<H", state, 0, 0x37F if dice.random() < 0.8 else 0x37F & ~(1 << dice.randrange(6)))
    state[2:24] = bytes(22)
    struct.pack_into("<I", state, 24, 0x1F80 if dice.random() < 0.8 else 0x1F80 & ~(1 << dice.randrange(7, 13)))
    state[32:160] = bytes(128)
    if dice.random() < 0.5:
        numbers = [struct.pack(dice.choice(("<f4x", "<d")), dice.uniform(-100, 100)) for _ in range(64)]
        values = b"".join(numbers)
    else:
        values = dice.randbytes(512)
    state[160:416] = values[:256]
    state[576:832] = values[256:512]
    struct.pack_into("<Q", state, 512, 7)


def seen_of(state: bytes) -> tuple[bytes, bytes, bytes]:
    """What may be compared: x87 remembers where an instruction lay."""
    return bytes(state[0:5]), bytes(state[24:28] + state[32:416]), bytes(state[576:832])


Outcomes = tuple[object, ...]


def try_one(
    guest: LongMode, code: bytes, registers: dict[str, int], state: bytes, data: bytes, native: bool
) -> Outcomes:
    fresh(guest, **registers)
    guest.put_xsave(state)
    guest.memory.write(DATA, data)
    if native:
        guest.enter(ring=3)
        guest.put_registers(rip=CODE, rflags=registers["rflags"] | IOPL3)
        guest.memory.write(CODE, code + OUT * 8)
        guest.run()
        written = guest.bus.writes[-1]
        assert isinstance(written, IoOut)
        if guest.system()[2] & 3 == 0:  # in a handler: AL is its vector
            return "fault", written.data[0]
    else:
        guest.put_registers(rflags=registers["rflags"] | TF)  # one instruction only
        if not guest.finish(code + OUT * 8):
            return ("refused",)
        if (fault := guest.injected()) is not None:
            return "fault", fault[0]
    now = guest.registers()
    flags = now["rflags"] & 0x8D5
    general = tuple(value for name, value in now.items() if name not in ("rip", "rflags", "rsp"))
    return (general, flags, *seen_of(guest.xsave()), guest.memory.read(DATA, 512))


def compare(guest: LongMode, seed: int, trials: int) -> dict[str, int]:
    dice = random.Random(seed)
    state = guest.xsave()
    counts = dict.fromkeys(("equal", "fault", "refused", "not the CPU's word"), 0)
    for trial in range(trials):
        code = some_instruction(dice)
        some_state(dice, state)
        registers = {name: dice.getrandbits(64) for name in GENERAL if name != "rsp"}
        registers |= {"rdi": DATA + 16, "rflags": 2}
        data = dice.randbytes(512)
        ours = try_one(guest, code, registers, state, data, native=False)
        if ours == ("refused",):
            counts["refused"] += 1
            continue
        length = int(guest.assist.insn.length)
        theirs = try_one(guest, code[:length], registers, state, data, native=True)
        if ours[0] == "fault" and theirs != ours:
            # This KVM looks at faults of ring 3 with its emulator, which takes 66 0f e7 f8, and calls a misaligned
            # HADDPS undefined. Ours come from the CPU.
            counts["not the CPU's word"] += 1
            continue
        assert ours == theirs, f"seed {seed} trial {trial}: {code[:length].hex(' ')}"
        counts["fault" if ours[0] == "fault" else "equal"] += 1
    return counts


def test_random_instructions_do_what_this_cpu_does(guest: LongMode) -> None:
    counts = compare(guest, 1, TRIALS)
    assert min(counts["equal"], counts["fault"]) > TRIALS // 20, counts
    assert counts["not the CPU's word"] < TRIALS // 20, counts


@pytest.mark.slow
def test_many_random_instructions_do_what_this_cpu_does(guest: LongMode) -> None:
    counts = compare(guest, 2, ALL_TRIALS)
    assert counts["not the CPU's word"] < ALL_TRIALS // 20, counts


# --- in the run loop -----------------------------------------------------------------------------------------


def test_the_guest_goes_on(guest: LongMode) -> None:
    """Ring 0, where this KVM may lack them and another has them: the guest can't tell."""
    guest.memory.write(CODE, bytes.fromhex("0f01cb 0f01ca f3480fb8c0 660ffec1 9b") + OUT)
    guest.put_registers(rip=CODE, rax=0xFF00FF)
    guest.run()
    assert guest.bus.writes[-1] == IoOut(PORT, 1, b"\x10")
    assert guest.registers()["rip"] in (CODE + 18, CODE + 16)
    assert ffi.sizeof("struct kvm_regs") == 18 * 8
