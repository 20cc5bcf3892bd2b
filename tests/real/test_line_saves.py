"""A line's state is saved, or its tasks are cancelled, at every await of theirs: each byte of the guest's output is
either the sink's or in the saved state, and each byte that was typed reaches one guest. Never both, never none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
import trio.testing

from trivmm._native import lib
from trivmm.platform.line import Line
from trivmm.platform.serial import Serial
from trivmm.platform.sinks import FdSink, NullSink, PtySink, Sink, plain
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.driver import until
from trivmm.virtio.console.line import ConsoleLine

LIMIT_S = 240
OUTPUT: Final = b"".join(b"%07d\n" % number for number in range(6000))  # three pieces
TYPED: Final = b"".join(b"%03d," % (number % 1000) for number in range(2500))  # more than twice what the ring holds
PIPE_BYTES: Final = 4096
SHORT: Final = 3000  # a file's disk takes no more at once
LINES = pytest.mark.parametrize("kind", ["serial", "console"])


# --- the two lines -------------------------------------------------------------------------------------------------


def a_line(kind: str, sink: Sink, output: bytes = b"") -> Line:
    """With ``output`` in its ring."""
    line: Line = Serial(sink) if kind == "serial" else ConsoleLine(sink)
    load(line, output, b"")
    return line


def load(line: Line, output: bytes, typed: bytes) -> None:
    if isinstance(line, Serial):
        line.load(attrs.evolve(line.save(), tx=output, rx=typed))
    else:
        assert isinstance(line, ConsoleLine)
        line.load(0, output, typed)
    line.thaw()


def save(line: Line) -> tuple[bytes, bytes]:
    """The output and the input that travel."""
    if isinstance(line, Serial):
        state = line.save()
        return state.tx, state.rx
    assert isinstance(line, ConsoleLine)
    _, tx, rx = line.save()
    return tx, rx


# --- the sinks, and what they got ----------------------------------------------------------------------------------


@attrs.frozen
class Receiver:
    """``got()`` is all that has come so far; it makes room for more."""

    sink: Sink
    got: Callable[[], bytes]


def reading(fd: int) -> Callable[[], bytes]:
    got = bytearray()

    def read() -> bytes:
        try:
            while piece := os.read(fd, PIPE_BYTES):
                got.extend(piece)
        except BlockingIOError:
            pass
        return bytes(got)

    return read


@contextmanager
def a_pipe(_: Path, __: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """So short that no piece finds room at once."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    assert fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES) == PIPE_BYTES
    yield Receiver(FdSink(writer), reading(reader))
    os.close(reader)


@contextmanager
def a_file(where: Path, patch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Written in a thread, and in parts."""
    path, write = where / "out", os.write
    patch.setattr(plain.os, "write", lambda fd, data: write(fd, data[:SHORT]))
    yield Receiver(FdSink(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)), path.read_bytes)
    patch.undo()


@contextmanager
def a_pty(_: Path, __: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """What its client has not read yet is the sink's as well."""
    sink = PtySink("serial")
    assert sink.path is not None
    client = os.open(sink.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    read = reading(client)
    yield Receiver(sink, lambda: read() + sink._backlog)
    os.close(client)


SINKS = {"pipe": a_pipe, "file": a_file, "pty": a_pty}


async def settle(receiver: Receiver) -> None:
    """The line does all that it ever will."""
    seen = -1
    while seen != (seen := len(receiver.got())):
        await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.testing.wait_all_threads_completed()


@LINES
@pytest.mark.parametrize("where", SINKS)
@pytest.mark.parametrize("strike", ["save", "cancel", "save and cancel"])
async def test_output_that_is_saved_at_every_await(
    kind: str, where: str, strike: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def world(walk: Walk[None]) -> None:
        with SINKS[where](tmp_path, monkeypatch) as receiver:
            line = a_line(kind, receiver.sink, OUTPUT)
            saved: list[bytes] = []
            ending = trio.CancelScope()

            def happen() -> None:
                if "save" in strike:
                    saved.append(save(line)[0])
                if "cancel" in strike:
                    ending.cancel()

            async def life() -> None:
                async with trio.open_nursery() as nursery:

                    async def run() -> None:
                        with ending:
                            await line.run()

                    nursery.start_soon(run)
                    while not walk.fired and lib.tv_line_tx_used(line.rings):
                        receiver.got()
                        await trio.lowlevel.checkpoint()
                    await settle(receiver)
                    if saved and not ending.cancel_called:
                        assert receiver.got() + saved[0] == OUTPUT
                        line.thaw()  # it did not move after all
                        await until(lambda: len(receiver.got()) == len(OUTPUT))
                    nursery.cancel_scope.cancel()

            await walk.run(life, strike=happen, of=[f"{line.name} output"])
            left = saved[0] if "cancel" in strike and saved else save(line)[0]
            assert receiver.got() + left == OUTPUT
            there = a_line(kind, NullSink(), left)
            async with trio.open_nursery() as nursery:
                await nursery.start(there.run)
                assert await there.drain(LIMIT_S)
                nursery.cancel_scope.cancel()
            assert receiver.got() + there.tail() == OUTPUT
            there.close()
            line.close()

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) >= 4


async def test_input_that_is_saved_at_every_await() -> None:
    async def world(walk: Walk[None]) -> None:
        sink = PtySink("serial")
        line = a_line("serial", sink)
        saved: list[bytes] = []
        heard = bytearray()

        def listen() -> None:
            """As a guest does, a little at a time."""
            heard.extend(take_input(line, 500))

        async def life() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(line.run)
                assert sink.path is not None
                client = os.open(sink.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
                left = TYPED
                while left and not walk.fired:
                    listen()
                    await trio.lowlevel.checkpoint()
                    try:
                        left = left[os.write(client, left[:1000]) :]
                    except BlockingIOError:
                        continue
                while not walk.fired and len(heard) < len(TYPED):
                    listen()
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.001)
                if saved:
                    assert TYPED.startswith(bytes(heard) + saved[0])
                    there = a_line("serial", NullSink())
                    load(there, b"", saved[0])
                    assert take_input(there, len(TYPED)) == saved[0]
                    there.close()
                    line.thaw()  # it did not move after all: what the client typed meanwhile comes next
                    while len(heard) < len(TYPED) - len(left):
                        listen()
                        await trio.lowlevel.checkpoint()
                assert heard == TYPED[: len(TYPED) - len(left)]
                os.close(client)
                nursery.cancel_scope.cancel()

        await walk.run(life, strike=lambda: saved.append(save(line)[1]), of=["client to guest"])
        line.close()

    with trio.fail_after(LIMIT_S):
        assert await cancel_walk(world) > 10


def take_input(line: Line, most: int) -> bytes:
    """What the guest would read."""
    assert isinstance(line, Serial)
    got = b""
    while len(got) < most and line.read(5, 1)[0] & 1:
        got += line.read(0, 1)
    return got
