"""``--serial`` and ``--console`` at once, in every combination: a guest that talks on both is heard on both, and hears
what is typed on either."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import ConsoleConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig
from trivmm.config import CONSOLE_MODES
from trivmm.guest import probe_cmdline, probe_path
from trivmm.vm import open_vm

pytestmark = pytest.mark.kvm

LIMIT_S = 60
PAIRS = [(serial, console) for serial in CONSOLE_MODES for console in CONSOLE_MODES]


@asynccontextmanager
async def standard_output(ours: int) -> AsyncIterator[None]:
    before = os.dup(1)
    os.dup2(ours, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


class End:
    """The user's end of a line, whatever its mode is."""

    def __init__(self, mode: str, line: str, folder: Path, terminal: int) -> None:
        self.mode, self.line, self.terminal = mode, line, terminal
        self.path = str(folder / line)
        self.options: dict[str, Any] = {"mode": mode}
        if mode in ("File", "Socket"):
            self.options[mode.lower()] = self.path
        self.seen = b""
        self._fd = -1
        self._client: socket.socket | None = None

    def open(self, vm: Vm) -> None:
        if self.mode == "Pty":
            self._fd = os.open(vm.pty_paths[self.line], os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
        elif self.mode == "Socket":
            self._client = socket.socket(socket.AF_UNIX)
            self._client.connect(self.path)
            self._client.setblocking(False)
            self._fd = self._client.fileno()
        elif self.mode == "File":
            self._fd = os.open(self.path, os.O_RDONLY)
        elif self.mode == "Tty":
            self._fd = self.terminal

    @property
    def heard(self) -> bool:
        return self._fd >= 0

    async def until(self, text: bytes) -> None:
        while text not in self.seen:
            with suppress(BlockingIOError):
                self.seen += os.read(self._fd, 4096)
            await trio.sleep(0.005)

    async def type(self, vm: Vm, data: bytes) -> None:
        if self.mode in ("Pty", "Socket"):
            assert os.write(self._fd, data) == len(data)
        else:
            await vm.feed_console(data, self.line)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        elif self._fd not in (-1, self.terminal):
            os.close(self._fd)


@pytest.mark.parametrize(
    ("serial", "console"),
    [pytest.param(*pair, marks=() if number % 5 == 0 else pytest.mark.slow) for number, pair in enumerate(PAIRS)],
)
async def test_both_at_once(tmp_path: Path, serial: str, console: str) -> None:
    terminal, its = os.openpty()
    os.set_blocking(terminal, False)
    ends = End(serial, "serial", tmp_path, terminal), End(console, "console", tmp_path, terminal)
    config = VmConfig(
        PayloadConfig(str(probe_path()), probe_cmdline(cpus=1, report=50, mem=4, keys=1, echo=1)),
        memory=MemoryConfig(32 << 20),
        serial=SerialConfig(**ends[0].options),
        console=ConsoleConfig(**ends[1].options),
        deadlines=Deadlines(pause=10),
    )
    try:
        with trio.fail_after(LIMIT_S):
            async with standard_output(its), open_vm(config) as vm:
                await vm.boot()
                for end in ends:
                    end.open(vm)
                await vm.wait_for_console("PROBE t=")
                await say_and_hear(vm, *ends)
    finally:
        for end in ends:
            end.close()
        os.close(terminal)
        os.close(its)


async def say_and_hear(vm: Vm, serial: End, console: End) -> None:
    await serial.type(vm, b"abc")
    await vm.wait_for_console("TYPED abc")
    if serial.heard:
        await serial.until(b"TYPED abc")
    if console.mode != "Off":
        await console.type(vm, b"<to the console>")
        await vm.wait_for_console("echoed=16 ")
    if console.heard:
        await console.until(b"<to the console>")
    if serial.mode != "Tty" or console.mode != "Tty":  # else they share one terminal
        assert b"PROBE" not in console.seen
        assert b"<to the console>" not in serial.seen
