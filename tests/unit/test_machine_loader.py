"""The PVH loader: ELF parsing against pyelftools, boot data, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm.boot import elf as elf_module
from trivmm.boot.elf import UserFile, parse_kernel
from trivmm.boot.memory_map import memory_map
from trivmm.boot.pvh import load_payload
from trivmm.config import PayloadConfig
from trivmm.errors import ConfigError
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory

MIB = 1 << 20
CODE = bytes(range(256)) * 20
ENTRY = MIB + 0x10


def note(entry: int = ENTRY, *, name: bytes = b"Xen\0", kind: int = 18, align: int = 4, size: int = 4) -> bytes:
    head = struct.pack("<III", len(name), size, kind) + name
    head += bytes(-len(head) % align)
    body = entry.to_bytes(size, "little")
    return head + body + bytes(-size % align)


def elf(
    *,
    wide: bool = True,
    notes: bytes | None = None,
    align: int = 4,
    gpa: int = MIB,
    code: bytes = CODE,
    memsz: int | None = None,
    machine: int = 62,
    phnum: int | None = None,
) -> bytes:
    notes = note() if notes is None else notes
    memsz = len(code) + 0x3000 if memsz is None else memsz
    head, entry_size = (64, 56) if wide else (52, 32)
    start = head + 2 * entry_size
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    count = 2 if phnum is None else phnum
    if wide:
        header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, head, 0, 0, 64, entry_size, count, 0, 0, 0)
        table = struct.pack("<IIQQQQQQ", 1, 7, start, gpa, gpa, len(code), memsz, 4096)
        table += struct.pack("<IIQQQQQQ", 4, 4, start + len(code), 0, 0, len(notes), len(notes), align)
    else:
        header = struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0, head, 0, 0, 52, entry_size, count, 0, 0, 0)
        table = struct.pack("<IIIIIIII", 1, start, gpa, gpa, len(code), memsz, 7, 4096)
        table += struct.pack("<IIIIIIII", 4, start + len(code), 0, 0, len(notes), len(notes), 4, align)
    return ident + header + table + code + notes


def elf_of(*headers: tuple[int, int, int, int, int], body: bytes) -> bytes:
    """64 bits, of any program headers: (type, offset into ``body``, gpa, filesz, memsz) each."""
    start = 64 + 56 * len(headers)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0)
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, 7, start + offset, gpa, gpa, filesz, memsz, 4)
        for kind, offset, gpa, filesz, memsz in headers
    )
    return b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + header + table + body


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(layout.ram_ranges(16 * MIB))
    yield made
    made.close()


def load(memory: GuestMemory, path: Path, image: bytes, **more: str) -> tuple[int, int]:
    path.write_bytes(image)
    boot = load_payload(memory, PayloadConfig(kernel=str(path), **more))
    return boot.entry_gpa, boot.start_info_gpa


@pytest.mark.parametrize("wide", [True, False])
def test_a_kernel_lands_where_it_belongs(memory: GuestMemory, tmp_path: Path, wide: bool) -> None:
    memory.write(MIB + len(CODE), b"\xee" * 0x3000)  # an earlier boot's
    assert load(memory, tmp_path / "k", elf(wide=wide), cmdline="console=ttyS0") == (ENTRY, 0x6000)
    assert memory.read(MIB, len(CODE)) == CODE
    assert memory.read(MIB + len(CODE), 0x3000) == bytes(0x3000)
    assert memory.read(0x20000, 14) == b"console=ttyS0\0"
    info = struct.unpack("<IIIIQQQQII", memory.read(0x6000, 56))
    assert info == (0x336EC578, 1, 0, 0, 0, 0x20000, 0xA0000, 0x7000, 3, 0)
    assert memory.read(0xA0000, 8) == b"RSD PTR "
    assert struct.unpack("<QQII", memory.read(0x7000, 24)) == (0, 0xA0000, 1, 0)
    assert struct.unpack("<QQII", memory.read(0x7018, 24)) == (MIB, 15 * MIB, 1, 0)


@pytest.mark.parametrize("wide", [True, False])
def test_against_pyelftools(tmp_path: Path, wide: bool) -> None:
    image = elf(wide=wide, machine=62 if wide else 3)
    (tmp_path / "k").write_bytes(image)
    with UserFile("payload.kernel", str(tmp_path / "k")) as file:
        mine = parse_kernel(file)
    theirs = [each.header for each in ELFFile(io.BytesIO(image)).iter_segments() if each.header.p_type == "PT_LOAD"]
    assert [(each.offset, each.gpa, each.filesz, each.memsz) for each in mine.segments] == [
        (each.p_offset, each.p_paddr, each.p_filesz, each.p_memsz) for each in theirs
    ]


@pytest.mark.parametrize(
    ("notes", "align"),
    [
        (note(name=b"GNU\0", kind=3, size=20) + note(), 4),
        (note(align=8), 8),
        (note(name=b"GNU\0", kind=5, align=8, size=16) + note(align=8, size=8), 8),
        (note(name=b"Linux\0", kind=18) + note(size=8), 4),
        (note(name=b"Linux\0", kind=18) + note(), 8),  # p_align is another section's
    ],
)
def test_notes(memory: GuestMemory, tmp_path: Path, notes: bytes, align: int) -> None:
    assert load(memory, tmp_path / "k", elf(notes=notes, align=align))[0] == ENTRY


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"", "not an ELF"),
        (b"MZ" * 100, "not an ELF"),
        (elf()[:40], "not an ELF"),
        (elf()[:100], "truncated"),
        (elf()[:1000], "truncated"),
        (elf()[:-4], "truncated"),
        (elf(machine=183), "another machine"),
        (elf(notes=b""), "no PVH"),
        (elf(notes=note(kind=17)), "no PVH"),
        (elf(notes=note(size=8, entry=1 << 40)), "no PVH"),
        (elf(notes=b"\xff" * 64), "no PVH"),
        (elf(notes=note(2 * MIB)), "none of its segments"),
        (elf(memsz=10), "truncated"),
        (elf(memsz=16 * MIB), "outside the guest's RAM"),
        (elf(memsz=(1 << 64) - 1), "outside the guest's RAM"),
        (elf(gpa=0x5000, notes=note(0x5000)), "overwrite the start info"),
        (elf(gpa=0x1F000, notes=note(0x1F000)), "overwrite the command line"),
        (elf(phnum=0), "program headers"),
        (elf(phnum=0xFFFF), "program headers"),
        (elf(code=b"", memsz=0), "nothing to load"),
    ],
)
def test_bad_kernels(memory: GuestMemory, tmp_path: Path, image: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load(memory, tmp_path / "k", image)
    assert caught.value.field == "payload.kernel"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [MIB // 2, (1 << 16) // 127 + 4])
def test_many_notes_cost_no_more_than_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Segments that overlap are each walked, twice: what is counted is the bytes that a walk gets."""
    seen: list[int] = []
    monkeypatch.setattr(elf_module, "_find_entry", lambda notes, align: seen.append(len(notes)))
    notes = note(kind=17) * (MIB // 20)
    image = elf_of((1, 0, MIB, 4096, 4096), *[(4, 0, 0, size, size)] * 127, body=notes)
    (tmp_path / "k").write_bytes(image)
    with UserFile("payload.kernel", str(tmp_path / "k")) as file:
        with pytest.raises(ConfigError, match=r"its note segments have .* bytes, more than 65536"):
            parse_kernel(file)
    assert sum(seen) == 0


def test_as_many_notes_as_may_be(memory: GuestMemory, tmp_path: Path) -> None:
    filler = note(name=b"GNU\0", kind=3, size=20)
    notes = filler * (((1 << 16) - len(note())) // len(filler)) + note()
    assert len(notes) > (1 << 16) - len(filler)
    assert load(memory, tmp_path / "k", elf(notes=notes))[0] == ENTRY


def test_segments_that_overlap_are_refused_before_anything_is_written(memory: GuestMemory, tmp_path: Path) -> None:
    """Else a small file fills the RAM 127 times."""
    rest = [(1, 0, MIB + 4096 * turn, 4096, 8 * MIB) for turn in range(127)]
    with pytest.raises(ConfigError, match="its segments at 0x100000 and 0x101000 overlap"):
        load(memory, tmp_path / "k", elf_of(*rest, (4, 0, 0, 20, 20), body=note() + bytes(8192)))


def test_zeroing_a_large_segment_can_be_ended(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(elf(memsz=12 * MIB))
    calls = []
    load_payload(memory, PayloadConfig(kernel=str(tmp_path / "k")), 1, lambda: calls.append(1))
    assert len(calls) >= 4  # 12 MiB, 4 at a time, and the file


def test_bad_paths(memory: GuestMemory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "fifo", "a\0b"):
        with pytest.raises(ConfigError, match="kernel"):
            load_payload(memory, PayloadConfig(kernel=str(path)))


def test_initramfs(memory: GuestMemory, tmp_path: Path) -> None:
    archive = tmp_path / "initrd"
    archive.write_bytes(b"cpio" * 1500)
    load(memory, tmp_path / "k", elf(), initramfs=str(archive))
    gpa = (16 * MIB - 6000) & ~0xFFF
    info = struct.unpack("<IIIIQQQQII", memory.read(0x6000, 56))
    assert info[3:5] == (1, 0x6040)
    assert struct.unpack("<QQQQ", memory.read(0x6040, 32)) == (gpa, 6000, 0, 0)
    assert memory.read(gpa, 6000) == b"cpio" * 1500
    for size in (0, 15 * MIB - 1000, 17 * MIB):
        with archive.open("wb") as file:
            file.truncate(size)
        with pytest.raises(ConfigError) as caught:
            load(memory, tmp_path / "k", elf(), initramfs=str(archive))
        assert caught.value.field == "payload.initramfs"
    with pytest.raises(ConfigError, match="initramfs"):
        load(memory, tmp_path / "k", elf(), initramfs=str(tmp_path))


@pytest.mark.parametrize("cmdline", ["x" * 0x10000, "a\0b"])
def test_bad_cmdline(memory: GuestMemory, tmp_path: Path, cmdline: str) -> None:
    with pytest.raises(ConfigError, match="cmdline"):
        load(memory, tmp_path / "k", elf(), cmdline=cmdline)
    load(memory, tmp_path / "k", elf(), cmdline="x" * 0xFFFF)


def test_memory_map_above_4_gib() -> None:
    assert memory_map(layout.ram_ranges(5 << 30)) == (
        (0, 0xA0000, 1),
        (MIB, (3 << 30) - MIB, 1),
        (4 << 30, 2 << 30, 1),
        (0xE8000000, 256 * MIB, 2),
    )


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 180), st.integers(0, 255)), max_size=12),
    st.binary(max_size=80),
    st.integers(0, 6000),
)
def test_mutated_images_only_raise_config_errors(
    memory: GuestMemory, tmp_path: Path, wide: bool, changes: list[tuple[int, int]], notes: bytes, cut: int
) -> None:
    image = bytearray(elf(wide=wide, notes=notes + note()))
    for position, value in changes:
        image[position] = value
    with suppress(ConfigError):
        load(memory, tmp_path / "k", bytes(image[: len(image) - cut if cut < 3000 else None]))
