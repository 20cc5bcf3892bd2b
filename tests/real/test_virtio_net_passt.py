"""passt as the other end of an interface: started, spoken to, gone with its device; and what is said where it fails."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.virtio.net.config import NetConfig, mac_bytes
from trivmm.virtio.net.device import NetDevice
from trivmm.virtio.net.passt import Passt

LIMIT_S = 30
MAC = mac_bytes("52:54:00:00:00:0a")
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: apt-get install passt")


def program(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passt that is a shell script."""
    path = folder / "passt"
    path.write_text(f"#!/bin/sh\n{source}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@needs_passt
def test_it_gives_addresses_and_ends_with_its_device() -> None:
    """As a guest asks: DHCP, answered by the program and not by us."""
    before = children()
    made = Passt(MAC, LIMIT_S)
    assert len(children() - before) == 1
    with socket.socket(fileno=made.fd) as sock:
        sock.settimeout(LIMIT_S)
        options = b"\x63\x82\x53\x63" + b"\x35\x01\x01" + b"\xff"
        bootp = b"\1\1\6\0" + b"\1\2\3\4" + bytes(20) + MAC + bytes(10 + 192) + options
        udp = (68).to_bytes(2, "big") + (67).to_bytes(2, "big") + (8 + len(bootp)).to_bytes(2, "big") + bytes(2) + bootp
        ip = bytearray(b"\x45\0" + (20 + len(udp)).to_bytes(2, "big") + bytes(4) + b"\x40\x11" + bytes(6) + b"\xff" * 4)
        total = sum(int.from_bytes(ip[at : at + 2], "big") for at in range(0, 20, 2))
        ip[10:12] = (~(total % 0xFFFF) & 0xFFFF).to_bytes(2, "big")
        frame = b"\xff" * 6 + MAC + b"\x08\0" + bytes(ip) + udp
        sock.sendall(len(frame).to_bytes(4, "big") + frame)
        while True:
            length = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "big")
            answer = sock.recv(length, socket.MSG_WAITALL)
            if answer[12:14] == b"\x08\0" and answer[23] == 17 and answer[34:36] == b"\0\x43":
                break
    assert answer[42:46] == b"\2\1\6\0"  # a reply to us
    assert answer[46:50] == b"\1\2\3\4"
    assert any(answer[58:62])  # our address
    made.end()
    assert children() == before


@needs_passt
def test_a_device_has_its_own_and_ends_it(fds_before_and_after: Callable[[], int]) -> None:
    before, open_before = children(), fds_before_and_after()
    memory = GuestMemory([(0, 1 << 20)])
    device = NetDevice(NetConfig(link="passt"), memory, "_net0")
    assert len(children() - before) == 1
    device.links.release_lock()
    assert children() == before
    device.links.take_lock()
    assert len(children() - before) == 1
    device.close()
    memory.close()
    assert children() == before
    assert fds_before_and_after() == open_before


@pytest.fixture
def fds_before_and_after() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("echo one >&2; echo 'no \033[1minterface' >&2; exit 1", r"it ended at once: no \u001b[1minterface"),
        ("exit 3", "it ended at once: its status is 3"),
        ("head -c 70000 /dev/zero | tr '\\0' x >&2; exit 1", "it ended at once: xxx"),
    ],
)
def test_one_that_ends_at_once_is_a_line_with_its_last_words(
    tmp_path: Path, source: str, said: str, monkeypatch: pytest.MonkeyPatch, fds_before_and_after: Callable[[], int]
) -> None:
    program(tmp_path, source, monkeypatch)
    before, open_before = children(), fds_before_and_after()
    with pytest.raises(ConfigError) as caught:
        Passt(MAC, LIMIT_S)
    assert str(caught.value).startswith(f'net.link = "passt": {said}')
    assert str(caught.value).endswith("install passt (apt-get install passt), or give tap=NAME")
    assert len(str(caught.value)) < 600
    assert children() == before
    assert fds_before_and_after() == open_before


def test_one_that_says_nothing_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program(tmp_path, "exec sleep 60", monkeypatch)
    before = children()
    made = Passt(MAC, 0.05)
    assert "has not answered within 0.05 s" in caplog.text
    os.close(made.fd)
    made.end()
    assert children() == before


def test_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    memory = GuestMemory([(0, 1 << 20)])
    with pytest.raises(ConfigError, match=r'net\.link = "passt": there is no such program; install passt'):
        NetDevice(NetConfig(link="passt"), memory, "_net0")
    device = NetDevice(NetConfig(link="passt"), memory, "_net0", incoming=True)
    with pytest.raises(ConfigError, match="there is no such program"):
        device.links.refresh()  # a migration fails before it has begun
    device.close()
    memory.close()
