"""bzImages: every packing is taken out, and every way in which such a file can lie is one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lz4.block
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.boot import bzimage
from trivmm.boot import payload as payloads
from trivmm.boot.bzimage import open_kernel
from trivmm.boot.elf import UserFile, parse_kernel
from trivmm.boot.pvh import check_payload, load_payload
from trivmm.config import PayloadConfig
from trivmm.errors import ConfigError
from trivmm.guest import probe_path
from trivmm.hypervisor.base import LongModeEntry
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory
from trivmm.testing.kernels import PACKINGS, make_bzimage, with_own_entry, wrap

MIB = 1 << 20
ELF = probe_path().read_bytes()
SIZED = struct.pack("<I", MIB)
ZEROS = bytes(24 * MIB)  # packs to almost nothing


@pytest.fixture
def nothing_stays_open() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def refused(folder: Path, image: bytes) -> ConfigError:
    path = folder / "vmlinuz"
    path.write_bytes(image)
    with pytest.raises(ConfigError) as caught:
        check_payload(PayloadConfig(str(path)))
    assert caught.value.field == "payload.kernel"
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    return caught.value


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_is_packed_boots_as_if_it_were_not(tmp_path: Path, packing: str) -> None:
    plain, packed = tmp_path / "vmlinux", tmp_path / "vmlinuz"
    plain.write_bytes(ELF)
    packed.write_bytes(make_bzimage(ELF + b"relocations may follow", packing))
    loaded = []
    for path in (plain, packed):
        check_payload(PayloadConfig(str(path)))
        memory = GuestMemory(layout.ram_ranges(16 * MIB))
        entry = load_payload(memory, PayloadConfig(str(path)))
        loaded.append((entry, memory.read(0, 16 * MIB)))
        memory.close()
    assert loaded[0] == loaded[1]


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_vmlinux_of_many_pieces(tmp_path: Path, packing: str) -> None:
    """Also one that is longer packed than a decoder is given at a time, and than an lz4 block."""
    noise = os.urandom(1 * MIB)
    vmlinux = ELF + ZEROS + noise
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(vmlinux, packing))
    pieces = 0

    def checkpoint() -> None:
        nonlocal pieces
        pieces += 1

    with open_kernel(str(path), checkpoint=checkpoint) as file:
        assert file.size == len(vmlinux)
        assert file.read(0, len(ELF)) == ELF
        assert file.read(len(vmlinux) - MIB, MIB) == noise
        assert parse_kernel(file).segments
    assert pieces > 3


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_a_checkpoint_raises_ends_the_work(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(ELF + ZEROS, packing))

    def checkpoint() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        open_kernel(str(path), checkpoint=checkpoint)


def test_no_setup_sectors_means_four(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(wrap(PACKINGS["gzip"](ELF), setup_sectors=0))
    check_payload(PayloadConfig(str(path)))


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("packing", PACKINGS)
def test_lies_about_lengths(tmp_path: Path, packing: str) -> None:
    payload = PACKINGS[packing](ELF)
    size = len(ELF)

    def saying(size: int) -> bytes:
        return wrap(payload[:-4] + struct.pack("<I", size))

    gzip = packing == "gzip"  # its own check of the size is the one that fails
    assert ("damaged" if gzip else "unpacks to less") in str(refused(tmp_path, saying(size + 1)))
    assert ("damaged" if gzip else "unpacks to more") in str(refused(tmp_path, saying(size - 1)))
    assert "0 bytes unpacked" in str(refused(tmp_path, saying(0)))
    assert f"{bzimage.MAX_VMLINUX + 1} bytes unpacked" in str(refused(tmp_path, saying(bzimage.MAX_VMLINUX + 1)))
    assert "truncated" in str(refused(tmp_path, wrap(payload, length=0xFFFFFFFF)))
    assert "truncated" in str(refused(tmp_path, wrap(payload, length=8)))
    assert "truncated" in str(refused(tmp_path, wrap(payload)[: -len(payload) // 2]))
    short = payload[: len(payload) // 2] + struct.pack("<I", size)
    assert "damaged" in str(refused(tmp_path, wrap(short)))


@pytest.mark.usefixtures("nothing_stays_open")
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_bomb_is_given_up_where_it_says_more_than_it_said(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []

    def counted(made: Callable[..., Iterator[bytes]]) -> Callable[..., Iterator[bytes]]:
        def decode(payload: object) -> Iterator[bytes]:
            for piece in made(payload):
                pieces.append(len(piece))
                yield piece

        return decode

    monkeypatch.setattr(
        bzimage, "DECODERS", tuple((magic, name, made and counted(made)) for magic, name, made in bzimage.DECODERS)
    )
    payload = PACKINGS[packing](ZEROS)[:-4] + struct.pack("<I", MIB)
    assert "unpacks to more than the 1048576 bytes" in str(refused(tmp_path, wrap(payload)))
    assert max(pieces) <= (bzimage.LZ4_BLOCK if packing == "lz4" else bzimage.CHUNK)
    assert sum(pieces) <= MIB + max(pieces)


def test_packings_that_want_too_much_memory(tmp_path: Path) -> None:
    lzma = b"\x5d" + struct.pack("<Iq", 1 << 30, -1) + bytes(64) + SIZED
    assert "damaged: its vmlinux cannot be unpacked (lzma: Memory" in str(refused(tmp_path, wrap(lzma)))
    zstd = b"\x28\xb5\x2f\xfd" + bytes([0, (28 - 10) << 3]) + bytes(64) + SIZED
    assert "(zstd: zstd decompress error: Frame requires too much memory" in str(refused(tmp_path, wrap(zstd)))


@pytest.mark.parametrize(
    ("image", "problem", "remedy"),
    [
        (wrap(b"\x89LZO\0\r\n\x1a\n" + bytes(100)), "packed by lzo, which is not unpacked here", "extract-vmlinux"),
        (wrap(b"what is this?" + bytes(100)), "packed by something unknown (7768617420697320)", "extract-vmlinux"),
        (wrap(PACKINGS["gzip"](ELF), version=0x0207), "boot protocol 2.07 doesn't say", "newer kernel"),
        (wrap(PACKINGS["gzip"](ELF))[:0x240], "truncated: its setup header", "CONFIG_PVH"),
        (make_bzimage(b"no kernel" * 100, "xz"), "in its vmlinux: not an ELF file", "CONFIG_PVH"),
        (make_bzimage(ELF[:300], "zstd"), "in its vmlinux: truncated", "CONFIG_PVH"),
        (
            make_bzimage(ELF.replace(b"Xen\0", b"xen\0"), "lz4"),
            "in its vmlinux: it has no PVH entry note",
            "CONFIG_PVH",
        ),
        (make_bzimage(make_bzimage(ELF, "xz"), "xz"), "in its vmlinux: not an ELF file", "CONFIG_PVH"),
        (b"MZ\0\0zimg" + bytes(600), "an EFI zboot image", "CONFIG_PVH"),
        (b"MZ" + bytes(0x36) + b"ARM\x64" + bytes(600), "an arm64 kernel", "CONFIG_PVH"),
        (bytes(0x24) + struct.pack("<I", 0x016F2818) + bytes(600), "an arm kernel", "CONFIG_PVH"),
        (b"MZ" + bytes(0x36) + b"RSC\x05" + bytes(600), "a RISC-V kernel", "CONFIG_PVH"),
        (bytes.fromhex("27051956") + bytes(600), "a U-Boot image", "CONFIG_PVH"),
        (b"MZ" + bytes(600), "an EFI program", "objcopy"),
        (PACKINGS["gzip"](ELF), "not an ELF file but a gzip file", "gunzip"),
        (PACKINGS["xz"](ELF), "not an ELF file but an xz file", "unxz"),
        (PACKINGS["zstd"](ELF), "not an ELF file but a zstd file", "unzstd"),
        (bytes(600), "not an ELF file and not a bzImage", "CONFIG_PVH"),
        (b"\x7fELF", "not an ELF file", "CONFIG_PVH"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("nothing_stays_open")
def test_other_files_are_named(tmp_path: Path, image: bytes, problem: str, remedy: str) -> None:
    error = refused(tmp_path, image)
    assert problem in error.problem
    assert remedy in error.remedy


SMALL = {packing: make_bzimage(ELF[:2000], packing) for packing in PACKINGS}


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(PACKINGS)),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=6),
    st.integers(0, 6000),
)
def test_whatever_is_changed_is_a_config_error(
    tmp_path: Path, packing: str, changes: list[tuple[int, int]], cut: int
) -> None:
    image = bytearray(SMALL[packing])
    for position, value in changes:
        image[position % len(image)] = value
    path = tmp_path / "vmlinuz"
    path.write_bytes(image[: cut if cut > 3000 else None])
    with suppress(ConfigError):
        check_payload(PayloadConfig(str(path)))


def test_a_file_that_stands_for_another_is_closed_with_it(tmp_path: Path) -> None:
    fd = os.memfd_create("x")
    with UserFile("payload.kernel", "name", fd=fd, part="inside: ") as file:
        assert str(file.error("bad", "mend")) == 'payload.kernel = "name": inside: bad; mend'
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# --- the lz4 block decoder, against liblz4 ------------------------------------------------------------------------


def unpack_block(packed: bytes, room: int) -> bytes | None:
    """Between two guards of 64 bytes, which must stay as they are."""
    buffer = ffi.new("uint8_t[]", b"\xa5" * (room + 128))
    made = lib.tv_lz4_block(packed, len(packed), buffer + 64, room)
    whole = bytes(ffi.buffer(buffer, room + 128))
    assert whole[:64] == whole[64 + room :] == b"\xa5" * 64
    return None if made < 0 else whole[64 : 64 + made]


texts = st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 300)), max_size=20).map(
    lambda parts: b"".join(part * count for part, count in parts)
)


@given(texts)
def test_lz4_blocks_unpack_as_liblz4_packed_them(text: bytes) -> None:
    packed = lz4.block.compress(text, store_size=False)
    assert unpack_block(packed, len(text)) == text
    assert unpack_block(packed, len(text) + 100) == text
    if text:
        assert unpack_block(packed, len(text) - 1) is None


class Refused(Exception):
    pass


def decode(packed: bytes, room: int) -> tuple[bytes, bool]:
    """The block format as its specification tells it, a byte at a time: what it unpacks to, and whether it keeps to
    the rules for the last match, which are for encoders. :raises Refused: says why."""
    made, at, kept = bytearray(), 0, True

    def take(count: int, what: str) -> bytes:
        nonlocal at
        at += count
        if at > len(packed):
            raise Refused(what)
        return packed[at - count : at]

    def length(nibble: int) -> int:
        more = 255 if nibble == 15 else 0
        while more == 255:
            nibble += (more := take(1, "a length without an end")[0])
        return nibble

    start = end = None
    while True:
        token = take(1, "ends with a match")[0]
        made += take(length(token >> 4), "literals that are not there")
        if len(made) > room:
            raise Refused("too long")
        if at == len(packed):
            kept = end is None or start is None or (len(made) - end >= 5 and len(made) - start >= 12)
            return bytes(made), kept
        offset = int.from_bytes(take(2, "half an offset"), "little")
        count = length(token & 15) + 4
        if not offset:
            raise Refused("offset 0")
        if offset > len(made):
            raise Refused("before the start")
        if len(made) + count > room:
            raise Refused("too long")
        start = len(made)
        for _ in range(count):
            made.append(made[-offset])
        end = len(made)


@settings(max_examples=500)
@given(texts, st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=5), st.integers(0, 4000))
@example(b"abcd" * 20, [(5, 0), (6, 0)], 100)
def test_broken_lz4_blocks_unpack_as_the_specification_says(
    text: bytes, changes: list[tuple[int, int]], room: int
) -> None:
    packed = bytearray(lz4.block.compress(text, store_size=False))
    for position, value in changes:
        packed[position % len(packed)] = value
    for data in (bytes(packed), bytes(packed[: len(packed) // 2])):
        mine = unpack_block(data, room)
        expected, kept, why = None, True, ""
        try:
            expected, kept = decode(data, room)
        except Refused as error:
            why = str(error)
        assert mine == expected, why
        theirs: bytes | None = None
        with suppress(lz4.block.LZ4BlockError):
            theirs = lz4.block.decompress(data, uncompressed_size=room)
        if theirs is not None and mine is None:
            assert why == "offset 0", "liblz4 takes that, which the format forbids, and nothing else besides"
        elif theirs is None and mine is not None:
            assert not kept or not room, "liblz4 holds blocks to the rules for encoders, as far as it looks"
        else:
            assert mine == theirs


@given(st.binary(max_size=300), st.integers(0, 600))
def test_any_bytes_as_an_lz4_block_stay_inside(data: bytes, room: int) -> None:
    made = unpack_block(data, room)
    assert made is None or len(made) <= room


@pytest.mark.parametrize(
    ("packed", "room", "text"),
    [
        (b"", 10, None),
        (b"\0", 10, b""),
        (b"\x10", 10, None),  # a literal that is not there
        (b"\x10a", 0, None),
        (b"\x10a", 1, b"a"),
        (b"\x10a\0", 10, None),  # half an offset
        (b"\x10a\0\0\0", 10, None),  # offset 0
        (b"\x10a\x02\0\0", 10, None),  # before the start
        (b"\x10a\x01\0", 10, None),  # ends with a match
        (b"\x10a\x01\0\x00", 10, b"aaaaa"),
        (b"\x1fa\x01\0\xff\xff\x00\x00", 1000, b"a" * (1 + 4 + 15 + 510)),
        (b"\x1fa\x01\0\xff\xff", 1000, None),  # a length without an end
        (b"\xf0" + b"\xff" * 20, 10000, None),
    ],
)
def test_lz4_by_hand(packed: bytes, room: int, text: bytes | None) -> None:
    assert unpack_block(packed, room) == text


def own_entry(folder: Path, image: bytes, **more: object) -> tuple[LongModeEntry, GuestMemory]:
    path = folder / "vmlinuz"
    path.write_bytes(image)
    payload = PayloadConfig(str(path), **more)  # type: ignore[arg-type]
    payloads.check_payload(payload)
    memory = GuestMemory(layout.ram_ranges(16 * MIB))
    entry = payloads.load_payload(memory, payload)
    assert isinstance(entry, LongModeEntry)
    return entry, memory


def test_what_has_no_pvh_entry_begins_at_its_own(tmp_path: Path) -> None:
    """Nothing in it, something packed that we can't unpack, or a vmlinux without the note."""
    images = [with_own_entry(b"\xf4" * 0x300)]
    for payload in (b"\x89LZO\0\r\n\x1a\n" + bytes(0x300), PACKINGS["gzip"](ELF.replace(b"Xen\0", b"Xon\0"))):
        image = bytearray(with_own_entry(payload))
        struct.pack_into("<II", image, 0x248, 0, len(payload))
        images.append(bytes(image))
    for image in images:
        entry, memory = own_entry(tmp_path, image)
        assert entry == LongModeEntry(MIB + 0x200, layout.ZERO_PAGE, layout.PAGE_TABLES, layout.BOOT_GDT)
        memory.close()


