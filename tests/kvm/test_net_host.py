"""A real guest and the host: it asks a server there through passt, and over a tap, where it is pinged too."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, MemoryConfig, NetConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road
from trivmm.virtio.net.tap import why_no_tap

pytestmark = pytest.mark.kvm

NO_TAP = why_no_tap()
LIMIT_S = 120
TAP = f"tvk{os.getpid() % 100000}"


def default_route() -> str | None:
    """Its gateway."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        words = line.split()
        if words[1] == "00000000":
            return str(IPv4Address(int(words[2], 16).to_bytes(4, "little")))
    return None


def why_no_passt() -> str | None:
    if shutil.which("passt") is None:
        return "passt is not installed: apt-get install passt"
    return None if default_route() else "this host has no default route for passt to use"


@asynccontextmanager
async def echoing(address: str) -> AsyncIterator[int]:
    """A UDP server that sends back what it gets; gives its port."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind((address, 0))

        async def serve(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            while True:
                data, whom = await sock.recvfrom(1 << 16)
                await sock.sendto(data, whom)

        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            yield sock.getsockname()[1]
            nursery.cancel_scope.cancel()


def guest(folder: Path, net: NetConfig, ip: str, gateway: str, port: int) -> VmConfig:
    numbers = {"net_ip": int(IPv4Address(ip)), "net_gateway": int(IPv4Address(gateway)), "net_port": port}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=100, mem=4, net=1, **numbers)),
        memory=MemoryConfig(32 << 20),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        virtio=[net],
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


async def until_echoed(vm: Vm, folder: Path, count: int) -> ProbeReport:
    while True:
        report = parse_report((folder / "serial.txt").read_text(errors="replace"))
        assert not report.problems
        if report.counts.get("net_echoed", 0) >= count:
            return report
        await vm.console_output()


@pytest.mark.skipif(why_no_passt() is not None, reason=str(why_no_passt()))
async def test_a_server_on_the_host_through_passt_before_and_after_a_move(tmp_path: Path) -> None:
    """The host's loopback is at the gateway's address; each side of a migration has a passt of its own."""
    gateway = default_route()
    assert gateway is not None
    with trio.fail_after(LIMIT_S):
        async with echoing("127.0.0.1") as port:
            config = guest(tmp_path, NetConfig(link="passt"), str(IPv4Address(gateway) + 1), gateway, port)
            async with open_road(config) as road:
                before = await until_echoed(road.vm, tmp_path, 10)
                await road.move(f"unix:{tmp_path}/m.sock")
                await until_echoed(road.vm, tmp_path, before.counts["net_echoed"] + 10)


def ping(address: str, data: bytes) -> bytes:
    """The answer to an echo request with ``data``."""
    head = struct.pack("!BBHHH", 8, 0, 0, 77, 1)
    total = sum(struct.unpack(f"!{(8 + len(data)) // 2}H", head + data))
    checksum = ~(total % 0xFFFF) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect((address, 0))
        sock.send(struct.pack("!BBHHH", 8, 0, checksum, 77, 1) + data)
        while True:
            got = sock.recv(1 << 16)[20:]
            if got[:2] == b"\0\0" and got[4:6] == struct.pack("!H", 77):
                return got[8:]


@pytest.mark.skipif(NO_TAP is not None, reason=f"no tap can be made here ({NO_TAP}): run as root")
async def test_arp_udp_and_a_ping_over_a_tap_before_and_after_a_move(tmp_path: Path) -> None:
    net = NetConfig(tap=TAP, ip="10.213.8.1", mask="255.255.255.0")
    with trio.fail_after(LIMIT_S):
        # The server's address comes with the tap, so it listens at every one.
        async with echoing("0.0.0.0") as port:
            config = guest(tmp_path, net, "10.213.8.2", "10.213.8.1", port)
            async with open_road(config) as road:
                before = await until_echoed(road.vm, tmp_path, 10)
                assert await trio.to_thread.run_sync(ping, "10.213.8.2", b"0123456789" * 50) == b"0123456789" * 50
                await road.move(f"unix:{tmp_path}/m.sock")
                await until_echoed(road.vm, tmp_path, before.counts["net_echoed"] + 10)
                assert await trio.to_thread.run_sync(ping, "10.213.8.2", b"again!") == b"again!"
    assert not Path(f"/sys/class/net/{TAP}").exists()
