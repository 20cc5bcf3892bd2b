"""What a process keeps of VMs that have moved on: nothing, however often they move."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import trio
import trio.testing

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, Vm, VmConfig
from trivmm.guest import probe_path
from trivmm.machine.board import Board
from trivmm.machine.machine import Machine
from trivmm.memory.guest import GuestMemory
from trivmm.migration.destination.receiver import Receiver
from trivmm.migration.link.halves import Connection
from trivmm.migration.link.sockets import PageThread
from trivmm.platform.serial import Serial
from trivmm.testing.road import Road, open_road
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.virtio.pci import VirtioPciTransport

LIMIT_S = 60
KINDS = (Vm, Machine, Board, GuestMemory, Serial, VirtioPciTransport, Connection, Receiver)


def alive() -> Counter[type]:
    """How many objects of each kind there are."""
    gc.collect()
    return Counter(type(each) for each in gc.get_objects() if type(each) in KINDS)


async def moved(road: Road, folder: Path, name: str, times: int) -> None:
    for number in range(times):
        await road.move(f"unix:{folder}/{name}{number}.sock")


async def test_moves_leave_no_objects_and_no_buffers(tmp_path: Path) -> None:
    """Two VMs that move again and again inside one process."""
    before = alive()
    with trio.fail_after(LIMIT_S):
        async with open_road(config(tmp_path, "a"), hypervisor=ScriptedHypervisor()) as a:
            async with open_road(config(tmp_path, "b"), hypervisor=ScriptedHypervisor()) as b:
                counts = []
                for leg in range(3):
                    await moved(a, tmp_path, f"a{leg}", 2)
                    await moved(b, tmp_path, f"b{leg}", 2)
                    await trio.testing.wait_all_tasks_blocked(0.01)  # the sides that they left are gone
                    counts.append(alive() - before)
                assert counts[0] == counts[1] == counts[2]
                for kind in (Vm, Machine, Board, GuestMemory, Serial, Connection, Receiver):
                    assert counts[2][kind] == 2, kind
                threads = [each for each in gc.get_objects() if type(each) is PageThread]
                assert all(each.buffer is None for each in threads), "half a MiB each"
                del threads
        del a, b
    assert alive() - before == Counter()


def config(folder: Path, name: str) -> VmConfig:
    disk = folder / f"{name}.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20), disks=(DiskConfig(str(disk)),))
