"""The life of a Linux guest, whatever runs it: boots, has every driver bound, moves, uses its devices, powers off.

Its init is ``init.c``. Disks come and go by its own ACPI hotplug.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import trio

from trivmm import (
    ConsoleConfig,
    CpusConfig,
    Deadlines,
    DiskConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    PlatformConfig,
    SerialConfig,
    Vm,
    VmConfig,
    VsockConfig,
    open_incoming,
    open_vm,
)
from trivmm.hypervisor.base import Hypervisor
from trivmm.testing.road import console_of
from trivmm.virtio.balloon.config import BalloonConfig

from .link import answering

CMDLINE = "console=ttyS0 panic=-1"
BOOTING = ("Memory: ", "NET: Registered PF_INET ", "Freeing unused kernel")
"""What a kernel says early, midway and late in its boot."""
MOVES_AT = (10, 20, 30)  # rounds of the guest
LAST = 59
DRIVERS = [
    *("virtio_balloon", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng", "vmw_vsock_virtio_transport"),
]
UNCLEAN = re.compile(
    r"DMI not present|BUG:|Oops|WARNING:|Call Trace|lockup|stall|[Uu]nstable|I/O error|blocked for more than|MCE|"
    r"timed out|segfault"
)
UUID, OEM = "01234567-89ab-cdef-0123-456789abcdef", "the second, with a comma"
CLOCK_MS = 5000  # what the guest's clock and the host's may differ by: the line's own way, and its pauses


@attrs.define
class Life:
    """``cmdline``: beyond the console. ``moves_booting``: whether it moves while it boots."""

    linux: Any
    folder: Path
    hypervisor: Hypervisor
    cpus: int = 1
    cmdline: str = ""
    moves_booting: Sequence[str] = BOOTING
    deadlines: Deadlines = attrs.field(factory=Deadlines)
    moves: int = 0
    heard: int = 0
    downtimes_ms: list[float] = attrs.field(factory=list)
    seconds_to_init: float = 0
    counters: dict[str, int] = attrs.field(factory=dict)

    def url(self) -> str:
        """By turns."""
        self.moves += 1
        return "tcp:127.0.0.1:0" if self.moves % 2 else f"unix:{self.folder}/m{self.moves}.sock"

    async def move(self, stack: AsyncExitStack, vm: Vm) -> Vm:
        """Where it is then."""
        incoming = await stack.enter_async_context(open_incoming(self.url(), hypervisor=self.hypervisor))
        self.count(vm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(incoming.receive)
            report = await vm.migrate_to(incoming.url)
        self.downtimes_ms.append(report.downtime.total_ms)
        assert (await vm.wait()).kind == "migrated"
        return incoming.vm

    def count(self, vm: Vm) -> None:
        """What its vCPUs have counted until now, over all of its moves."""
        for who, counted in vm.counters().items():
            if re.fullmatch(r"_*vcpu\d+", who):
                for name, value in counted.items():
                    self.counters[name] = self.counters.get(name, 0) + value

    async def until(self, said: str) -> None:
        """In its file: what it says while it moves is on neither side's console from its start."""
        serial = self.folder / "serial.txt"
        while said not in serial.read_text(errors="replace")[self.heard :]:  # noqa: ASYNC110 - a file has no event
            await trio.sleep(0.02)
        self.heard += serial.read_text(errors="replace")[self.heard :].index(said) + len(said)

    def config(self) -> VmConfig:
        (self.folder / "disk.img").write_bytes(bytes(4 << 20))
        return VmConfig(
            PayloadConfig(str(self.linux.kernel), f"{CMDLINE} {self.cmdline}", initramfs=str(self.linux.initramfs)),
            cpus=CpusConfig(self.cpus),
            memory=MemoryConfig(256 << 20),
            disks=(DiskConfig(str(self.folder / "disk.img")),),
            platform=PlatformConfig(system_uuid=UUID, system_serial_number="sn 12", oem_strings=("one", OEM)),
            serial=SerialConfig("File", str(self.folder / "serial.txt")),
            console=ConsoleConfig("File", str(self.folder / "console.txt")),
            virtio=[
                NetConfig(link=f"connect:{self.folder}/net.sock"),
                BalloonConfig(),
                VsockConfig(3, self.folder / "vsock.sock"),
            ],
            deadlines=self.deadlines,
        )

    async def live(self) -> None:
        """All of it; and what it has said is looked through."""
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(answering(f"{self.folder}/net.sock", answer_to))
            vm = await stack.enter_async_context(open_vm(self.config(), hypervisor=self.hypervisor))
            await vm.boot()
            for said in self.moves_booting:
                await self.until(said)
                vm = await self.move(stack, vm)
            await self.until("Run /init")
            self.seconds_to_init = time.monotonic() - began
            await self.until("GUEST round 0 ")
            host = -time.monotonic()
            for number, at in enumerate(MOVES_AT):
                await self.until(f"GUEST round {at - 1} ")
                assert vm.host.machine is not None
                console_of(vm.host.machine.board).resize(100 + number, 30)
                await self.until(f"GUEST round {at} ")  # its worker thread has had time to look at the size
                await vm.feed_console(b"word %d" % number, "console")
                vm = await self.move(stack, vm)
            await self.until(f"GUEST round {LAST} ")
            host += time.monotonic()
            vm = await self.plug(stack, vm)
            await self.until("GUEST done")
            self.count(vm)
            await vm.power_button()
            assert (await vm.wait()).kind == "poweroff"
        self.look_at(host * 1000)

    async def plug(self, stack: AsyncExitStack, vm: Vm) -> Vm:
        """A disk that stays where it is, and one that moves."""
        for number, plugged in enumerate((self.folder / "first.img", self.folder / "second.img")):
            plugged.write_bytes(bytes(1 << 20))
            await self.until("GUEST wants a disk")
            assert (await vm.add_device(DiskConfig(str(plugged)))).id == "_disk1"
            await self.until("GUEST plugged 3 good")
            if number:
                vm = await self.move(stack, vm)
                await self.until("GUEST plugged 6 good")
            with vm.events.subscribe() as events:
                await vm.remove_device("_disk1")
                await self.until("GUEST disk gone")
                async for event in events:
                    if event.event == "device-removed":
                        break
            assert "_disk1" not in vm.info()["device_tree"]
            assert plugged.read_bytes().startswith(b"plugged 0\0")
        return vm

    def look_at(self, host_ms: float) -> None:
        said = (self.folder / "serial.txt").read_text(errors="replace")
        assert f"smp: Brought up 1 node, {self.cpus} CPU" in said
        assert sorted(re.findall(r"GUEST bound (\w+)", said)) == DRIVERS
        assert "GUEST problem" not in said
        told = dict(re.findall(r"GUEST dmi (\w+): (.*?)\r?\n", said))
        assert (told["sys_vendor"], told["product_serial"], told["product_uuid"]) == ("TriVMM", "sn 12", UUID)
        assert re.findall(r"GUEST oem: (.*?)\r?\n", said) == ["one", OEM]
        assert [line for line in said.splitlines() if UNCLEAN.search(line)] == []
        assert not re.search(r"GUEST plugged \d+ bad", said)
        assert said.count("GUEST power button") == 1
        rounds = re.findall(r"GUEST round (\d+) disk (\w+) rng (-?\d+) net (\w+) at (\d+) real (\d+)", said)
        assert [each[:4] for each in rounds] == [(str(number), "good", "8", "good") for number in range(LAST + 1)]
        for clock in (4, 5):
            times = [int(each[clock]) for each in rounds]
            assert times == sorted(times)
            assert abs(times[-1] - times[0] - host_ms) < CLOCK_MS
        stamps = [
            float(stamp) for stamp in re.findall(r"^\[ *(\d+\.\d+)\]", said[said.index("smp: Brought up") :], re.M)
        ]
        assert stamps == sorted(stamps)
        console = (self.folder / "console.txt").read_text()
        assert console == "".join(f"CONSOLE round {number}\n" for number in range(LAST + 1))
        assert re.findall(r"GUEST typed (.*)", said) == [f"word {n} on {100 + n} x 30" for n in range(len(MOVES_AT))]
        assert (self.folder / "disk.img").read_bytes()[4096 * 7 :].startswith(b"round 7\0")

    def __str__(self) -> str:
        moved = " ".join(f"{downtime:.0f}" for downtime in self.downtimes_ms)
        assisted = {name: count for name, count in sorted(self.counters.items()) if name.startswith("assist_")}
        return f"{self.seconds_to_init:.0f} s to /init with {self.cpus} vCPU; downtimes {moved} ms; assisted {assisted}"


def answer_to(frame: bytes) -> bytes | None:
    """What 10.9.8.1 says to a frame: its address to who asks for it, and datagrams back."""
    mac = bytes.fromhex("525400000001")
    if frame[12:14] == b"\x08\x06" and frame[38:42] == bytes((10, 9, 8, 1)):
        head = frame[6:12] + mac + frame[12:20] + b"\0\2"
        return (head + mac + bytes((10, 9, 8, 1)) + frame[22:32]).ljust(60, b"\0")
    if frame[12:14] == b"\x08\0" and frame[23] == 17 and frame[30:34] == bytes((10, 9, 8, 1)):
        udp = frame[36:38] + frame[34:36] + frame[38:]  # swapped, a checksum stays the same
        return frame[6:12] + mac + frame[12:26] + frame[30:34] + frame[26:30] + udp
    return None
