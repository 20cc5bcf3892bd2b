"""What firmware finds: fw_cfg, the ACPI table loader's script, its ROM, and a CMOS that outlives a reset."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from trivmm.boot.acpi import acpi_tables
from trivmm.boot.firmware import firmware_items, is_flat, load_firmware
from trivmm.boot.payload import check_payload, load_payload, wants_rom
from trivmm.boot.table_loader import loader_files
from trivmm.config import PayloadConfig
from trivmm.errors import ConfigError, GuestMemoryError
from trivmm.guest import probe_path
from trivmm.hypervisor.base import PvhEntry
from trivmm.memory import layout
from trivmm.memory.guest import GuestMemory
from trivmm.platform.cmos import Cmos
from trivmm.platform.fw_cfg import FwCfg
from trivmm.platform.pm_timer import PmTimer
from trivmm.state.platform import FwCfgState

MIB = 1 << 20
PLACES = {b"etc/acpi/tables": 0x7FE_1240, b"etc/acpi/rsdp": 0xF_5A00}


def read_item(device: FwCfg, key: int, size: int) -> bytes:
    device.write(0, key.to_bytes(2, "little"))
    return b"".join(device.read(1, 1) for _ in range(size))


def read_files(device: FwCfg) -> dict[str, bytes]:
    (count,) = struct.unpack(">I", read_item(device, 0x19, 4))
    entries = [struct.unpack(">IHH56s", b"".join(device.read(1, 1) for _ in range(64))) for _ in range(count)]
    return {name.rstrip(b"\0").decode(): read_item(device, key, size) for size, key, _, name in entries}


def test_the_items_that_seabios_asks_for() -> None:
    device = FwCfg(firmware_items(layout.ram_ranges(5 << 30), 3))
    assert read_item(device, 0, 6) == b"QEMU\0\0"
    assert read_item(device, 1, 4) == b"\1\0\0\0"  # no DMA
    assert read_item(device, 5, 2) == read_item(device, 15, 2) == b"\3\0"
    assert read_item(device, 0x8003, 4) == bytes(4)  # one that does not exist
    files = read_files(device)
    e820 = [struct.unpack_from("<QQI", files["etc/e820"], at) for at in range(0, len(files["etc/e820"]), 20)]
    assert e820 == [(0, 3 << 30, 1), (4 << 30, 2 << 30, 1), (0xE8000000, 256 * MIB, 2)]
    assert files["etc/boot-fail-wait"] == b"\xff" * 4


def test_fw_cfg_goes_on_where_it_was_saved_and_takes_no_nonsense() -> None:
    device, other = FwCfg({7: b"abcdef"}), FwCfg({7: b"abcdef"})
    assert read_item(device, 7, 2) == b"ab"
    other.load(device.save())
    assert other.read(1, 1) == b"c"
    device.write(0, b"\x07")  # a byte is no selector
    device.write(1, b"x")
    device.write(0, b"\x07\0\0\0")
    assert device.read(1, 4) == bytes(4)
    assert device.read(0, 2) == bytes(2)
    assert device.read(1, 1) == b"c"
    device.load(FwCfgState(7, (1 << 32) - 1))
    assert device.read(1, 1) == b"\0"
    assert device.save() == FwCfgState(7, (1 << 32) - 1)


def carried_out(script: bytes, files: dict[bytes, bytearray]) -> None:
    """As firmware does it, with the files at :data:`PLACES`."""
    allocated = set()
    for at in range(0, len(script), 128):
        (command,) = struct.unpack_from("<I", script, at)
        if command == 1:
            name, alignment, zone = struct.unpack_from("<56sIB", script, at + 4)
            name = name.rstrip(b"\0")
            assert not PLACES[name] % alignment
            assert zone == (2 if name == b"etc/acpi/rsdp" else 1)
            allocated.add(name)
        elif command == 2:
            into, of, offset, size = struct.unpack_from("<56s56sIB", script, at + 4)
            into, of = into.rstrip(b"\0"), of.rstrip(b"\0")
            assert {into, of} <= allocated
            value = int.from_bytes(files[into][offset : offset + size], "little")
            assert value < len(files[of])
            files[into][offset : offset + size] = (value + PLACES[of]).to_bytes(size, "little")
        else:
            assert command == 3
            name, offset, start, length = struct.unpack_from("<56sIII", script, at + 4)
            data = files[name.rstrip(b"\0")]
            data[offset] = 0
            data[offset] = -sum(data[start : start + length]) & 0xFF


@pytest.mark.parametrize("vcpus", [1, 8])
def test_the_tables_are_the_same_wherever_firmware_places_them(vcpus: int) -> None:
    made = loader_files(acpi_tables(vcpus))
    files = {name: bytearray(made[name.decode()]) for name in PLACES}
    carried_out(made["etc/table-loader"], files)
    tables, base = files[b"etc/acpi/tables"], PLACES[b"etc/acpi/tables"]

    def table(gpa: int) -> bytes:
        (length,) = struct.unpack_from("<I", tables, gpa - base + 4)
        found = bytes(tables[gpa - base : gpa - base + length])
        assert len(found) == length
        assert not sum(found) & 0xFF
        return found

    rsdp = files[b"etc/acpi/rsdp"]
    assert rsdp[:8] == b"RSD PTR "
    assert not sum(rsdp[:20]) & 0xFF
    assert not sum(rsdp) & 0xFF
    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    found = {each[:4]: each for each in map(table, struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]))}
    (short,), (long,) = struct.unpack_from("<I", found[b"FACP"], 40), struct.unpack_from("<Q", found[b"FACP"], 140)
    assert short == long
    original = acpi_tables(vcpus)
    assert table(long) in original  # nothing in it is relocated
    assert found[b"APIC"] in original


def test_an_image_lies_at_the_end_of_its_rom_and_of_the_first_mib(tmp_path: Path) -> None:
    image = bytes(range(256)) * 2048  # 512 KiB
    (tmp_path / "bios").write_bytes(image)
    assert is_flat(str(tmp_path / "bios"))
    memory = GuestMemory(layout.ram_ranges(5 << 30), (layout.ROM_START, layout.ROM_SIZE))
    try:
        assert [region.slot for region in memory.regions] == [0, 1, 2]
        assert [region.rom for region in memory.regions] == [False, True, False]
        assert memory.size == 5 << 30
        load_firmware(memory, str(tmp_path / "bios"))
        assert memory.read(0xC0000, 0x40000) == image[-0x40000:]
        assert memory.read(0xBF000, 0x1000) == bytes(0x1000)
        with pytest.raises(GuestMemoryError):  # nor does a device
            memory.read((4 << 30) - 16, 16)
        with pytest.raises(GuestMemoryError):
            memory.write((4 << 30) - 16, bytes(16))
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (0, "0 bytes are too few for a ROM"),
        (15, "15 bytes are too few"),
        ((16 << 20) + 1, "16777217 bytes are too many for a ROM (16 to 16M); give a flat PC firmware image"),
        (None, "cannot open it (No such file or directory); give a readable file"),
    ],
)
def test_firmware_that_can_not_be_is_one_line(tmp_path: Path, size: int | None, problem: str) -> None:
    path = tmp_path / "bios"
    if size is not None:
        with path.open("wb") as file:
            file.truncate(size)
    with pytest.raises(ConfigError) as caught:
        is_flat(str(path))
    assert str(caught.value).startswith(f'payload.firmware = "{path}": {problem}')
    assert "\n" not in str(caught.value)


def test_cmos_bytes_outlive_a_reset_but_not_what_they_would_go_on_with() -> None:
    before, after = Cmos(64 * MIB), Cmos(64 * MIB)
    for index, value in ((0x50, 0xA5), (0x0F, 0x05)):
        before.write(0, bytes([index]))
        before.write(1, bytes([value]))
    after.after_reset(before.save())
    for index, value in ((0x50, 0xA5), (0x0F, 0), (0x34, 0), (0x35, 3)):
        after.write(0, bytes([index]))
        assert after.read(1, 1)[0] == value


def test_the_shutdown_status_is_a_firmwares_own() -> None:
    bare, bios = Cmos(64 * MIB), Cmos(64 * MIB, for_firmware=True)
    for cmos in (bare, bios):
        cmos.write(0, b"\x8f")
    assert bare.write(1, b"\0") is not None
    assert bios.write(1, b"\0") is None


def test_the_pm_timer_goes_on_where_it_stood() -> None:
    now = [5_000_000_000]
    timer, other = PmTimer(lambda: now[0]), PmTimer(lambda: now[0] + 77_000_000_000)
    now[0] += 1_000_000_000
    assert timer.read(0, 4) == (3_579_545).to_bytes(4, "little")
    assert timer.read(1, 2) == (3_579_545).to_bytes(4, "little")[1:3]
    other.load(timer.save())
    assert other.save() == timer.save()
    now[0] += 2_000_000_000
    assert abs(int.from_bytes(other.read(0, 4), "little") - 3 * 3_579_545) <= 1
    now[0] += 3600 * 1_000_000_000  # wraps after twenty minutes
    assert len(timer.read(0, 4)) == 4


def test_firmware_that_is_an_elf_boots_as_a_kernel_does(caplog: pytest.LogCaptureFixture) -> None:
    payload = PayloadConfig(firmware=str(probe_path()), cmdline="quiet", initramfs="/nowhere")
    assert not wants_rom(payload)
    check_payload(payload)
    loaded = []
    for each in (payload, PayloadConfig(str(probe_path()))):
        memory = GuestMemory(layout.ram_ranges(64 * MIB))
        entry = load_payload(memory, each)
        assert isinstance(entry, PvhEntry)
        loaded.append((entry, memory.read(0, 64 * MIB)))
        memory.close()
    assert loaded[0] == loaded[1]
    assert "they are ignored" in caplog.text


def test_firmware_that_is_an_elf_without_an_entry_is_refused_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "bios").write_bytes(probe_path().read_bytes().replace(b"Xen\0", b"Xon\0"))
    with pytest.raises(ConfigError, match=r"payload\.firmware = .*: it has no PVH entry note"):
        check_payload(PayloadConfig(firmware=str(tmp_path / "bios")))
