"""virtio-net with real guests: the probe sends another one data, checks what comes, and moves meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, MemoryConfig, NetConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 200
MAC = "52:54:00:00:00:"


def guest(folder: Path, name: str, net: NetConfig, **options: object) -> VmConfig:
    words: dict[str, object] = {"cpus": 1, "report": 100, "mem": 4, "net": 1, **options}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        memory=MemoryConfig(32 << 20),
        serial=SerialConfig("File", str(folder / f"{name}.txt")),
        virtio=[net],
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path, name: str) -> ProbeReport:
    return parse_report((folder / f"{name}.txt").read_text(errors="replace"))


def unharmed(report: ProbeReport) -> bool:
    return not report.problems and report.errors == 0 and report.stuck == 0


async def until_report(vm: Vm, folder: Path, name: str, **wanted: int) -> ProbeReport:
    """The first report of the guest in which each of these is at least so much. The caller bounds it."""
    while any((report := report_of(folder, name)).counts.get(key, 0) < least for key, least in wanted.items()):
        assert unharmed(report), report
        await vm.console_output()
    return report


@asynccontextmanager
async def booted(config: VmConfig) -> AsyncIterator[Vm]:
    async with open_vm(config) as vm:
        await vm.boot()
        yield vm


@pytest.mark.parametrize("options", [{"net_frame": 1400}, {"net_frame": 60000, "event_idx": 1, "indirect": 1}])
async def test_two_guests_exchange_data_both_ways(tmp_path: Path, options: dict[str, int]) -> None:
    one = f"{tmp_path}/one.sock"
    a = guest(tmp_path, "a", NetConfig(link=f"listen:{one}", mac=MAC + "0a"), net_mib=4, **options)
    b = guest(tmp_path, "b", NetConfig(link=f"connect:{one}", mac=MAC + "0b"), net_mib=4, **options)
    with trio.fail_after(LIMIT_S):
        async with booted(a) as here, booted(b) as there:
            mine = await until_report(here, tmp_path, "a", net_done=1)
            theirs = await until_report(there, tmp_path, "b", net_done=1)
            assert unharmed(mine)
            assert unharmed(theirs)
            assert mine.counts["net_received"] == theirs.counts["net_sent"] > 3 << 20
            assert theirs.counts["net_received"] == mine.counts["net_sent"] > 3 << 20


def tied(folder: Path, kind: str) -> tuple[NetConfig, NetConfig]:
    """Of the guest that moves, and of the other one."""
    one, other = f"{folder}/one.sock", f"{folder}/other.sock"
    links = {
        "it listens": ({"link": f"listen:{one}"}, {"link": f"connect:{one}"}),
        "it connects": ({"link": f"connect:{one}"}, {"link": f"listen:{one}"}),
        "datagrams": ({"link": f"dgram:{one}", "peer": other}, {"link": f"dgram:{other}", "peer": one}),
    }[kind]
    return NetConfig(**links[0], mac=MAC + "0a"), NetConfig(**links[1], mac=MAC + "0b")


async def exchange_while_moving(folder: Path, kind: str, mebibytes: int, moves: int, **options: int) -> None:
    """``moves`` of one guest, spread over what both send."""
    mine, theirs = tied(folder, kind)
    words = {"net_mib": mebibytes, "net_frame": 60000, **options}
    a, b = guest(folder, "a", mine, **words), guest(folder, "b", theirs, **words)
    async with open_road(a) as road, booted(b) as there:
        for number in range(moves):
            await until_report(road.vm, folder, "a", net_received=(mebibytes << 20) * number // (moves + 1) + 1)
            await road.move(f"unix:{folder}/m{number}.sock")
        mine_at_last = await until_report(road.vm, folder, "a", net_done=1)
        theirs_at_last = await until_report(there, folder, "b", net_done=1)
        assert unharmed(mine_at_last)
        assert unharmed(theirs_at_last)
        assert mine_at_last.counts["net_received"] == theirs_at_last.counts["net_sent"] >= (mebibytes << 20) - 60000
        assert theirs_at_last.counts["net_received"] == mine_at_last.counts["net_sent"] >= (mebibytes << 20) - 60000
        with trio.fail_after(LIMIT_S):  # the last frame may be before the last move, which is announced behind it
            while not road.vm.counters()["_net0"]["announced"]:  # noqa: ASYNC110 - a counter has no event
                await trio.sleep(0.01)


@pytest.mark.parametrize("kind", ["it listens", "it connects", "datagrams"])
async def test_data_arrives_while_one_guest_moves(tmp_path: Path, kind: str) -> None:
    with trio.fail_after(LIMIT_S):
        await exchange_while_moving(tmp_path, kind, 32, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["it listens", "it connects"])
async def test_a_gibibyte_both_ways_while_one_guest_moves(tmp_path: Path, kind: str) -> None:
    with trio.fail_after(10 * LIMIT_S):
        await exchange_while_moving(tmp_path, kind, 1024, 10, event_idx=1)
