"""Pseudo-terminals and sockets as the other end of a line: both ways, nobody there, coming and going, a guest that
doesn't read."""

from __future__ import annotations

import errno
import os
import stat
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm._native import ffi, lib
from trivmm.config import SerialConfig
from trivmm.errors import ConfigError
from trivmm.platform.serial import Serial
from trivmm.platform.sinks import BACKLOG_BYTES, ClientSink, PtySink, SocketSink, open_sink
from trivmm.testing.driver import until

LIMIT_S = 30
THR, LSR = 0, 5


@asynccontextmanager
async def running(serial: Serial) -> AsyncIterator[None]:
    """The line's tasks; closed at the end unless its sink is kept."""
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            yield
            nursery.cancel_scope.cancel()
    serial.close()


def say(serial: Serial, data: bytes) -> None:
    """As the guest does, which never looks whether anybody reads, only at LSR.THRE."""
    assert serial.read(LSR, 1)[0] & 0x20
    lib.tv_uart_pio(serial.native, THR, 1, 1, ffi.new("uint8_t[]", data), len(data))


async def say_all(serial: Serial, data: bytes) -> None:
    for at in range(0, len(data), 4096):
        await until(lambda: bool(serial.read(LSR, 1)[0] & 0x20))
        say(serial, data[at : at + 4096])
    await serial.drain(LIMIT_S)


async def hear(serial: Serial, length: int) -> bytes:
    """As a guest that polls for its input."""
    heard = b""
    while len(heard) < length:
        await trio.lowlevel.checkpoint()
        while serial.read(LSR, 1)[0] & 1:
            heard += serial.read(THR, 1)
    return heard


