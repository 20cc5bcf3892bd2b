"""Sinks that only take output: nowhere, a file, a terminal."""

from __future__ import annotations

import os
import stat

import trio

from trivmm.platform.sinks.ends import GuestOutput

__all__ = ["FdSink", "NullSink"]


class NullSink:
    async def take(self, output: GuestOutput) -> None:
        await trio.lowlevel.checkpoint()
        output.consume(len(output.peek()))

    def close(self) -> None:
        return None


class FdSink:
    """A file, pipe, terminal or socket. Owns ``fd``. Regular files are written in a thread, since a full page cache
    blocks; everything else through non-blocking writes, the open file description being ours alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._threaded = stat.S_ISREG(os.fstat(fd).st_mode)
        self._limiter = trio.CapacityLimiter(1)
        if not self._threaded:
            os.set_blocking(fd, False)

    async def take(self, output: GuestOutput) -> None:
        if self._threaded:
            await self._take_in_thread(output)
            return
        while True:
            await trio.lowlevel.checkpoint()
            data = output.peek()  # again, after each wait
            if not data:
                return
            try:
                output.consume(os.write(self._fd, data))
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._fd)  # bounded by the owner: a slow sink may be slow for ever

    async def _take_in_thread(self, output: GuestOutput) -> None:
        data = output.peek()
        output.lend(len(data))
        try:
            written = await trio.to_thread.run_sync(self._write_all, data, limiter=self._limiter)
        finally:
            output.lend(0)
        output.consume(written)

    def _write_all(self, data: bytes) -> int:
        """In a thread. Less than all where the next write will say why."""
        at = 0
        while at < len(data):
            try:
                at += os.write(self._fd, data[at:])
            except OSError:
                if not at:
                    raise
                break
        return at

    def size(self) -> tuple[int, int]:
        """(columns, rows) of a terminal; zeros of anything else."""
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            return 0, 0
        return columns, rows

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if not self._threaded:
                trio.lowlevel.notify_closing(fd)
            os.close(fd)
