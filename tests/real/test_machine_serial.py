"""The UART in C and the task that drains it, on real descriptors."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.config import SerialConfig
from trivmm.errors import ConfigError, ProtocolError
from trivmm.platform.serial import Serial
from trivmm.platform.sinks import FdSink, NullSink, open_sink, plain
from trivmm.testing.driver import until
from trivmm.testing.states import sent

THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


@pytest.fixture
def serial() -> Iterator[Serial]:
    made = Serial(NullSink())
    yield made
    made.close()
    made.close()


def reg(serial: Serial, offset: int) -> int:
    return serial.read(offset, 1)[0]


def put(serial: Serial, offset: int, value: int) -> None:
    serial.write(offset, bytes([value]))


def pulsed(serial: Serial) -> bool:
    try:
        return os.eventfd_read(serial.irq_fd) > 0
    except BlockingIOError:
        return False


def test_plain_registers(serial: Serial) -> None:
    assert reg(serial, LSR) == 0x60
    assert reg(serial, IIR) == 0x01
    assert reg(serial, MSR) == 0xB0
    put(serial, SCR, 0x5A)
    assert reg(serial, SCR) == 0x5A
    put(serial, IER, 0xFF)
    assert reg(serial, IER) == 0x0F
    put(serial, LCR, 0x83)
    serial.write(0, b"\x01\x02")  # a word reaches both divisor bytes
    assert serial.read(0, 2) == b"\x01\x02"
    put(serial, LCR, 0x03)
    assert reg(serial, IER) == 0x0F
    put(serial, IIR, 0x01)
    assert reg(serial, IIR) & 0xC0 == 0xC0
    assert serial.read(7, 4) == b"\x5a\xff\xff\xff"


def test_thre_interrupt_is_an_edge_each_time(serial: Serial) -> None:
    assert not pulsed(serial)
    put(serial, IER, 2)
    assert pulsed(serial)
    assert reg(serial, IIR) == 0x02
    assert reg(serial, IIR) == 0x01  # reading it took it away
    put(serial, THR, ord("x"))
    assert pulsed(serial)
    put(serial, IER, 0)
    assert reg(serial, IIR) == 0x01
    put(serial, THR, ord("y"))
    assert not pulsed(serial)


def test_receive(serial: Serial) -> None:
    assert serial.push_input(b"ab") == 2
    assert not pulsed(serial)
    put(serial, IER, 1)
    assert pulsed(serial)
    assert reg(serial, IIR) == 0x04
    assert reg(serial, LSR) & 1
    assert reg(serial, THR) == ord("a")
    assert pulsed(serial)  # the next byte arrives
    assert reg(serial, THR) == ord("b")
    assert not pulsed(serial)
    assert reg(serial, IIR) == 0x01
    assert serial.push_input(bytes(5000)) == 4096
    put(serial, IIR, 2)
    assert not reg(serial, LSR) & 1


def test_loopback(serial: Serial) -> None:
    put(serial, MCR, 0x1A)
    assert reg(serial, MSR) & 0xF0 == 0x90
    assert reg(serial, MSR) & 0x0F == 0
    put(serial, THR, 0x42)
    assert reg(serial, THR) == 0x42
    assert lib.tv_line_tx_used(serial.rings) == 0
    put(serial, IER, 8)
    put(serial, MCR, 0x10)
    assert pulsed(serial)
    assert reg(serial, IIR) == 0x00
    assert reg(serial, MSR) & 0x0F == 0x09
    assert reg(serial, IIR) == 0x01
    for _ in range(4097):
        put(serial, THR, 1)
    assert reg(serial, LSR) & 2
    assert not reg(serial, LSR) & 2


def test_a_full_ring_takes_thre_away_and_draining_gives_it_back(serial: Serial) -> None:
    put(serial, IER, 2)
    written = 0
    while reg(serial, LSR) & 0x20:
        put(serial, THR, written & 0xFF)
        written += 1
    assert written == 65536 - 4096 + 1
    pulsed(serial)
    assert reg(serial, IIR) == 0x01
    into = ffi.new("uint8_t[]", 65536)
    assert lib.tv_line_peek_tx(serial.rings, into, 65536) == written
    lib.tv_line_consume_tx(serial.rings, written)
    assert bytes(ffi.buffer(into, written)) == bytes(each & 0xFF for each in range(written))
    assert pulsed(serial)
    assert reg(serial, IIR) == 0x02
    for _ in range(65536 + 3):
        put(serial, THR, 0)
    assert serial.counters()["tx_dropped"] == 3


def test_string_output(serial: Serial) -> None:
    data = b"hello, string instruction"
    assert lib.tv_uart_pio(serial.native, 0, 1, 1, ffi.new("uint8_t[]", data), len(data)) == 0
    assert lib.tv_line_tx_used(serial.rings) == len(data)


def test_state_travels(serial: Serial) -> None:
    put(serial, IER, 3)
    put(serial, SCR, 7)
    serial.write(0, b"o")
    serial.push_input(b"in")
    state = serial.save()
    twin = Serial()
    try:
        twin.load(sent(state))
        assert pulsed(twin)
        assert reg(twin, SCR) == 7
        assert lib.tv_line_tx_used(twin.rings) == 1
        assert reg(twin, THR) == ord("i")
    finally:
        twin.close()


@pytest.mark.parametrize(
    "change",
    [
        {"ier": 256},
        {"ier": True},
        {"overrun": 1},
        {"tx": "!"},
        {"tx": 4},
        {"rx": "AAAA" * 1400},
        {"rx": None},
        {"more": 0},
    ],
)
def test_hostile_state(serial: Serial, change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        sent(serial.save(), **change)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 65535), st.booleans(), st.binary(min_size=1, max_size=8)), max_size=50))
def test_any_access_is_survived(accesses: list[tuple[int, bool, bytes]]) -> None:
    serial = Serial()
    try:
        for offset, write, data in accesses:
            if write:
                serial.write(offset, data)
            else:
                assert len(serial.read(offset, len(data))) == len(data)
        serial.load(serial.save())
    finally:
        serial.close()


async def test_output_reaches_file_and_watchers(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    serial = Serial(open_sink(SerialConfig(mode="File", file=str(path))))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            watcher = serial.subscribe()
            for byte in b"boot ok\nready\n":
                put(serial, THR, byte)
            await until(lambda: serial.tail().endswith(b"ready\n"))
            assert (await watcher.receive()).startswith(b"boot")
            assert await serial.drain(20)
            assert serial.tail() == b"boot ok\nready\n"
            assert serial.tail(8) == b"ready\n"
            nursery.cancel_scope.cancel()
    serial.close()
    assert path.read_text() == "boot ok\nready\n"
    more = Serial(open_sink(SerialConfig(mode="File", file=str(path)), incoming=True))
    more.close()
    assert path.read_text() == "boot ok\nready\n"


async def test_a_slow_reader_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    serial = Serial(FdSink(writer))
    total = 300_000
    got = bytearray()

    def guest() -> None:
        sent = 0
        while sent < total:
            if reg(serial, LSR) & 0x20:
                room = min(4096, total - sent)
                data = bytes((sent + each) & 0xFF for each in range(room))
                lib.tv_uart_pio(serial.native, 0, 1, 1, ffi.new("uint8_t[]", data), room)
                sent += room
            else:
                pause.wait(0.001)

    pause = threading.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            nursery.start_soon(trio.to_thread.run_sync, guest)
            while len(got) < total:
                await trio.lowlevel.wait_readable(reader)
                got += os.read(reader, 5000)
            nursery.cancel_scope.cancel()
    serial.close()
    os.close(reader)
    assert bytes(got) == bytes(each & 0xFF for each in range(total))


async def test_a_sink_that_fails_is_named_and_replaced(serial: Serial, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    serial.attach_sink(FdSink(writer))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            put(serial, THR, ord("x"))
            assert await serial.drain(20)
            nursery.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records] == [
        "serial: cannot write the output any more ([Errno 32] Broken pipe); the guest goes on without it"
    ]
    assert serial.tail() == b"x"


async def test_a_disk_that_is_full_in_the_middle_of_a_piece(
    tmp_path: Path, serial: Serial, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "out", os.write
    room = [3000, 0]

    def fill(fd: int, data: bytes) -> int:
        left = room.pop(0) if room else 0
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:left])

    said = bytes(each * 7 & 0xFF for each in range(10_000))
    lib.tv_uart_pio(serial.native, 0, 1, 1, ffi.new("uint8_t[]", said), len(said))
    serial.attach_sink(FdSink(os.open(path, os.O_WRONLY | os.O_CREAT)))
    monkeypatch.setattr(plain.os, "write", fill)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            assert await serial.drain(20)
            nursery.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records] == [
        "serial: cannot write the output any more ([Errno 28] No space left on device); the guest goes on without it"
    ]
    assert path.read_bytes() == said[:3000]
    assert serial.tail() == said


async def test_a_sink_that_is_replaced_while_it_waits(serial: Serial, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    said = bytes(each * 7 & 0xFF for each in range(60_000))
    assert fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096) == 4096
    serial.attach_sink(FdSink(writer))
    lib.tv_uart_pio(serial.native, 0, 1, 1, ffi.new("uint8_t[]", said), len(said))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            await trio.testing.wait_all_tasks_blocked()
            serial.attach_sink(NullSink())
            assert await serial.drain(20)
            nursery.cancel_scope.cancel()
    assert serial.tail() == said
    assert not caplog.records
    assert os.read(reader, 5000) == said[:4096]
    os.close(reader)


async def test_saved_output_is_not_sent_twice_but_goes_on_after_an_undo() -> None:
    serial = Serial()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            serial.write(0, b"a")
            assert not await serial.drain(0.01)
            state = serial.save()
            serial.attach_sink(NullSink())
            assert not await serial.drain(0.05)
            serial.thaw()
            await until(lambda: serial.tail() == b"a")
            state = serial.save()
            assert state.tx == b""
            serial.write(0, b"b")  # it runs after all
            await until(lambda: serial.tail() == b"ab")
            nursery.cancel_scope.cancel()
    serial.close()


async def test_feed_waits_for_room(serial: Serial) -> None:
    done = trio.Event()
    read = bytearray()

    async def feeder() -> None:
        await serial.feed(bytes(6000))
        done.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(serial.run)
            nursery.start_soon(feeder)
            while len(read) < 6000:
                await trio.lowlevel.checkpoint()
                if reg(serial, LSR) & 1:
                    read += serial.read(0, 1)
            await done.wait()
            nursery.cancel_scope.cancel()


def test_output_into_a_file_shares_its_position_with_everybody_else(tmp_path: Path) -> None:
    """``trivmm --serial tty > log 2>&1``: the guest's lines and ours follow each other."""
    said = """
import trio
from trivmm.config import SerialConfig
from trivmm.platform.sinks import open_sink
class Output:
    def lend(self, count): pass
    def peek(self): return self.line
    def consume(self, count): assert count == len(self.line)
output, sink = Output(), open_sink(SerialConfig("Tty"))
for output.line in (b"one\\n", b"three\\n"):
    trio.run(sink.take, output)
    print("between", flush=True)
sink.close()
"""
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.write(b"before\n")
        file.flush()
        subprocess.run([sys.executable, "-c", said], stdout=file, check=True, timeout=60)
        file.write(b"after\n")
    assert log.read_text().split() == ["before", "one", "between", "three", "between", "after"]


def test_bad_sinks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (str(tmp_path), str(tmp_path / "no" / "such"), str(fifo), "a\0b"):
        with pytest.raises(ConfigError, match="serial"):
            open_sink(SerialConfig(mode="File", file=path))
    with pytest.raises(ConfigError):
        open_sink(SerialConfig(mode="File"))