class Client:
    """The other end, by a descriptor: of a terminal or a socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    @classmethod
    def of_pty(cls, path: str) -> Client:
        return cls(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))

    @classmethod
    async def of_socket(cls, path: Path) -> Client:
        return cls((await trio.open_unix_socket(path)).socket.detach())

    async def read(self, length: int) -> bytes:
        """At least so many bytes."""
        got = b""
        while len(got) < length:
            await trio.lowlevel.wait_readable(self.fd)
            piece = os.read(self.fd, 65536)
            assert piece, f"the end after {got!r}"
            got += piece
        return got

    async def ended(self) -> bool:
        await trio.lowlevel.wait_readable(self.fd)
        return os.read(self.fd, 1) == b""

    async def write(self, data: bytes) -> None:
        while data:
            await trio.lowlevel.wait_writable(self.fd)
            data = data[os.write(self.fd, data) :]

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)


async def test_a_pty_is_raw_and_goes_both_ways() -> None:
    sink = PtySink("serial")
    serial = Serial(sink)
    async with running(serial):
        assert sink.path is not None
        client = Client.of_pty(sink.path)
        input_flags, output_flags, _, local_flags, *_ = termios.tcgetattr(client.fd)
        assert not local_flags & (termios.ICANON | termios.ECHO | termios.ISIG)
        assert not output_flags & termios.OPOST
        assert not input_flags & (termios.ICRNL | termios.IXON)
        every = bytes(range(256))
        say(serial, every)
        assert await client.read(256) == every
        await client.write(every)
        assert await hear(serial, 256) == every
        client.close()
    assert sink.path is None


async def test_what_is_said_while_nobody_has_the_pty_open_is_there_for_the_next_client() -> None:
    sink = PtySink("serial")
    serial = Serial(sink)
    async with running(serial):
        assert sink.path is not None
        boot = b"".join(b"line %06d\n" % number for number in range(20_000))
        await say_all(serial, boot)  # more than the kernel holds of a terminal: it never waits
        first = Client.of_pty(sink.path)
        assert await first.read(len(boot)) == boot
        first.close()
        say(serial, b"nobody")
        second = Client.of_pty(sink.path)
        assert await second.read(6) == b"nobody"
        await second.write(b"typed")
        assert await hear(serial, 5) == b"typed"
        second.close()
    assert sink.dropped == 0


@pytest.mark.parametrize("kind", ["Pty", "Socket"])
async def test_the_guest_never_waits_and_what_is_pushed_out_is_counted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    sink = open_sink(SerialConfig(kind, socket=str(path)))
    assert isinstance(sink, ClientSink)
    serial = Serial(sink)
    said = b"".join(b"%07d\n" % number for number in range((BACKLOG_BYTES + 400_000) // 8))
    async with running(serial):
        await say_all(serial, said)
        assert serial.total == len(said)
        assert 0 < sink.dropped < 400_000 + 8
        assert serial.counters()["unread_dropped"] == sink.dropped
        client = Client.of_pty(sink.path) if sink.path else await Client.of_socket(path)
        got = await client.read(len(said) - sink.dropped)
        assert got.endswith(said[-BACKLOG_BYTES:])  # the last MiB, without a hole
        client.close()


async def test_a_guest_that_does_not_read_holds_its_client_up_and_loses_nothing() -> None:
    sink = PtySink("serial")
    serial = Serial(sink)
    typed = bytes(each & 0x7F for each in range(100_000))
    async with running(serial):
        assert sink.path is not None
        client = Client.of_pty(sink.path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.write, typed)
            await until(lambda: not serial.room)
            say(serial, b"still heard")  # its input being full is no reason not to show what it says
            assert await client.read(11) == b"still heard"
            assert await hear(serial, len(typed)) == typed
        client.close()


async def test_input_waits_while_the_state_is_saved_and_goes_on_after_an_undo() -> None:
    """Else it would be lost: the state that travels was read before."""
    sink = PtySink("serial")
    serial = Serial(sink)
    async with running(serial):
        assert sink.path is not None
        client = Client.of_pty(sink.path)
        await client.write(b"before")
        await until(lambda: serial.counters()["rx_bytes"] >= 6)
        state = serial.save()
        await client.write(b"after")
        assert serial.push_input(b"by hand") == 0
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert serial.counters()["rx_bytes"] == 6
        serial.thaw()
        assert await hear(serial, 11) == b"beforeafter"
        client.close()
    twin = Serial()
    twin.load(state)
    assert await hear(twin, 6) == b"before"
    twin.close()


async def test_a_socket_goes_both_ways_for_one_client_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "s"
    serial = Serial(SocketSink(str(path), "serial"))
    async with running(serial):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        say(serial, b"early")
        first = await Client.of_socket(path)
        assert await first.read(5) == b"early"
        await first.write(b"one")
        assert await hear(serial, 3) == b"one"
        second = await Client.of_socket(path)  # takes its place, as with Cloud Hypervisor
        assert await first.ended()
        first.close()
        say(serial, b"to the second")
        assert await second.read(13) == b"to the second"
        second.close()
        third = await Client.of_socket(path)
        await third.write(b"three")
        assert await hear(serial, 5) == b"three"
        third.close()
    assert os.listdir(tmp_path) == []


async def test_output_for_a_socket_client_that_went_away_waits_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sink = SocketSink(str(path), "serial")
    serial = Serial(sink)
    async with running(serial):
        first = await Client.of_socket(path)
        say(serial, b"x")
        assert await first.read(1) == b"x"
        first.close()
        say(serial, b"nobody heard this")
        await serial.drain(LIMIT_S)
        second = await Client.of_socket(path)
        assert await second.read(17) == b"nobody heard this"
        second.close()
    assert sink.dropped == 0


async def test_a_socket_client_that_stops_sending_still_hears(tmp_path: Path) -> None:
    path = tmp_path / "s"
    serial = Serial(SocketSink(str(path), "serial"))
    async with running(serial):
        stream = await trio.open_unix_socket(path)
        await stream.send_all(b"all I have to say")
        await stream.send_eof()
        assert await hear(serial, 17) == b"all I have to say"
        say(serial, b"answer")
        got = b""
        while len(got) < 6:
            got += await stream.receive_some()
        assert got == b"answer"
        await stream.aclose()


async def test_a_socket_client_that_does_not_read_does_not_hold_the_guest_up(tmp_path: Path) -> None:
    path = tmp_path / "s"
    serial = Serial(SocketSink(str(path), "serial"))
    said = bytes(each & 0xFF for each in range(900_000))
    async with running(serial):
        client = await Client.of_socket(path)
        await say_all(serial, said)
        assert await client.read(len(said)) == said
        client.close()


async def test_a_socket_path_is_handed_over_at_commit_and_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sink = SocketSink(str(path), "serial")
    serial = Serial(sink)
    async with running(serial):
        client = await Client.of_socket(path)
        say(serial, b"x")
        assert await client.read(1) == b"x"
        with pytest.raises(ConfigError, match=r"serial\.socket = .*in use"):
            SocketSink(str(path), "serial")
        serial.release()
        serial.release()
        other = SocketSink(str(path), "serial")
        with pytest.raises(ConfigError, match="in use"):
            serial.retake()
        other.close()
        serial.retake()
        serial.retake()
        say(serial, b"y")  # its client noticed nothing
        assert await client.read(1) == b"y"
        client.close()
        again = await Client.of_socket(path)
        await again.write(b"z")
        assert await hear(serial, 1) == b"z"
        again.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["Pty", "Socket"])
async def test_a_kept_sink_keeps_its_path_and_its_client(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    sink = open_sink(SerialConfig(kind, socket=str(path)))
    assert isinstance(sink, ClientSink)
    before = Serial(sink)
    async with running(before):
        client = Client.of_pty(sink.path) if sink.path else await Client.of_socket(path)
        say(before, b"down")
        assert await client.read(4) == b"down"
        before.keeps_sink = True
    after = Serial(sink)
    async with running(after):
        say(after, b"up")
        assert await client.read(2) == b"up"
        await client.write(b"ok")
        assert await hear(after, 2) == b"ok"
        client.close()


async def test_at_the_end_a_client_that_reads_gets_the_rest_and_one_that_does_not_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "s"
    serial = Serial(SocketSink(str(path), "serial"))
    rest = bytes(900_000)
    async with running(serial):
        client = await Client.of_socket(path)
        await say_all(serial, rest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read, len(rest))
            await serial.flush()
        await say_all(serial, rest)
        await serial.flush()  # it returns, though nobody reads
        client.close()


async def test_a_pty_that_breaks_is_told_and_the_guest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sink = PtySink("serial")
    serial = Serial(sink)

    async def broken(fd: int, guest: object) -> OSError:
        await trio.lowlevel.checkpoint()
        return OSError(errno.EIO, "Input/output error")

    sink._carry = broken  # type: ignore[method-assign]
    async with running(serial):
        await until(lambda: serial.sink is not sink)
        say(serial, b"x")
        assert await serial.drain(LIMIT_S)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "cannot be used any more ([Errno 5] Input/output error); the guest goes on without it"
    ]


@pytest.mark.parametrize(
    ("path", "said"), [("x" * 200, "at most 107 bytes"), ("no/where", "cannot make"), (".", "not a socket")]
)
def test_what_is_no_socket(path: str, said: str, tmp_path: Path) -> None:
    where = path if path.startswith("x") else str(tmp_path / path)
    with pytest.raises(ConfigError, match=rf"serial\.socket = .*{said}"):
        SocketSink(where, "serial")


def test_a_host_without_pseudo_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[int, int]:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "openpty", none)
    with pytest.raises(ConfigError, match=r'console\.mode = "Pty": no pseudo-terminal to be had.*mount devpts'):
        PtySink("console")
