"""A distribution's Linux with its own drivers, on the soft CPU: boots, uses its devices, moves, powers off when told.

Disks come and go by its own ACPI hotplug. The kernel is fetched by apt at each run; nothing of it is in the repository.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import (
    ConsoleConfig,
    CpusConfig,
    Deadlines,
    DiskConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    PciDeviceInfo,
    SerialConfig,
    Vm,
    VmConfig,
    open_incoming,
    open_vm,
)
from trivmm.testing.road import console_of

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 900
CMDLINE = "console=ttyS0 mitigations=off panic=-1 cryptomgr.notests"
MOVES_AT = (10, 20, 30)  # rounds of the guest
LAST = 59


async def move(stack: AsyncExitStack, vm: Vm, url: str) -> Vm:
    """Where it is then."""
    incoming = await stack.enter_async_context(open_incoming(url, hypervisor=SoftHypervisor()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(incoming.receive)
        await vm.migrate_to(incoming.url)
    assert (await vm.wait()).kind == "migrated"
    return incoming.vm


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


@asynccontextmanager
async def echoing(path: str) -> AsyncIterator[None]:
    """The other end of a network interface, for whoever connects: the guest's side now, another one after a move."""

    async def serve(peer: trio.SocketStream) -> None:
        held = b""
        async for data in peer:
            held += data
            while len(held) >= 4 and len(held) >= (end := 4 + int.from_bytes(held[:4], "big")):
                answer = answer_to(held[4:end])
                held = held[end:]
                if answer is not None:
                    await peer.send_all(len(answer).to_bytes(4, "big") + answer)

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(path)
        sock.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
            yield
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cpus", [1, 2])
async def test_linux_boots_uses_its_devices_and_moves(linux: Any, tmp_path: Path, cpus: int) -> None:
    disk, serial, console = tmp_path / "disk.img", tmp_path / "serial.txt", tmp_path / "console.txt"
    disk.write_bytes(bytes(4 << 20))
    config = VmConfig(
        PayloadConfig(str(linux.kernel), CMDLINE, initramfs=str(linux.initramfs)),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(256 << 20),
        disks=(DiskConfig(str(disk)),),
        serial=SerialConfig("File", str(serial)),
        console=ConsoleConfig("File", str(console)),
        virtio=[NetConfig(link=f"connect:{tmp_path}/net.sock")],
        deadlines=Deadlines(pause=10, downtime=30),  # one vCPU of an emulator, stopped while its memory is copied
    )
    with trio.fail_after(LIMIT_S):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(echoing(f"{tmp_path}/net.sock"))
            vm = await stack.enter_async_context(open_vm(config, hypervisor=SoftHypervisor()))
            await vm.boot()
            for number, at in enumerate(MOVES_AT):
                await vm.wait_for_console(f"GUEST round {at - 1} ")
                assert vm.host.machine is not None
                console_of(vm.host.machine.board).resize(100 + number, 30)
                await vm.wait_for_console(f"GUEST round {at} ")  # its worker thread has had time to look at the size
                await vm.feed_console(b"word %d" % number, "console")
                vm = await move(stack, vm, f"unix:{tmp_path}/{number}.sock")
            for number, plugged in enumerate((tmp_path / "first.img", tmp_path / "second.img")):
                plugged.write_bytes(bytes(1 << 20))
                await vm.wait_for_console("GUEST wants a disk")
                assert await vm.add_device(DiskConfig(str(plugged))) == PciDeviceInfo("_disk1", "0000:00:05.0")
                await vm.wait_for_console("GUEST plugged 3 good")
                if number:
                    vm = await move(stack, vm, f"unix:{tmp_path}/plugged.sock")
                    await vm.wait_for_console("GUEST plugged 6 good")
                with vm.events.subscribe() as events:
                    await vm.remove_device("_disk1")
                    await vm.wait_for_console("GUEST disk gone")
                    async for event in events:
                        if event.event == "device-removed":
                            break
                assert "_disk1" not in vm.info()["device_tree"]
                assert plugged.read_bytes().startswith(b"plugged 0\0")
            await vm.wait_for_console("GUEST done")
            await vm.power_button()
            assert (await vm.wait()).kind == "poweroff"
    said = serial.read_text(errors="replace")
    assert f"smp: Brought up 1 node, {cpus} CPU" in said
    assert "GUEST problem" not in said
    assert not re.search(r"GUEST plugged \d+ bad", said)
    assert said.count("GUEST power button") == 1
    rounds = re.findall(r"GUEST round (\d+) disk (\w+) rng (-?\d+) net (\w+)", said)
    assert rounds == [(str(number), "good", "8", "good") for number in range(LAST + 1)]
    assert console.read_text() == "".join(f"CONSOLE round {number}\n" for number in range(LAST + 1))
    assert re.findall(r"GUEST typed (.*)", said) == [f"word {n} on {100 + n} x 30" for n in range(len(MOVES_AT))]
    assert disk.read_bytes()[4096 * 7 :].startswith(b"round 7\0")
