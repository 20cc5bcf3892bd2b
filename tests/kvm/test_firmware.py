"""SeaBIOS from ROM: its own virtio-blk driver boots a sector that is assembled here. Moved in mid-boot, and reset."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, DiskConfig, Event, MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.road import open_road

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
pytestmark = [
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld"),
    pytest.mark.skipif(not SEABIOS.exists(), reason=f"needs {SEABIOS} (apt-get install seabios)"),
]
LIMIT_S = 120
SECTORS = 2048
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")
BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]
ENDS = {"off": 0, "triple fault": 1, "keyboard controller": 2, "port 0xcf9": 3, "ACPI": 4}
INSTANTS = [  # what SeaBIOS says at port 0x402, in the order in which it says it: 32-bit and real mode, and between
    "BUILD: gcc",
    "Relocating init",
    "=== PCI device probing",
    "PCI: map device bdf=00:01.0",
    "Copying MPTABLE",
    "ACPI: parse DSDT",
    "sercon: configuring",
    "found virtio-blk",
    "e820 map has",
    "Booting from 0000:7c00",
]


@pytest.fixture(params=BACK_ENDS)
def hypervisor(request: pytest.FixtureRequest) -> Iterator[Hypervisor]:
    chosen = choose_hypervisor(request.param)
    yield chosen
    chosen.close()


@pytest.fixture(scope="module")
def sector(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("sector")
    made, raw = folder / "sector.o", folder / "sector.bin"
    source = Path(__file__).with_name("boot_sector.S")
    subprocess.run(["gcc", "-m32", "-c", source, "-o", made], check=True, timeout=60)
    linker = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "-e", "start", "--oformat", "binary", "--build-id=none"]
    subprocess.run([*linker, "-o", raw, made], check=True, timeout=60)
    return raw.read_bytes()


def config_of(folder: Path, sector: bytes, end: str = "off") -> VmConfig:
    data = os.urandom(64 * 512)
    total = sum(struct.unpack(f"<{len(data) // 2}H", data)) & 0xFFFF
    disk = folder / "boot.img"
    disk.write_bytes((sector[:505] + struct.pack("<BH", ENDS[end], total) + sector[508:] + data).ljust(SECTORS * 512))
    return VmConfig(
        PayloadConfig(firmware=str(SEABIOS)),
        memory=MemoryConfig(64 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(folder / "out.txt")),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def check_console(folder: Path, *more: str) -> None:
    """A boot each: the firmware's own lines, the star of INT 10h (sent when it has time), all of the sector's.

    ``more``: what the second boot and those after it said beyond."""
    boots = (folder / "out.txt").read_text().split("\x1bc")[1:]  # its console begins by a terminal's reset
    assert len(boots) == 1 + len(more)
    for boot, beyond in zip(boots, ("", *more), strict=True):
        assert "SeaBIOS (version" in boot
        assert boot.count("*") == 1
        assert boot.replace("*", "").endswith(f"Booting from Hard Disk...\n<boot><read><write><tick>{beyond}")


def check_disk(folder: Path) -> None:
    image = (folder / "boot.img").read_bytes()
    written = image[100 * 512 : 101 * 512]
    assert (written[:256], written[505:]) == (image[:256], image[505:512])  # between them its variable
    assert image[101 * 512 :].strip() == b""


@contextmanager
def said_by_firmware(what: str) -> Iterator[trio.Event]:
    """Set when a line at port 0x402 begins so: in the middle of the write, whose vCPU goes on at once."""
    heard, token = trio.Event(), trio.lowlevel.current_trio_token()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(what):
                token.run_sync_soon(heard.set)

    logger, listener = logging.getLogger("trivmm.guest"), Listener()
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)


async def boot_once(folder: Path, sector: bytes, hypervisor: Hypervisor) -> dict[str, dict[str, int]]:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(folder, sector), hypervisor=hypervisor) as vm:
            await vm.boot()
            await vm.wait_for_console("<tick>")
            counters = vm.counters()
            assert (await vm.wait()).kind == "poweroff"
    check_console(folder)
    check_disk(folder)
    return counters


async def test_a_disk_boots_through_the_firmwares_own_driver(
    tmp_path: Path, sector: bytes, hypervisor: Hypervisor
) -> None:
    counters = await boot_once(tmp_path, sector, hypervisor)
    assert counters["_disk0"]["read_ops"] >= 2
    assert counters["_disk0"]["write_ops"] == 1
    assert counters["__bus"]["bars_refused"] == 0


@pytest.mark.slow
async def test_twenty_boots_in_a_row(tmp_path: Path, sector: bytes, hypervisor: Hypervisor) -> None:
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        await boot_once(folder, sector, hypervisor)


async def move_at(folder: Path, sector: bytes, hypervisor: Hypervisor, instant: str, end: str = "off") -> None:
    """Where it ends by a reset, that comes while it is moved, or soon after."""
    with trio.fail_after(LIMIT_S), said_by_firmware(instant) as heard:
        async with open_road(config_of(folder, sector, end), hypervisor=hypervisor) as road:
            source = road.vm
            await heard.wait()
            await road.move(f"unix:{folder}/m.sock")
            assert source.host.machine is None
            assert (await road.vm.wait()).kind == "poweroff"
            assert source.reboots + road.vm.reboots == (end != "off")
    check_console(folder, *([] if end == "off" else ["<again>"]))
    check_disk(folder)


async def test_a_boot_that_is_moved_goes_on(tmp_path: Path, sector: bytes, hypervisor: Hypervisor) -> None:
    """One in 32-bit mode, one in real mode; all the instants are slow tests."""
    instant = "PCI: map device bdf=00:01.0" if hypervisor.name == "kvm" else "Booting from 0000:7c00"
    await move_at(tmp_path, sector, hypervisor, instant)


@pytest.mark.slow
@pytest.mark.parametrize("instant", INSTANTS)
async def test_a_boot_that_is_moved_at_any_instant_goes_on(
    tmp_path: Path, sector: bytes, hypervisor: Hypervisor, instant: str
) -> None:
    await move_at(tmp_path, sector, hypervisor, instant)


@pytest.mark.soft
@NO_SOFT
@pytest.mark.parametrize(
    "end",
    [
        "triple fault",
        *(pytest.param(end, marks=pytest.mark.slow) for end in ENDS if end not in ("off", "triple fault")),
    ],
)
async def test_every_way_to_reset_boots_again_with_the_cmos_as_it_was(tmp_path: Path, sector: bytes, end: str) -> None:
    """On ``soft``, where a boot takes a second; the ends are the board's. ROM and shadow RAM are new: the second boot
    is a whole one."""
    hypervisor = choose_hypervisor("soft")
    reasons = {"keyboard controller": "i8042", "ACPI": "ACPI reset register"}
    seen: list[Event] = []
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path, sector, end), hypervisor=hypervisor) as vm:
            vm.events.listen(seen.append)
            await vm.boot()
            assert (await vm.wait()).kind == "poweroff"
            assert vm.reboots == 1
    check_console(tmp_path, "<again>")
    told = [(each.event, each.properties) for each in seen if each.source == "vm"]
    assert told[2:] == [
        ("rebooting", {"reason": reasons.get(end, end)}),
        ("rebooted", None),
        ("shutdown", {"reason": "poweroff"}),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("end", [end for end in ENDS if end != "off"])
async def test_a_reset_while_it_is_moved_boots_again(
    tmp_path: Path, sector: bytes, hypervisor: Hypervisor, end: str
) -> None:
    await move_at(tmp_path, sector, hypervisor, "Booting from 0000:7c00", end)
