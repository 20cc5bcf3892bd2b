"""Sinks that talk both ways with a client that comes and goes, over a pseudo-terminal or a unix socket.

They never keep the guest waiting: what no client has read yet is kept, the last MiB of it, and the next client gets
that first; what is pushed out is counted. (A pseudo-terminal's own buffer in the kernel holds some 4 KiB more, from
before.) Input is taken from a client only as the guest makes room.
"""

from __future__ import annotations

import logging
import os
import tty
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from trivmm.errors import ConfigError, reason_of
from trivmm.platform.sinks.ends import GuestInput, GuestOutput
from trivmm.unixsocket import listen_unix

__all__ = ["BACKLOG_BYTES", "ClientSink", "PtySink", "SocketSink"]

logger = logging.getLogger(__name__)

BACKLOG_BYTES: Final = 1 << 20  # kept for a client that isn't there or doesn't read; Cloud Hypervisor keeps as much
CHUNK: Final = 16384
PATIENCE_S: Final = 0.05  # a client that takes nothing for so long isn't waited for at the end of its VM
WAITING_CLIENTS: Final = 4  # a new client takes the place of the old one, so none waits for long
ACCEPT_PAUSE_S: Final = 0.1  # after EMFILE and its like: the listener would be readable at once again


class ClientSink:
    """Base of those that talk with a client: the backlog, and carrying bytes both ways."""

    path: str | None = None  # of a pseudo-terminal

    def __init__(self) -> None:
        self.dropped = 0
        self._backlog = bytearray()
        self._fd = -1  # the client's, nonblocking; -1: there is none
        self._news = trio.Event()  # set, and replaced, with every piece of output
        self._taken = trio.Event()  # the same with every piece that the client took

    async def take(self, output: GuestOutput) -> None:
        """All of it, always, at once."""
        await trio.lowlevel.checkpoint()
        data = output.peek()
        self._backlog += data
        over = len(self._backlog) - BACKLOG_BYTES
        if over > 0:
            del self._backlog[:over]
            self.dropped += over
        self._news, news = trio.Event(), self._news
        news.set()
        output.consume(len(data))

    async def flush(self) -> None:
        """Wait until the client has what was sent, if there is one, and as long as it reads. Bounded by the caller."""
        await trio.lowlevel.checkpoint()
        while self._backlog and self._fd >= 0:
            with trio.move_on_after(PATIENCE_S) as patience:
                await self._taken.wait()
            if patience.cancelled_caught:
                return

    async def serve(self, guest: GuestInput) -> None:
        """Carry bytes between clients and the guest, until cancelled."""
        raise NotImplementedError

    def release(self) -> None:
        """Let another process have the path (a migration's COMMIT); :meth:`retake` it when that came to nothing."""

    def retake(self) -> None:
        """:raises ConfigError: when another process has it."""

    async def _carry(self, fd: int, guest: GuestInput) -> OSError | None:
        """Both ways, until the client is lost; gives why. One that only stops sending may still read."""
        lost: OSError | None = None
        async with trio.open_nursery() as nursery:

            async def until_lost(work: Callable[[], Awaitable[None]]) -> None:
                nonlocal lost
                try:
                    await work()
                except OSError as error:
                    lost = error
                    nursery.cancel_scope.cancel()

            nursery.start_soon(until_lost, lambda: self._write(fd), name="guest to client")
            nursery.start_soon(until_lost, lambda: self._read(fd, guest), name="client to guest")
        return lost

    async def _write(self, fd: int) -> None:
        while True:
            news = self._news
            while self._backlog:
                await trio.lowlevel.checkpoint()
                try:
                    sent = os.write(fd, self._backlog[:CHUNK])
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(fd)
                    continue
                del self._backlog[:sent]
                self._taken, taken = trio.Event(), self._taken
                taken.set()
            await news.wait()

    async def _read(self, fd: int, guest: GuestInput) -> None:
        while True:
            await guest.until_room()
            await trio.lowlevel.wait_readable(fd)
            room = guest.room  # asked again: nothing is read that would have to be kept here
            if not room:
                continue
            try:
                data = os.read(fd, min(room, CHUNK))
            except BlockingIOError:
                continue
            if not data:
                return
            guest.push_input(data)

    def counters(self) -> dict[str, int]:
        return {"unread_dropped": self.dropped}

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


class PtySink(ClientSink):
    """A raw pseudo-terminal at ``path``. Its other end is held open here too: so it never hangs up, whoever opens it
    and closes it again, and what the kernel holds of it waits for the next to come."""

    def __init__(self, field: str) -> None:
        """:raises ConfigError: when the host gives none."""
        super().__init__()
        self._other_end = -1
        try:
            self._fd, self._other_end = os.openpty()  # close-on-exec, and nobody's controlling terminal
            os.set_blocking(self._fd, False)
            tty.setraw(self._other_end)
            self.path = os.ttyname(self._other_end)
        except OSError as error:
            self._close()
            remedy = "mount devpts at /dev/pts, or use another mode"
            raise ConfigError(
                f"{field}.mode", "Pty", f"no pseudo-terminal to be had ({reason_of(error)})", remedy
            ) from error

    async def serve(self, guest: GuestInput) -> None:
        lost = await self._carry(self._fd, guest)
        logger.warning("%s: cannot be used any more (%s); the guest goes on without it", self.path, lost)

    def _close(self) -> None:
        for fd in (self._fd, self._other_end):
            if fd >= 0:
                os.close(fd)
        self._fd = self._other_end = -1
        self.path = None

    def close(self) -> None:
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
        self._close()


class SocketSink(ClientSink):
    """A unix socket, mode 0600, for one client at a time: a new one takes the place of the old one, as with Cloud
    Hypervisor, so that a client that hangs shuts nobody out."""

    def __init__(self, path: str, field: str) -> None:
        """:raises ConfigError: when there can be no socket at ``path``."""
        super().__init__()
        self._where = path, f"{field}.socket"
        self._carrying = trio.CancelScope()  # around the client's tasks
        self._listens = trio.Event()
        self._listen()

    def _listen(self) -> None:
        self._made = listen_unix(*self._where, backlog=WAITING_CLIENTS)
        self._listener = trio.socket.from_stdlib_socket(self._made.sock)
        self._listens.set()

    async def serve(self, guest: GuestInput) -> None:
        async with trio.open_nursery() as nursery:
            if self._fd >= 0:  # of the machine before, which was rebooted
                self._attend(nursery, guest)
            while True:
                await self._listens.wait()
                try:
                    sock, _ = await self._listener.accept()
                except (OSError, trio.ClosedResourceError) as error:
                    if self._listens.is_set():
                        logger.warning("%s: accept: %s", self._where[0], error)
                        await trio.sleep(ACCEPT_PAUSE_S)
                    continue
                self._carrying.cancel()
                self._drop_client()
                self._fd = sock.detach()
                self._attend(nursery, guest)

    def _attend(self, nursery: trio.Nursery, guest: GuestInput) -> None:
        scope = self._carrying = trio.CancelScope()
        fd = self._fd

        async def until_lost() -> None:
            with scope:
                lost = await self._carry(fd, guest)
                logger.info("%s: the client went away (%s)", self._where[0], lost)
                if self._carrying is scope:  # not yet another's turn
                    self._drop_client()

        nursery.start_soon(until_lost, name="console client")

    def _drop_client(self) -> None:
        super().close()

    def release(self) -> None:
        if self._listens.is_set():
            self._listens = trio.Event()
            self._listener.close()
            self._made.close()

    def retake(self) -> None:
        if not self._listens.is_set():
            self._listen()

    def close(self) -> None:
        self.release()
        self._drop_client()
