"""Sender and receiver over real sockets, pages through C, with threads that dirty memory all the while."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, DeadlineError, MigrationError, TrivmmError
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.link.halves import LinkLost
from trivmm.migration.link.roles import open_control
from trivmm.migration.link.transports import SocketDialer, TcpAddress, UnixAddress, listen, parse_url
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationProgress, MigrationReport, Phase
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.migration.wire import messages as m
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

MIB = 1 << 20
RAM = ((0, 24 * MIB), (1 << 32, 8 * MIB))
LIMITS = Deadlines(commit=5.0, stall=20.0, downtime=10.0)
PATIENT = SendOptions(downtime_ms=10_000, timeout_s=120)


class Mutator:
    """A guest: writes random pages while its machine runs, and remembers the last generation of each."""

    def __init__(self, source: FakeSource, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.writes = 0
        self._halt = threading.Event()
        self._in_write = threading.Lock()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        chance = random.Random(self.seed)
        native = self.source.memory.native
        while not self._halt.is_set():
            with self._in_write:  # a stop of the machine waits for the write at hand
                if self.source.running:
                    gpa, size = RAM[chance.randrange(len(RAM))]
                    page = chance.randrange(size // 4096 // 8)  # an eighth of the memory is hot
                    data = bytes(4096) if chance.randrange(8) == 0 else chance.randbytes(64) * 64
                    lib.tv_memory_write(native, gpa + page * 4096, ffi.from_buffer("uint8_t[]", data), 4096)
                    self.writes += 1
            self._halt.wait(0.0005)

    def settle(self) -> None:
        with self._in_write:
            pass

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._halt.set()
            self._thread.join(60)
            assert not self._thread.is_alive()


@pytest.fixture
def machines() -> Iterator[tuple[FakeSource, FakeDestination]]:
    lock = DiskLock()
    source, destination = FakeSource(lock, LIMITS, RAM), FakeDestination(lock, LIMITS, RAM)
    chance = random.Random(1)
    for gpa, size in RAM:
        for page in range(0, size // 4096, 3):
            source.memory.write(gpa + page * 4096, chance.randbytes(256) * 16)
    yield source, destination
    source.close()
    destination.close()


@pytest.fixture(params=["unix", "tcp", "tcp6"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "tcp6":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 loopback here")
    return {"unix": f"unix:{tmp_path}/m.sock", "tcp": "tcp:127.0.0.1:0", "tcp6": "tcp:[::1]:0"}[request.param]


async def test_a_dirtying_machine_moves_and_loses_no_page(
    machines: tuple[FakeSource, FakeDestination], url: str, tmp_path: Path
) -> None:
    source, destination = machines
    guests = [Mutator(source, seed) for seed in (1, 2)]
    source.on_stopped = lambda: [guest.settle() for guest in guests] and None
    before = set(os.listdir("/proc/self/fd"))
    seen: list[MigrationProgress] = []
    with trio.fail_after(120), guests[0].running(), guests[1].running():
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
            sent: list[MigrationReport] = []

            async def go() -> None:
                sent.append(await send(source, socket_dialer(receiver.url, source.deadlines), PATIENT, seen.append))

            nursery.start_soon(go)
            machine, report = await receiver.receive(destination.factory)
    assert machine is destination
    assert destination.running
    assert not source.running
    assert source.contents() == destination.contents()
    assert sent[0].outcome is Phase.DONE
    assert sent[0].pages == report.pages > 2000
    assert sent[0].zero_pages == report.zero_pages
    assert sum(guest.writes for guest in guests) > 0
    assert os.listdir(tmp_path) == []
    assert set(os.listdir("/proc/self/fd")) <= before


async def test_there_and_back_again_over_the_same_address(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/m.sock"
    with trio.fail_after(120):
        for _ in range(3):
            lock = DiskLock()
            source, destination = FakeSource(lock, LIMITS), FakeDestination(lock, LIMITS)
            source.memory.write(0, b"hello")
            async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
                nursery.start_soon(send, source, socket_dialer(url, source.deadlines), PATIENT)
                await receiver.receive(destination.factory)
            assert destination.memory.read(0, 5) == b"hello"
            source.close()
            destination.close()


@pytest.mark.parametrize("after_pages", [0, 500, 2500])
async def test_a_cancelled_sender_leaves_the_source_running_and_the_next_works(
    machines: tuple[FakeSource, FakeDestination], url: str, after_pages: int
) -> None:
    source, destination = machines
    guest = Mutator(source, 3)
    source.on_stopped = guest.settle
    with trio.fail_after(120), guest.running():
        taken: list[Exception] = []
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
            scope = trio.CancelScope()

            def progress(now: MigrationProgress) -> None:
                if now.phase is not Phase.SETUP and now.pages >= after_pages:
                    scope.cancel()

            async def go() -> None:
                with scope:
                    await send(source, socket_dialer(receiver.url, source.deadlines), PATIENT, progress)

            nursery.start_soon(go)
            try:
                await receiver.receive(destination.factory)
            except MigrationError as error:
                taken.append(error)
        assert scope.cancelled_caught
        assert source.running
        assert source.throttle == 0
        assert not source.logging
        assert "cancelled" in str(taken[0])
        again = FakeDestination(source.lock, LIMITS, RAM)
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:
            nursery.start_soon(send, source, socket_dialer(receiver.url, source.deadlines), PATIENT)
            await receiver.receive(again.factory)
    assert again.running
    assert source.contents() == again.contents()
    again.close()


async def test_a_cancelled_receiver_leaves_the_source_running(
    machines: tuple[FakeSource, FakeDestination], url: str
) -> None:
    source, destination = machines
    with trio.fail_after(120):
        failed: list[Exception] = []
        async with trio.open_nursery() as nursery, open_receiver(url, LIMITS, nursery) as receiver:

            async def go() -> None:
                try:
                    await send(source, socket_dialer(receiver.url, source.deadlines), PATIENT)
                except TrivmmError as error:
                    failed.append(error)

            nursery.start_soon(go)
            with trio.CancelScope() as scope:
                await receiver.receive(destination.factory, lambda now: scope.cancel() if now.pages else None)
            assert scope.cancelled_caught
    assert source.running
    assert isinstance(failed[0], MigrationError)


async def test_a_silent_peer_is_a_named_error_on_both_sides(url: str) -> None:
    lock = DiskLock()
    short = Deadlines(handshake=0.2, accept=0.5, stall=0.2)
    source, destination = FakeSource(lock, short), FakeDestination(lock, short)
    with trio.fail_after(60):
        listener = await listen(parse_url(url, "receiver_url"), short)
        with pytest.raises(DeadlineError) as caught:
            await send(source, socket_dialer(listener.url, source.deadlines))
        assert caught.value.name in ("handshake", "stall")
        listener.close()
        async with trio.open_nursery() as nursery, open_receiver(url, short, nursery) as receiver:
            address = parse_url(receiver.url, "x")
            if isinstance(address, UnixAddress):
                stream = await trio.open_unix_socket(address.path)
            else:
                stream = await trio.open_tcp_stream(address.host, address.port)
            with pytest.raises(DeadlineError) as caught:
                await receiver.receive(destination.factory)
            await stream.aclose()
        assert caught.value.name == "accept"
    assert source.running
    source.close()
    destination.close()


async def test_nobody_listens(tmp_path: Path) -> None:
    source = FakeSource(DiskLock(), LIMITS)
    with pytest.raises(MigrationError, match="is a receiver waiting there"):
        await send(source, socket_dialer(f"unix:{tmp_path}/none.sock", source.deadlines))
    assert source.running
    source.close()


# --- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:/a/b", UnixAddress("/a/b")),
        ("unix:///a/b", UnixAddress("/a/b")),
        ("tcp:host:12", TcpAddress("host", 12)),
        ("tcp://1.2.3.4:65535", TcpAddress("1.2.3.4", 65535)),
        ("tcp:[::1]:7", TcpAddress("::1", 7)),
    ],
)
def test_urls(url: str, address: object) -> None:
    parsed = parse_url(url, "destination_url")
    assert parsed == address
    assert parse_url(str(parsed), "x") == parsed


@pytest.mark.parametrize(
    "url",
    [
        "",
        "unix:",
        "file:/x",
        "tcp:host",
        "tcp::1",
        "tcp:h:",
        "tcp:h:x",
        "tcp:h:65536",
        "tcp:::1:7",
        "unix:" + "x" * 108,
    ],
)
def test_bad_urls_name_the_field(url: str) -> None:
    with pytest.raises(ConfigError, match="destination_url"):
        parse_url(url, "destination_url")


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "\u0663", "xn--\u0663", "a\0b"])
async def test_a_host_name_that_cannot_be_one_is_named(host: str) -> None:
    source = FakeSource(DiskLock(), LIMITS)
    with pytest.raises(MigrationError, match="cannot connect"):
        await send(source, socket_dialer(f"tcp:{host}:1", source.deadlines))
    assert source.running
    source.close()
    with pytest.raises(ConfigError, match="receiver_url"):
        await listen(parse_url(f"tcp:{host}:1", "receiver_url"), LIMITS)


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    first = await listen(UnixAddress(str(path)), LIMITS)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="in use by another process"):
        await listen(UnixAddress(str(path)), LIMITS)
    assert path.exists()
    first.close()
    assert os.listdir(tmp_path) == []

    foreign = socket.socket(socket.AF_UNIX)
    foreign.bind(str(path))
    foreign.listen()
    with pytest.raises(ConfigError, match="in use by another process"):
        await listen(UnixAddress(str(path)), LIMITS)
    foreign.close()
    path.unlink()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        await listen(UnixAddress(str(path)), LIMITS)
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot make"):
        await listen(UnixAddress(str(tmp_path / "no" / "m.sock")), LIMITS)


async def test_a_port_in_use_is_named() -> None:
    first = await listen(TcpAddress("127.0.0.1", 0), LIMITS)
    with pytest.raises(ConfigError, match="cannot listen"):
        await listen(parse_url(first.url, "x"), LIMITS)
    first.close()


async def test_a_lost_link_is_an_error_whose_chain_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as peer, trio.fail_after(30):
        peer.bind(str(path))
        peer.listen(1)
        link = await open_control(SocketDialer(UnixAddress(str(path)), LIMITS), bytes(16))
        peer.accept()[0].close()
        with pytest.raises(LinkLost) as caught:
            await link.send(m.Setup({}, ()))
        await link.close()
    chain: list[BaseException] = []
    error: BaseException | None = caught.value
    while error is not None:
        assert error not in chain
        chain.append(error)
        error = error.__cause__


async def test_a_new_receiver_takes_over_from_one_that_only_answers_questions(tmp_path: Path) -> None:
    """And goes on answering for it: a source whose link died after COMMIT still hears the verdict."""
    url = f"unix:{tmp_path}/m.sock"
    long = Deadlines(commit=60.0)
    dialer = SocketDialer(parse_url(url, "destination_url"), long)
    first = DiskLock()
    source, destination = FakeSource(first, long), FakeDestination(first, long)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            verdicts = Verdicts(nursery)
            async with open_receiver(url, long, nursery, verdicts) as receiver:
                session = bytes(range(16))
                link = await open_control(dialer, session)

                async def source_without_an_end() -> None:
                    memory = tuple((region.gpa, region.size) for region in source.memory.regions)
                    await link.send(m.Setup(source.describe(), memory))
                    await link.expect(m.SetupOk)
                    await source.stop(1)
                    await link.send(m.State(source.save()))
                    await link.expect(m.Ready)
                    await source.release_locks(10)
                    await link.send(m.Commit(session))
                    await link.close()

                nursery.start_soon(source_without_an_end)
                await receiver.receive(destination.factory)
            async with open_receiver(url, long, nursery, verdicts) as again:
                other = DiskLock()
                next_source, next_destination = FakeSource(other, long), FakeDestination(other, long)
                nursery.start_soon(again.receive, next_destination.factory)
                asking = await open_control(dialer, session)
                await asking.send(m.Query())
                assert (await asking.expect(m.Verdict)).fate is m.Fate.RUNNING
                await asking.close()
                await send(next_source, socket_dialer(again.url, next_source.deadlines), PATIENT)
    assert destination.running
    assert next_destination.running
    for each in (source, destination, next_source, next_destination):
        each.close()