def test_the_zero_page(tmp_path: Path) -> None:
    (tmp_path / "initramfs").write_bytes(b"x" * 5000)
    image = with_own_entry(b"\xf4" * 0x300, initrd_max=8 * MIB - 1)
    entry, memory = own_entry(tmp_path, image, cmdline="quiet", initramfs=str(tmp_path / "initramfs"))
    page = memory.read(entry.zero_page_gpa, 4096)
    assert page[0x1F1:0x210] == image[0x1F1:0x210]
    assert page[0x210] == 0xFF
    assert memory.read(struct.unpack_from("<I", page, 0x228)[0], 6) == b"quiet\0"
    at, size = struct.unpack_from("<II", page, 0x218)
    assert (at, size) == (8 * MIB - 2 * 4096, 5000)
    assert memory.read(at, size) == b"x" * 5000
    assert memory.read(struct.unpack_from("<Q", page, 0x70)[0], 8) == b"RSD PTR "
    assert [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])] == [
        (0, 0xA0000, 1),
        (MIB, 15 * MIB, 1),
        (0xE8000000, 256 * MIB, 2),
    ]
    (pdpt,) = struct.unpack("<Q", memory.read(entry.page_tables_gpa, 8))
    for gib in range(4):
        (directory,) = struct.unpack("<Q", memory.read((pdpt & ~0xFFF) + 8 * gib, 8))
        (page_entry,) = struct.unpack("<Q", memory.read((directory & ~0xFFF) + 8 * 511, 8))
        assert page_entry == (gib << 30 | 511 << 21 | 0x83)
    memory.close()


