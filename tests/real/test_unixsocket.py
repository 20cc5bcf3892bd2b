"""Unix listeners: their files, their locks, stale sockets, and descriptors that are passed in."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from trivmm.errors import ConfigError
from trivmm.unixsocket import SocketFd, adopt_listener, check_path, listen_unix


def leave_a_socket(path: Path) -> None:
    """As a killed process does: nobody listens, nobody holds the lock."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name(path.name + ".lock").touch()


def test_a_listeners_files_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen_unix(str(path), "--x")
    assert sorted(os.listdir(tmp_path)) == ["s", "s.lock"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not listener.sock.get_inheritable()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.sock.accept()[0].close()
    listener.close()
    listener.close()
    assert os.listdir(tmp_path) == []
    assert listener.sock.fileno() == -1


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_a_socket(path)
    listen_unix(str(path), "--x").close()
    assert os.listdir(tmp_path) == []


def test_one_that_is_in_use_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_unix(str(path), "--x")
    before = path.stat().st_ino
    with pytest.raises(ConfigError, match=r'--x = "unix:.*in use by another process') as caught:
        listen_unix(str(path), "--x", f"unix:{path}")
    assert "\n" not in str(caught.value)
    assert path.stat().st_ino == before
    first.close()
    with socket.socket(socket.AF_UNIX) as foreign:  # holds no lock
        foreign.bind(str(path))
        foreign.listen()
        with pytest.raises(ConfigError, match="in use by another process"):
            listen_unix(str(path), "--x")
    assert os.listdir(tmp_path) == ["s"]  # the refused one took its lock file with it


def test_a_listener_leaves_what_somebody_put_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen_unix(str(path), "--x")
    path.unlink()
    path.write_text("mine")
    listener.close()
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="not a socket"):
        listen_unix(str(path), "--x")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 108, "\ud800"])
def test_what_no_socket_can_be_called(path: str) -> None:
    with pytest.raises(ConfigError, match="--x"):
        check_path(path, "--x", path)
    with pytest.raises(ConfigError, match="--x"):
        listen_unix(path, "--x")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make"):
        listen_unix(str(tmp_path / "no" / "s"), "--x")


def test_a_descriptor_that_listens_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as parents:
        parents.bind(str(path))
        parents.listen(0)
        fd = os.dup(parents.fileno())
        os.set_inheritable(fd, True)
    with adopt_listener(SocketFd(fd), "--api-socket") as taken:
        assert taken.fileno() == fd
        assert not os.get_inheritable(fd)
        clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(8)]
        assert [client.connect_ex(str(path)) for client in clients] == [0] * 8  # the queue is longer than its maker's
        for client in clients:
            client.close()
    assert path.exists()


def test_a_descriptor_that_is_something_else_is_named_and_left_open(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    read_end, write_end = os.pipe()
    stream, datagram, tcp = (
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        socket.socket(socket.AF_INET),
    )
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    cases = [
        (os.open(tmp_path / "file", os.O_RDONLY), "a regular file"),
        (os.open(tmp_path, os.O_RDONLY), "a directory"),
        (os.open("/dev/null", os.O_RDONLY), "a character device"),
        (read_end, "a pipe"),
        (stream.detach(), "a socket that does not listen"),
        (datagram.detach(), "SOCK_DGRAM"),
        (tcp.detach(), "AF_INET"),
    ]
    for fd, said in cases:
        with pytest.raises(ConfigError, match=rf'--api-socket = "fd={fd}": .*{said}') as caught:
            adopt_listener(SocketFd(fd), "--api-socket")
        assert "\n" not in str(caught.value)
        os.close(fd)  # raises if it had been closed
    os.close(write_end)
    with pytest.raises(ConfigError, match="not an open descriptor"):
        adopt_listener(SocketFd(write_end), "--api-socket")
