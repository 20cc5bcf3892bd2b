"""Values that only the host, a socket or a server can refuse: still a named error, one printable line of bounded
length, and everything is given back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from trivmm import DiskConfig, MemoryConfig, PayloadConfig, RngConfig, SerialConfig, VmConfig, open_incoming, open_vm
from trivmm.config import ConsoleConfig
from trivmm.control.client import ApiError, Client
from trivmm.control.routes import Router
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.errors import MAX_LINE, ConfigError, TrivmmError
from trivmm.guest import probe_path
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.vmm import open_vmm

LIMIT_S = 60
HOSTILE: Final = {
    "long": "x" * 60_000,
    "half": "/no/\ud800",
    "bytes": "/no/\udcff",  # a file name that is no Unicode
    "sequence": "/no/\x1b[2J\r\ntrivmm: lies",
    "zero": "a\0b",
}
each_hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def is_fine(error: TrivmmError) -> None:
    said = str(error)
    assert said.isprintable(), ascii(said[:200])
    assert 0 < len(said) <= MAX_LINE + 1


def config(**fields: Any) -> VmConfig:
    payload = fields.pop("payload", PayloadConfig(str(probe_path())))
    return VmConfig(payload, memory=MemoryConfig(8 << 20), **fields)


PATHS: Final[dict[str, Callable[[str], VmConfig]]] = {
    "payload.kernel": lambda text: config(payload=PayloadConfig(text)),
    "payload.initramfs": lambda text: config(payload=PayloadConfig(str(probe_path()), initramfs=text)),
    "disks.path": lambda text: config(disks=[DiskConfig(text)]),
    "rng.src": lambda text: config(rng=RngConfig(text)),
    "serial.file": lambda text: config(serial=SerialConfig("File", file=text)),
    "serial.socket": lambda text: config(serial=SerialConfig("Socket", socket=text)),
    "console.file": lambda text: config(console=ConsoleConfig("File", file=text)),
}


@each_hostile
@pytest.mark.parametrize("field", PATHS)
async def test_paths(field: str, text: str) -> None:
    hypervisor = ScriptedHypervisor()
    with trio.fail_after(LIMIT_S):
        with pytest.raises(ConfigError) as caught:
            async with open_vm(PATHS[field](text), hypervisor=hypervisor) as vm:
                await vm.boot()
    is_fine(caught.value)
    assert caught.value.field == field
    assert "give" in str(caught.value) or "create" in str(caught.value)


@pytest.mark.parametrize("text", [HOSTILE["half"], HOSTILE["long"] * 2])
async def test_a_command_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"payload\.cmdline = ") as caught:
        async with open_vm(
            config(payload=PayloadConfig(str(probe_path()), text)), hypervisor=ScriptedHypervisor()
        ) as vm:
            await vm.boot()
    is_fine(caught.value)


@each_hostile
@pytest.mark.parametrize("url", ["{}", "unix:{}", "tcp:{}:1", "tcp:localhost:{}"])
async def test_urls(url: str, text: str) -> None:
    url = url.format(text)
    with trio.fail_after(LIMIT_S):
        async with open_vm(config(), hypervisor=ScriptedHypervisor()) as vm:
            await vm.boot()
            with pytest.raises(TrivmmError) as sending:
                await vm.migrate_to(url)
        with pytest.raises(TrivmmError) as receiving:
            async with open_incoming(url, hypervisor=ScriptedHypervisor()):
                raise AssertionError("nobody can listen there")
    is_fine(sending.value)
    is_fine(receiving.value)


@each_hostile
async def test_a_pattern_that_never_came(text: str) -> None:
    async with open_vm(config(), hypervisor=ScriptedHypervisor()) as vm:
        await vm.boot()
        await vm.shutdown()
        with pytest.raises(TrivmmError) as caught:
            await vm.wait_for_console(text)
    is_fine(caught.value)


@each_hostile
async def test_what_a_client_asks(text: str, tmp_path: Path) -> None:
    path = str(tmp_path / "api")
    with trio.fail_after(LIMIT_S):
        async with open_vmm(ScriptedHypervisor()) as vmm, open_server(path, Router(vmm), Deadlines()):
            async with Client(path) as client:
                await client.create(config())
                for refused in (
                    lambda: client.send_migration(text),
                    lambda: client.send_migration(f"unix:{text}\0"),
                    lambda: client.send_migration("unix:/x", timeout_strategy=text),
                    lambda: client.receive_migration(text),
                    lambda: client.call("PUT", "vm.create", text),
                    lambda: client.call("PUT", text),
                ):
                    with pytest.raises((ApiError, ConfigError)) as caught:
                        await refused()
                    is_fine(caught.value)
        try:
            async with Client(text) as client:
                await client.ping()
        except TrivmmError as error:
            is_fine(error)
        else:
            raise AssertionError("nobody serves there")
    assert os.listdir(tmp_path) == []
