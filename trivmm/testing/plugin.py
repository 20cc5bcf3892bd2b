"""The pytest plugin that comes with trivmm: stages of a VM's life as fixtures, and a VMM that fails on cue.

``vm``, ``vm_booted`` and ``vm_migrated`` are for tests under pytest-trio, with its ``autojump_clock`` where time shall
be virtual: a VM on scripted vCPUs, without a thread and without /dev/kvm. ``fake_vmm`` is a process (``trivmm fake``)
behind a real socket, for tests in any style. Override ``vm_config`` and ``vm_scripts`` to say what the VM is and what
its guest does. See docs/testing.md.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest

if TYPE_CHECKING:
    from trivmm.config import VmConfig
    from trivmm.testing.road import Road
    from trivmm.testing.scripted import Script
    from trivmm.vm import Vm

__all__ = ["FakeVmm", "fake_vmm", "open_fake_vmm", "vm", "vm_booted", "vm_config", "vm_migrated", "vm_scripts"]

START_LIMIT_S: Final = 30.0
END_LIMIT_S: Final = 15.0
CALL_LIMIT_S: Final = 60.0
POLL_S: Final = 0.02
API_ROOT: Final = "/api/v1/"


@pytest.fixture
def vm_config() -> VmConfig:
    """What ``vm`` is: two vCPUs, 16 MiB, an entropy source. Override it with your own."""
    from trivmm.config import CpusConfig, MemoryConfig, PayloadConfig, VmConfig

    return VmConfig(PayloadConfig("scripted"), cpus=CpusConfig(2), memory=MemoryConfig(16 << 20))


@pytest.fixture
def vm_scripts() -> tuple[Script, ...]:
    """What its vCPUs do, one script each (``trivmm.testing.scripted``); a vCPU without one computes for ever."""
    return ()


@pytest.fixture
async def vm(vm_config: VmConfig, vm_scripts: tuple[Script, ...]) -> AsyncIterator[Vm]:
    """A VM that was created and not booted."""
    from trivmm.testing.scripted import ScriptedHypervisor
    from trivmm.vm import open_vm

    async with open_vm(vm_config, hypervisor=ScriptedHypervisor(*vm_scripts, needs_payload=False)) as made:
        yield made


@pytest.fixture
async def vm_booted(vm: Vm) -> Vm:
    """``vm``, running."""
    await vm.boot()
    return vm


@pytest.fixture
async def vm_migrated(vm_config: VmConfig, vm_scripts: tuple[Script, ...], tmp_path: Path) -> AsyncIterator[Vm]:
    """A VM that was booted elsewhere and has moved here over a unix socket (so: real time)."""
    from trivmm.testing.road import open_road
    from trivmm.testing.scripted import ScriptedHypervisor

    road: Road
    async with open_road(vm_config, hypervisor=ScriptedHypervisor(*vm_scripts, needs_payload=False)) as road:
        await road.move(f"unix:{tmp_path}/fixture.sock")
        yield road.vm


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CALL_LIMIT_S)
        self.sock.connect(self._path)


@attrs.define(eq=False)
class FakeVmm:
    """A ``trivmm fake`` process. ``socket`` is its API's path; :meth:`fail` says what it shall fail at from now on."""

    socket: Path
    process: subprocess.Popen[bytes]

    def call(self, method: str, route: str, body: object = None) -> tuple[int, Any]:
        """One request: (status, the answer's JSON or None)."""
        connection = _UnixConnection(str(self.socket))
        try:
            connection.request(method, API_ROOT + route, body=None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(content) if content else None

    def fail(self, *faults: str) -> None:
        """``"pause=timeout"``, ``"send-migration=commit:in-doubt,times=1"``, …; none: nothing fails any more.

        :raises ValueError: with the VMM's own words, when one makes no sense."""
        status, said = self.call("PUT", "fake.faults", list(faults))
        if status != 204:
            raise ValueError(": ".join(said))


@pytest.fixture
def fake_vmm(tmp_path: Path) -> Iterator[Callable[..., FakeVmm]]:
    """Start one or more: ``fake_vmm("pause=timeout", options=["-v"])``. Each ends with the test."""
    with ExitStack() as stack:

        def start(*faults: str, options: Sequence[str] = ()) -> FakeVmm:
            name = f"fake{len(list(tmp_path.glob('fake*.log')))}"
            return stack.enter_context(open_fake_vmm(tmp_path, name, *faults, options=options))

        yield start


@contextmanager
def open_fake_vmm(folder: Path, name: str, *faults: str, options: Sequence[str] = ()) -> Iterator[FakeVmm]:
    """``fake_vmm`` without pytest: one process for the length of the block, its socket and log in ``folder``."""
    path, log = folder / f"{name}.sock", folder / f"{name}.log"
    command = [sys.executable, "-P", "-m", "trivmm", "fake", "--api-socket", f"path={path}", *options]
    for fault in faults:
        command += ["--fail", fault]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            made = FakeVmm(path, process)
            until = time.monotonic() + START_LIMIT_S
            while not _answers(made):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"trivmm fake did not start: {log.read_text(errors='replace')}")
                time.sleep(POLL_S)
            yield made
        finally:
            _end(process)


def _answers(fake: FakeVmm) -> bool:
    if not os.path.exists(fake.socket):
        return False
    try:
        return fake.call("GET", "vmm.ping")[0] == 200
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_LIMIT_S)
