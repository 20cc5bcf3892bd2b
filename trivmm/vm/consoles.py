"""What the guest prints, and what is typed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from trivmm.console import ConsoleCursor, ConsoleMatch, ConsolePattern, bytes_pattern
from trivmm.errors import WrongState
from trivmm.platform.line import Line
from trivmm.vm.core import VmCore

__all__ = ["Consoles"]


class Consoles(VmCore):
    """The part of a VM's API that is about its console lines."""

    @property
    def console_tail(self) -> bytes:
        """The last mebibyte of serial output."""
        return b"" if self.host.board is None else self.host.board.serial.tail()

    async def wait_for_console(self, pattern: ConsolePattern, *, rewind: bool = False) -> ConsoleMatch:
        """Wait until the serial console has printed ``pattern``: text, bytes, or a compiled regular expression.

        A wait begins where the last one's match ended: a second identical one waits for a second text. A boot brings a
        new console, read from its start; where the guest reboots by itself, what it had said before comes first.
        ``rewind`` begins at the start of the console that there is now. Only the last mebibyte is kept: what was
        printed before it is not found. An expression matches as soon as it can (``t=[0-9]+`` in the middle of a
        number): end it with what comes after.

        Bounded by the caller. :raises WrongState: when the VM ends without having printed it. :raises ConfigError:
        for a pattern that can't be."""
        wanted = bytes_pattern(pattern)
        await trio.lowlevel.checkpoint()
        cursor = self._newest_console() if rewind or self._console is None else self._console
        if rewind and cursor is not None:
            cursor.at = 0
        at = 0 if cursor is None else cursor.at  # ours: a wait that ends meanwhile takes nothing from this one
        while True:
            found = None if cursor is None else cursor.find(wanted, at)
            if found is not None:
                return found
            newest = self._newest_console()
            if cursor is not newest:
                cursor, at = newest, 0
            elif self._exited.is_set():
                text = getattr(pattern, "pattern", pattern)
                raise WrongState(
                    f"wait for {text!r:.200} on the console", self.state.value, "running until it prints that"
                )
            else:
                await self.console_output()

    def _newest_console(self) -> ConsoleCursor | None:
        """The cursor of the console that there is now, from which the next wait goes on."""
        if self.host.board is not None and (
            self._console is None or self._console.console is not self.host.board.serial
        ):
            self._console = ConsoleCursor(self.host.board.serial)
        return self._console

    async def console_output(self) -> None:
        """Wait until the serial console prints something more, or the VM ends. Bounded by the caller."""
        board = self.host.board
        seen = 0 if board is None else board.serial.total

        async with trio.open_nursery() as nursery:

            async def until(wait: Callable[[], Any]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, self._exited.wait)
            nursery.start_soon(until, self.host.new_board.wait)  # a reboot brings a new console
            if board is not None:
                nursery.start_soon(until, board.serial.subscribe(seen).receive)

    def console_input(self, data: bytes, line: str = "serial") -> int:
        """Type on the serial port, or on the ``console``: as many bytes as find room at once, which it gives; the rest
        is dropped.

        :raises WrongState: when nothing runs, or it has no such line."""
        return self._line(line).push_input(data)

    async def feed_console(self, data: bytes, line: str = "serial") -> None:
        """Type all of ``data``, as the guest makes room for it. Bounded by the caller.

        :raises WrongState: as :meth:`console_input`."""
        await self._line(line).feed(data)

    def _line(self, name: str) -> Line:
        lines = {} if self.host.machine is None else self.host.machine.board.lines
        if name not in lines:
            raise WrongState(f"input on the {name} line", self.state.value, "booted, and to have one")
        return lines[name]

    @property
    def pty_paths(self) -> dict[str, str]:
        """Where the lines (``serial``, ``console``) that are pseudo-terminals can be opened: from boot (or, where a
        migration brought the VM, from its COMMIT) to the end, over reboots."""
        return {} if self.host.board is None else self.host.board.pty_paths

    def terminal_resized(self) -> None:
        """The terminal that a virtio console is shown on may have another size now: the guest is told."""
        if self.host.machine is not None:
            self.host.machine.board.terminal_resized()
