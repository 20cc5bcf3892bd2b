"""A proxy between real sockets that loses, repeats, swaps or damages frames of pages: the C intake takes none of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationError, ProtocolError, TrivmmError
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationReport
from trivmm.migration.receiver import open_receiver
from trivmm.migration.sender import send, socket_dialer
from trivmm.migration.transports import TcpAddress, UnixAddress, parse_url
from trivmm.migration.wire import HEADER_BYTES, MessageType, parse_header
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

RAM = ((0, 4 << 20), (1 << 32, 2 << 20))
LIMITS = Deadlines(commit=5.0, stall=20.0, downtime=10.0)
PATIENT = SendOptions(downtime_ms=10_000, timeout_s=120)
TRIALS = 12  # for each way to go wrong and each kind of socket


class MiddleBox:
    """Passes every connection on, frame by frame; does ``how`` to the ``index``-th frame of pages."""

    def __init__(self, how: str, index: int) -> None:
        self.url = ""
        self.page_frames = 0
        self._how, self._index = how, index
        self._held = b""

    def what_passes(self, frame: bytes) -> bytes:
        out, self._held = frame + self._held, b""
        if parse_header(frame[:HEADER_BYTES]).type in (MessageType.PAGES, MessageType.ZERO):
            self.page_frames += 1
            if self.page_frames - 1 == self._index:
                if self._how == "swap":
                    self._held = frame
                if self._how == "damage":
                    place = random.Random(self._index).randrange(HEADER_BYTES, len(frame))
                    return frame[:place] + bytes([frame[place] ^ 0x20]) + frame[place + 1 :]
                return frame * 2 if self._how == "repeat" else b""
        return out

    async def pass_frames(self, source: trio.SocketStream, destination: trio.SocketStream) -> None:
        data = bytearray()
        while got := await source.receive_some(1 << 18):
            data += got
            while len(data) >= HEADER_BYTES:
                end = HEADER_BYTES + parse_header(bytes(data[:HEADER_BYTES])).length
                if len(data) < end:
                    break
                await destination.send_all(self.what_passes(bytes(data[:end])))
                del data[:end]
        await destination.send_eof()

    async def serve(self, source: trio.SocketStream, receiver_url: str) -> None:
        address = parse_url(receiver_url, "destination_url")
        try:
            if isinstance(address, UnixAddress):
                destination = await trio.open_unix_socket(address.path)
            else:
                assert isinstance(address, TcpAddress)
                destination = await trio.open_tcp_stream(address.host, address.port)
        except OSError:  # nobody listens any more: the box's client learns it from the end of its connection
            await source.aclose()
            return
        try:
            async with source, destination, trio.open_nursery() as nursery:
                nursery.start_soon(self.pass_frames, source, destination)
                while got := await destination.receive_some(1 << 18):
                    await source.send_all(got)
                nursery.cancel_scope.cancel()
        except* trio.BrokenResourceError:
            pass  # one side is gone: so is the other, now

    @asynccontextmanager
    async def open(self, kind: str, folder: Path, receiver_url: str) -> AsyncIterator[None]:
        if kind == "unix":
            sock = trio.socket.socket(trio.socket.AF_UNIX)
            await sock.bind(f"{folder}/box.sock")
            self.url = f"unix:{folder}/box.sock"
        else:
            sock = trio.socket.socket()
            await sock.bind(("127.0.0.1", 0))
            self.url = f"tcp:127.0.0.1:{sock.getsockname()[1]}"
        sock.listen(4)
        with sock:
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    while True:
                        connection, _ = await sock.accept()
                        nursery.start_soon(self.serve, trio.SocketStream(connection), receiver_url)

                nursery.start_soon(accept)
                yield
                nursery.cancel_scope.cancel()
        (folder / "box.sock").unlink(missing_ok=True)


async def move(kind: str, folder: Path, box: MiddleBox) -> tuple[MigrationReport | TrivmmError, ...]:
    """What came of it on both sides; fails the test where a copy is wrong, or there are two, or none."""
    lock, chance = DiskLock(), random.Random(box._index)
    source, destination = FakeSource(lock, LIMITS, RAM), FakeDestination(lock, LIMITS, RAM)
    for gpa, size in RAM:
        for page in range(size // 4096):
            source.memory.write(gpa + page * 4096, chance.randbytes(64) * 64 if page % 5 else bytes(4096))
    ends: list[MigrationReport | TrivmmError] = []
    url = f"unix:{folder}/m.sock" if kind == "unix" else "tcp:127.0.0.1:0"
    try:
        async with (
            trio.open_nursery() as nursery,
            open_receiver(url, LIMITS, nursery) as receiver,
            box.open(kind, folder, receiver.url),
            trio.open_nursery() as both,
        ):

            async def sending() -> None:
                try:
                    ends.append(await send(source, socket_dialer(box.url, LIMITS), PATIENT))
                except TrivmmError as error:
                    ends.append(error)

            async def receiving() -> None:
                try:
                    ends.append((await receiver.receive(destination.factory))[1])
                except TrivmmError as error:
                    ends.append(error)

            both.start_soon(sending)
            both.start_soon(receiving)
        assert source.running != destination.running
        if destination.running:
            assert source.contents() == destination.contents()
        return tuple(ends)
    finally:
        source.close()
        destination.close()


@pytest.mark.parametrize("how", ["lose", "repeat", "swap", "damage"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_frame_of_pages_out_of_its_place_or_damaged_ends_the_migration(
    kind: str, how: str, tmp_path: Path
) -> None:
    with trio.fail_after(240):
        clean = MiddleBox("", -1)
        ends = await move(kind, tmp_path, clean)
        assert all(isinstance(each, MigrationReport) for each in ends), ends
        assert clean.page_frames >= TRIALS
        for index in random.Random(kind + how).sample(range(clean.page_frames), TRIALS):
            box = MiddleBox(how, index)
            ends = await move(kind, tmp_path, box)
            assert box.page_frames > index
            assert any(isinstance(each, ProtocolError) for each in ends), (index, ends)  # the destination's
            says = "the stream is damaged" if how == "damage" else "was due: the link"
            assert all(isinstance(each, MigrationError) and says in str(each) for each in ends), ends
