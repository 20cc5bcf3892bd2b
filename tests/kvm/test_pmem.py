"""virtio-pmem with a real guest, which stores in a file's pages and checks them: kept, moved, plugged, and cut."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import trio

from trivmm import Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig, VmState
from trivmm.errors import MigrationError
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.road import open_road
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.vm import open_vm

LIMIT_S = 120
MIB = 1 << 20
PAGES = 256
MAGIC = 0x6D656D70746E6975
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")
BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]


@pytest.fixture(params=BACK_ENDS)
def hypervisor(request: pytest.FixtureRequest) -> Iterator[Hypervisor]:
    chosen = choose_hypervisor(request.param)
    yield chosen
    chosen.close()


def config_of(folder: Path, *, pages: int = PAGES, **words: object) -> VmConfig:
    image = folder / "pmem.img"
    if not image.exists():
        image.touch()
        os.truncate(image, 4 * MIB)
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=4, pmem=pages, **words)),
        memory=MemoryConfig(64 * MIB),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        virtio=[PmemConfig(image)],
        deadlines=Deadlines(pause=10, downtime=20, quiesce=5),
    )


async def until(vm: Vm, folder: Path, so: Callable[[ProbeReport], bool]) -> ProbeReport:
    """The guest's first report that is so."""
    while True:
        report = parse_report((folder / "serial.txt").read_text(errors="replace"))
        assert (report.problems, report.errors, report.stuck) == ((), 0, 0)
        if report.counts and so(report):
            return report
        await vm.console_output()


def generations(image: Path) -> list[int]:
    """Of each page of the file; 0 where the guest was not."""
    found = []
    with image.open("rb") as file:
        for page in range(PAGES):
            file.seek(4096 * page)
            magic, generation = struct.unpack("<QQ", file.read(16))
            assert magic in (0, MAGIC ^ page)
            found.append(generation)
    return found


async def test_what_it_stores_is_kept_and_moves(tmp_path: Path, hypervisor: Hypervisor) -> None:
    config = config_of(tmp_path)
    with trio.fail_after(LIMIT_S):
        async with open_road(config, hypervisor=hypervisor) as road:
            assert road.vm.info()["device_tree"]["_pmem0"]["resources"] == [
                {"MmioAddressRange": {"base": (1 << 40) - (64 << 30) - 4 * MIB, "size": 4 * MIB}}
            ]
            for number in range(3):
                since = (await until(road.vm, tmp_path, lambda report: True)).counts
                await until(
                    road.vm,
                    tmp_path,
                    lambda report, since=since: (
                        report.counts["pmem_stored"] > since["pmem_stored"] + 4 * PAGES
                        and report.counts["pmem_flushed"] > since["pmem_flushed"] + 2
                    ),
                )
                if number < 2:
                    await road.move(f"unix:{tmp_path}/{number}.sock")
            counters = road.vm.counters()["_pmem0"]
            assert counters["flush_ops"] > 0
            assert counters["errors"] == 0
        kept = generations(tmp_path / "pmem.img")
        assert min(kept) >= 4
        (tmp_path / "serial.txt").unlink()
        async with open_vm(config, hypervisor=hypervisor) as vm:  # a guest that comes after it finds it all
            await vm.boot()
            report = await until(vm, tmp_path, lambda report: report.counts["pmem_stored"] > PAGES)
            assert report.counts["pmem_found"] == PAGES
            assert min(generations(tmp_path / "pmem.img")) > min(kept)


@pytest.mark.kvm
@pytest.mark.parametrize("scratch", [False, True], ids=["discarded", "scratch"])
async def test_what_is_not_kept_does_not_move(tmp_path: Path, scratch: bool) -> None:
    config = config_of(tmp_path)
    image = tmp_path / "pmem.img"
    device = PmemConfig(tmp_path, 4 * MIB) if scratch else PmemConfig(image, discard_writes=True)
    with trio.fail_after(LIMIT_S):
        async with open_vm(attrs.evolve(config, virtio=[device])) as vm:
            await vm.boot()
            await until(vm, tmp_path, lambda report: report.counts["pmem_flushed"] > 2)
            with pytest.raises(MigrationError, match="_pmem0: what the guest writes there is in this process only"):
                await vm.migrate_to(f"unix:{tmp_path}/nobody.sock")
            assert vm.state is VmState.RUNNING
            since = (await until(vm, tmp_path, lambda report: True)).counts["pmem_stored"]
            await until(vm, tmp_path, lambda report: report.counts["pmem_stored"] > since)
        assert max(generations(tmp_path / "pmem.img")) == 0


async def test_a_file_that_is_cut_is_its_guests_end_and_nobody_elses(tmp_path: Path, hypervisor: Hypervisor) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path), hypervisor=hypervisor) as vm:
            await vm.boot()
            await until(vm, tmp_path, lambda report: report.counts["pmem_flushed"] > 2)
            os.truncate(tmp_path / "pmem.img", 4096 * PAGES // 2)
            reason = await vm.wait()
            assert reason.kind == "crash"
            assert f"the file behind _pmem0 ({tmp_path}/pmem.img)" in str(reason.crash)
            os.truncate(tmp_path / "pmem.img", 4 * MIB)
            (tmp_path / "pmem.img").write_bytes(bytes(4 * MIB))
            await vm.boot()
            since = 0
            await until(vm, tmp_path, lambda report: report.counts["pmem_stored"] > since)


@pytest.mark.kvm
async def test_one_that_is_plugged_in_later_moves_and_goes(tmp_path: Path) -> None:
    """The guest lets go of it, and the memory and the file's lock are free."""
    config = config_of(tmp_path, plug=3)
    more = tmp_path / "more.img"
    more.touch()
    os.truncate(more, 2 * MIB)

    async def works(vm: Vm) -> None:
        since = (await until(vm, tmp_path, lambda report: True)).counts["pmem_stored"]
        await until(vm, tmp_path, lambda report: report.counts["pmem_stored"] > since + PAGES)

    with trio.fail_after(LIMIT_S):
        async with open_road(config) as road:
            await until(road.vm, tmp_path, lambda report: report.counts["pmem_flushed"] > 2)
            added = await road.vm.add_device(PmemConfig(more))
            assert added is not None
            assert added.id == "_pmem1"
            await road.move(f"unix:{tmp_path}/m.sock")
            tree = road.vm.info()["device_tree"]
            assert tree["_pmem1"]["resources"][0]["MmioAddressRange"]["size"] == 2 * MIB
            await works(road.vm)
            with road.vm.events.subscribe() as events:
                await road.vm.remove_device("_pmem1")
                async for event in events:
                    if event.event == "device-removed":
                        break
            assert "_pmem1" not in road.vm.info()["device_tree"]
            again = await road.vm.add_device(PmemConfig(more))
            assert again is not None
            await works(road.vm)
