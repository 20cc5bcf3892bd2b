"""A distribution's Linux with its own vsock driver, on the soft CPU: both directions, and over moves."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm import (
    Deadlines,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    Vm,
    VmConfig,
    VsockConfig,
    open_incoming,
    open_vm,
)

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 600
CMDLINE = "console=ttyS0 mitigations=off panic=-1 cryptomgr.notests"
MOVES_AT = (10, 30)  # rounds of the guest
SERVER, ECHO = 7, 1024


async def move(stack: AsyncExitStack, vm: Vm, url: str) -> Vm:
    """Where it is then."""
    incoming = await stack.enter_async_context(open_incoming(url, hypervisor=SoftHypervisor()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(incoming.receive)
        await vm.migrate_to(incoming.url)
    assert (await vm.wait()).kind == "migrated"
    return incoming.vm


async def serve(path: str) -> None:
    """Says again what it is told."""

    async def echo(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async for piece in stream:
                await stream.send_all(piece)

    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    await trio.serve_listeners(echo, [trio.SocketListener(sock)])


async def echoed(path: Path, said: bytes) -> bytes:
    """What a client of the host hears that says this and then no more."""
    stream = await trio.open_unix_socket(path)
    await stream.send_all(b"CONNECT %d\n" % ECHO)
    heard = b""
    async with trio.open_nursery() as nursery:

        async def say() -> None:
            await stream.send_all(said)
            await stream.send_eof()

        nursery.start_soon(say)
        async for piece in stream:
            heard += piece
    await stream.aclose()
    line, _, rest = heard.partition(b"\n")
    assert line.startswith(b"OK ")
    return rest


async def test_linux_talks_over_vsock_and_moves(linux_vsock: Any, tmp_path: Path) -> None:
    serial, path = tmp_path / "serial.txt", tmp_path / "v.sock"
    config = VmConfig(
        PayloadConfig(str(linux_vsock.kernel), CMDLINE, initramfs=str(linux_vsock.initramfs)),
        memory=MemoryConfig(256 << 20),
        serial=SerialConfig("File", str(serial)),
        virtio=[VsockConfig(77, path)],
        deadlines=Deadlines(pause=10, downtime=30),  # one vCPU of an emulator, stopped while its memory is copied
    )
    said = bytes(each * 7 & 0xFF for each in range(100_000))
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(serve, f"{path}_{SERVER}")
            vm = await stack.enter_async_context(open_vm(config, hypervisor=SoftHypervisor()))
            await vm.boot()
            for number, at in enumerate(MOVES_AT):
                await vm.wait_for_console(f"GUEST round {at} good")
                assert await echoed(path, said) == said
                await vm.wait_for_console(f"GUEST echoed {len(said)}")
                vm = await move(stack, vm, f"unix:{tmp_path}/{number}.sock")
            await vm.wait_for_console("GUEST round 40 good")
            assert await echoed(path, said) == said
            assert (await vm.wait()).kind == "poweroff"
            nursery.cancel_scope.cancel()
    text = serial.read_text(errors="replace")
    assert "GUEST problem" not in text
    assert "GUEST address 77" in text
    assert not re.search(r"GUEST round \d+ bad", text)
    lost = re.findall(r"GUEST round \d+ ended: (.*)", text)
    assert len(lost) <= len(MOVES_AT)  # each move ends the stream that was there, unless it was just between two
    assert set(lost) <= {"Connection reset by peer", "Broken pipe", "Transport endpoint is not connected"}