@pytest.mark.parametrize(
    ("image", "more", "problem"),
    [
        (with_own_entry(b"\xf4" * 0x200), {}, "truncated: its 64-bit entry is not in the file"),
        (with_own_entry(b"\xf4" * 0x300, preferred=0x8000), {}, "would overwrite what lies below 1 MiB"),
        (with_own_entry(b"\xf4" * 0x300, preferred=64 * MIB), {}, "is outside the guest's RAM; give more memory"),
        (with_own_entry(b"\xf4" * 0x300, room=16 * MIB), {}, "is outside the guest's RAM; give more memory"),
        (with_own_entry(b"\xf4" * 0x300), {"cmdline": "x" * 256}, "256 bytes are too long; give at most 255"),
    ],
)
def test_an_own_entry_that_can_not_be(tmp_path: Path, image: bytes, more: dict[str, str], problem: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(image)
    memory = GuestMemory(layout.ram_ranges(16 * MIB))
    with pytest.raises(ConfigError) as caught:
        payloads.load_payload(memory, PayloadConfig(str(path), **more))
    memory.close()
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_old_kernel_has_no_such_entry(tmp_path: Path) -> None:
    image = bytearray(with_own_entry(b"\xf4" * 0x300))
    image[0x236] = 0  # xloadflags
    path = tmp_path / "vmlinuz"
    path.write_bytes(image)
    with pytest.raises(ConfigError, match="there is no vmlinux in it"):
        payloads.check_payload(PayloadConfig(str(path)))
