"""virtio-vsock with a real guest: streams both ways, checked at both ends, by a thousand, and over moves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import CpusConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig, VsockConfig
from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path
from trivmm.testing.road import open_road
from trivmm.virtio.vsock.device import VsockDevice
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 120
ECHO, CHECKS, SENDS, SERVER = 1, 2, 3, 7
PERIOD = 65521
EXAMPLE = Path(__file__).parents[2] / "examples" / "vsock.py"


def _pattern() -> bytes:
    made = bytearray()
    for at in range(PERIOD):
        x = at * 2654435761 & 0xFFFFFFFF
        made.append((x >> 24 ^ x >> 13) & 0xFF)
    return bytes(made)


PATTERN = _pattern()


def config_of(folder: Path, *, cpus: int = 1, **options: object) -> VmConfig:
    words: dict[str, object] = {"cpus": cpus, "report": 100, "mem": 8, "vsock": 1, **options}
    return VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(**words)),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("File", str(folder / "serial.txt")),
        virtio=[VsockConfig(33, folder / "v.sock")],
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


def report_of(folder: Path) -> ProbeReport:
    return parse_report((folder / "serial.txt").read_text(errors="replace"))


async def reported(vm: Vm, folder: Path, enough: Callable[[Mapping[str, int]], bool]) -> ProbeReport:
    """The first report whose counts are as they should be; a lost byte is a problem, which ends it too."""
    while not ((report := report_of(folder)).counts and enough(report.counts)):
        assert report.problems == ()
        await vm.console_output()
    return report


def patient(vm: Vm) -> None:
    machine = vm.host.machine
    assert machine is not None
    device = next(slot.backend for slot in machine.board.devices if isinstance(slot.backend, VsockDevice))
    device.set_patience(LIMIT_S, LIMIT_S)


class Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    @classmethod
    async def connect(cls, folder: Path, port: int) -> Client:
        """:raises ConnectionError: the guest does not take it."""
        stream = await trio.open_unix_socket(folder / "v.sock")
        client = cls(stream)
        await stream.send_all(b"CONNECT %d\n" % port)
        line = b""
        while not line.endswith(b"\n"):
            more = await stream.receive_some(1)
            if not more:
                await stream.aclose()
                raise ConnectionError(f"refused after {line!r}")
            line += more
        assert line.startswith(b"OK ")
        return client

    async def exactly(self, count: int) -> bytes:
        said = b""
        while len(said) < count:
            more = await self.stream.receive_some(count - len(said))
            assert more, f"ended after {len(said)} of {count} bytes"
            said += more
        return said

    async def echo(self, data: bytes) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stream.send_all, data)
            assert await self.exactly(len(data)) == data

    async def check_pattern(self, count: int, at: int = 0) -> None:
        """The next bytes are the pattern from ``at`` on."""
        while count:
            got = await self.stream.receive_some(min(count, 1 << 18))
            assert got, "ended"
            repeated = PATTERN * (2 + len(got) // PERIOD)
            assert got == repeated[at % PERIOD : at % PERIOD + len(got)]
            at, count = at + len(got), count - len(got)


@asynccontextmanager
async def echo_server(path: str) -> AsyncIterator[list[trio.SocketStream]]:
    """What it is told it says again; gives who has connected so far."""
    clients: list[trio.SocketStream] = []

    async def serve(stream: trio.SocketStream) -> None:
        clients.append(stream)
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                await stream.send_all(piece)

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen(16)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
        yield clients
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("options", [{}, {"event_idx": 1, "indirect": 1, "cpus": 2}], ids=["plain", "event_idx-2cpus"])
async def test_streams_both_ways(tmp_path: Path, options: dict[str, int]) -> None:
    enough = 4 << 20
    with trio.fail_after(LIMIT_S):
        config = config_of(tmp_path, vsock_out=SERVER, **options)
        async with echo_server(f"{tmp_path}/v.sock_{SERVER}"), open_vm(config) as vm:
            await vm.boot()
            echo = await Client.connect(tmp_path, ECHO)
            await echo.echo(bytes(each * 7 & 0xFF for each in range(50_000)))
            source = await Client.connect(tmp_path, SENDS)
            await source.check_pattern(enough)
            checks = await Client.connect(tmp_path, CHECKS)
            for _ in range(64):
                await checks.stream.send_all(PATTERN)
            with pytest.raises(ConnectionError):
                await Client.connect(tmp_path, 99)
            # What it hears back from the server comes on top of what it is told.
            report = await reported(
                vm, tmp_path, lambda it: it["vsock_checked"] > enough + 64 * PERIOD and it["vsock_accepted"] == 3
            )
            assert (report.errors, report.counts["vsock_connected"]) == (0, 1)
            assert report.counts["vsock_echoed"] == 50_000
            for each in (echo, source, checks):
                await each.stream.aclose()
            await reported(vm, tmp_path, lambda it: it["vsock_open"] == 1)
            counted = vm.counters()["_vsock0"]
            assert counted["open"] == 1
            assert not any(counted[name] for name in ("malformed", "misaddressed", "over_credit", "out_of_order"))


async def test_a_half_closed_stream_brings_the_rest(tmp_path: Path) -> None:
    """As ``socat - UNIX-CONNECT:…`` does with a file for its input."""
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            stream = await trio.open_unix_socket(tmp_path / "v.sock")
            said = bytes(each * 13 & 0xFF for each in range(20_000))
            got = b""

            async def hear() -> None:
                nonlocal got
                async for piece in stream:
                    got += piece

            async with trio.open_nursery() as nursery:
                nursery.start_soon(hear)
                await stream.send_all(b"CONNECT 1\n" + said)
                await stream.send_eof()
            line, _, rest = got.partition(b"\n")
            assert line.startswith(b"OK ")
            assert rest == said
            await stream.aclose()


async def test_a_thousand_clients(tmp_path: Path) -> None:
    many = 1000
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            patient(vm)  # a busy host may take longer than 2 s for 256 of them
            clients: dict[int, Client] = {}

            async def come(number: int) -> None:
                clients[number] = await Client.connect(tmp_path, ECHO)

            async with trio.open_nursery() as nursery:
                for number in range(many):
                    nursery.start_soon(come, number)
            report = await reported(vm, tmp_path, lambda it: it["vsock_open"] == many)
            async with trio.open_nursery() as nursery:
                for number, client in clients.items():
                    nursery.start_soon(client.echo, b"client number %d" % number)
            for client in clients.values():
                await client.stream.aclose()
            report = await reported(vm, tmp_path, lambda it: it["vsock_open"] == 0)
            assert report.errors == 0
            assert vm.counters()["_vsock0"]["established"] == many


async def test_peers_that_die_or_never_read_hurt_nobody_else(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            good = await Client.connect(tmp_path, ECHO)
            idle = [await Client.connect(tmp_path, SENDS) for _ in range(5)]  # they never read
            for number in range(30):
                victim = await Client.connect(tmp_path, (ECHO, CHECKS, SENDS)[number % 3])
                with trio.move_on_after(0.01):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(victim.stream.send_all, PATTERN)
                        nursery.start_soon(victim.exactly, 1 << 20)
                await victim.stream.aclose()
                await good.echo(b"number %d" % number)
            for number, client in enumerate(idle):  # what they did not read is there in order
                await client.check_pattern(300_000 + number)
                await client.stream.aclose()
            report = await reported(vm, tmp_path, lambda it: it["vsock_open"] == 1)
            assert (report.errors, report.problems) == (0, ())
            await good.stream.aclose()


async def test_a_move_resets_the_transport_and_hands_over_the_path(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with echo_server(f"{tmp_path}/v.sock_{SERVER}") as servers:
            async with open_road(config_of(tmp_path, vsock_out=SERVER, rate=100)) as road:
                for number in range(3):
                    client = await Client.connect(tmp_path, SENDS)
                    await client.check_pattern(100_000)
                    await road.move(f"unix:{tmp_path}/m{number}.sock")
                    with suppress(trio.BrokenResourceError):
                        while await client.stream.receive_some():
                            pass
                    await client.stream.aclose()

                    def moved(it: Mapping[str, int], number: int = number) -> bool:
                        return it["vsock_resets"] == number + 1 and it["vsock_connected"] >= number + 2

                    await reported(road.vm, tmp_path, moved)
                again = await Client.connect(tmp_path, ECHO)
                await again.echo(b"and on it goes")
                await again.stream.aclose()
                checked = report_of(tmp_path).counts["vsock_checked"]
                await reported(road.vm, tmp_path, lambda it: it["vsock_checked"] > checked)
                assert len(servers) >= 4
                assert report_of(tmp_path).errors == 0
                await road.vm.shutdown()
                assert not (tmp_path / "v.sock").exists()


async def test_a_switchover_that_is_undone_loses_nothing(tmp_path: Path) -> None:
    """Gate closed, state saved, path given away; and all the way back, in the middle of three streams."""
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            source, checks, echo = [await Client.connect(tmp_path, port) for port in (SENDS, CHECKS, ECHO)]
            machine: Any = vm.host.machine
            done = 0
            for _ in range(5):
                await source.check_pattern(200_000, done)
                done += 200_000
                await checks.stream.send_all(PATTERN)
                await machine.stop(5.0)
                machine.save()
                await machine.release_locks(5.0)
                assert not (tmp_path / "v.sock").exists()
                await machine.undo()
                await echo.echo(b"still there")
            late = await Client.connect(tmp_path, ECHO)
            await late.echo(b"and here")
            await reported(vm, tmp_path, lambda it: it["vsock_checked"] == 5 * PERIOD)
            await vm.pause()
            await checks.stream.send_all(PATTERN)
            await vm.resume()
            report = await reported(vm, tmp_path, lambda it: it["vsock_checked"] == 6 * PERIOD)
            assert (report.errors, report.counts["vsock_resets"], report.counts["vsock_open"]) == (0, 0, 4)
            for each in (source, checks, echo, late):
                await each.stream.aclose()


async def test_a_reboot_ends_the_streams_and_the_next_guest_has_its_own(tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            client = await Client.connect(tmp_path, SENDS)
            await client.check_pattern(100_000)
            await vm.reboot()
            with suppress(trio.BrokenResourceError):
                while await client.stream.receive_some():
                    pass
            await client.stream.aclose()
            again = await Client.connect(tmp_path, ECHO)
            await again.echo(b"hello again")
            await again.stream.aclose()
            assert report_of(tmp_path).problems == ()


async def test_the_example_talks_with_the_guest(tmp_path: Path) -> None:
    said = b"hello, guest\n" * 1000
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(tmp_path)) as vm:
            await vm.boot()
            for port, code, heard in ((ECHO, 0, said), (99, 1, b"")):
                command = [sys.executable, str(EXAMPLE), str(tmp_path / "v.sock"), str(port)]
                done = await trio.run_process(
                    command, stdin=said, capture_stdout=True, stderr=subprocess.DEVNULL, check=False
                )
                assert (done.returncode, done.stdout) == (code, heard)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("cid=2,socket=v", "vsock.cid = 2: no guest can have that address"),
        ("cid=3", "no socket; give socket=PATH"),
        (f"cid=3,socket={'a' * 97}", "has more than 96 bytes"),
        ("cid=3,socket=taken", "exists and is not a socket"),
    ],
)
def test_mistakes_cost_one_line(option: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    words = ["--kernel", str(probe_path()), "--serial", "null", "--vsock", option]
    command = [sys.executable, "-m", "trivmm", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]
