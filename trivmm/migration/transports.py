"""Where a migration goes and comes in: ``unix:/path`` and ``tcp:host:port`` URLs, dialling, listening.

A :class:`Dialer` makes channels to the destination (more than one over a life: a verdict is asked for on a new
one); a :class:`Listener` accepts them. A unix listener holds a lock file beside its socket, so that a socket left by
a killed process is removed and one in use never is; both files go away with the listener.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from typing import Final, Protocol, TypeAlias

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, shown
from trivmm.migration.channel import Channel, LinkLost, SocketChannel

__all__ = ["Address", "Dialer", "Listener", "SocketDialer", "TcpAddress", "UnixAddress", "listen", "parse_url"]

BACKLOG: Final = 16
MAX_UNIX_PATH: Final = 107  # sun_path less its final zero
SEND_BUFFER: Final = 4 << 20  # asked for; the kernel gives what net.core.wmem_max allows
LOCK_TRIES: Final = 10  # each lost race means that another listener came and went in between
REMEDY: Final = "give unix:/path or tcp:host:port"


@attrs.frozen
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address: TypeAlias = UnixAddress | TcpAddress


def parse_url(url: str, field: str) -> Address:
    """``field`` is ``destination_url`` or ``receiver_url``. :raises ConfigError: names it."""
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        path = rest.removeprefix("//")
        if not path or "\0" in path:
            raise ConfigError(field, url, "no path", REMEDY)
        if len(os.fsencode(path)) > MAX_UNIX_PATH:
            raise ConfigError(field, url, f"a socket path has at most {MAX_UNIX_PATH} bytes", "give a shorter one")
        return UnixAddress(path)
    if scheme == "tcp":
        host, colon, port = rest.removeprefix("//").rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ConfigError(field, url, "an IPv6 address needs brackets", "give tcp:[::1]:port")
        if not colon or not host:
            raise ConfigError(field, url, "no host or no port", REMEDY)
        if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
            raise ConfigError(field, url, f"{shown(port)} is not a port", "give a number up to 65535")
        return TcpAddress(host, int(port))
    raise ConfigError(field, url, f"unknown scheme {shown(scheme)}", REMEDY)


class Dialer(Protocol):
    async def dial(self) -> Channel:
        """:raises LinkLost: nobody listens there. :raises DeadlineError: (connect)."""


class Listener(Protocol):
    url: str

    async def accept(self) -> Channel: ...

    def close(self) -> None:
        """Idempotent; never blocks; removes what :func:`listen` left in the file system."""


@attrs.frozen(eq=False)
class SocketDialer:
    address: Address
    deadlines: Deadlines

    async def dial(self) -> Channel:
        try:
            with self.deadlines.enter("connect", f"{self.address}: no answer"):
                if isinstance(self.address, UnixAddress):
                    stream = await trio.open_unix_socket(self.address.path)
                else:
                    stream = await trio.open_tcp_stream(self.address.host, self.address.port)
        except (OSError, ValueError) as error:  # ValueError: a host name that can't be one (IDNA, NUL)
            why = getattr(error, "strerror", None) or str(error)
            raise LinkLost(f"{self.address}: cannot connect ({why}); is a receiver waiting there?") from error
        return _channel(stream.socket, str(self.address), self.deadlines)


def _channel(sock: trio.socket.SocketType, name: str, deadlines: Deadlines) -> SocketChannel:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its buffers tune themselves
    return SocketChannel(sock, name, deadlines)


class SocketListener:
    """``url`` has the real port where 0 was asked for."""

    def __init__(self, sock: trio.socket.SocketType, address: Address, lock: _PathLock | None, d: Deadlines) -> None:
        self.url = str(address)
        self._sock = sock
        self._lock = lock
        self._deadlines = d
        self._closed = False

    async def accept(self) -> Channel:
        while True:
            try:
                sock, _ = await self._sock.accept()
            except OSError as error:
                if self._closed:
                    raise trio.ClosedResourceError from error
                await trio.sleep(0.1)  # a connection that is gone already, or no descriptors left just now
                continue
            return _channel(sock, f"{self.url} (incoming)", self._deadlines)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._lock:
            self._lock.unlink_socket()
        self._sock.close()
        if self._lock:
            self._lock.release()


class _PathLock:
    """Who holds it may remove and make the socket at ``path``. Held by a listener for its life."""

    def __init__(self, path: str, field: str, url: str) -> None:
        self._path = path
        self._lock_path = path + ".lock"
        self._inode: tuple[int, int] | None = None
        for _ in range(LOCK_TRIES):
            try:
                fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise ConfigError(field, url, f"cannot make {self._lock_path} ({error.strerror})", REMEDY) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours, there = os.fstat(fd), os.stat(self._lock_path)
            except BlockingIOError:
                os.close(fd)
                raise ConfigError(field, url, "another process listens there", "give another path") from None
            except FileNotFoundError:
                os.close(fd)
                continue
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                self._fd = fd
                return
            os.close(fd)
        raise ConfigError(field, url, "the lock file keeps changing", "give another path")

    def clear_stale(self, field: str, url: str) -> None:
        """Remove a socket that nobody listens on. :raises ConfigError: it is in use, or not a socket."""
        try:
            if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
                raise ConfigError(field, url, "exists and is not a socket", "give another path")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
            except OSError as error:
                raise ConfigError(field, url, f"in use ({error.strerror})", "give another path") from error
        raise ConfigError(field, url, "another process listens there", "give another path")

    def made_socket(self) -> None:
        there = os.stat(self._path)
        self._inode = (there.st_dev, there.st_ino)

    def unlink_socket(self) -> None:
        try:
            there = os.lstat(self._path)
            if (there.st_dev, there.st_ino) == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass

    def release(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._lock_path)
        os.close(self._fd)


async def listen(address: Address, deadlines: Deadlines, field: str = "receiver_url") -> SocketListener:
    """A unix socket gets mode 0600. :raises ConfigError: the address can't be had."""
    if isinstance(address, UnixAddress):
        return _listen_unix(address, deadlines, field)
    try:
        with deadlines.enter("connect", f"{address}: the name does not resolve"):
            found = await trio.socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        family, kind, proto, _, where = found[0]
        sock = trio.socket.socket(family, kind, proto)
    except (OSError, ValueError) as error:  # ValueError: a host name that can't be one (IDNA, NUL)
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(field, str(address), why, REMEDY) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind(where)
        sock.listen(BACKLOG)
        return SocketListener(sock, TcpAddress(address.host, sock.getsockname()[1]), None, deadlines)
    except OSError as error:
        sock.close()
        raise ConfigError(field, str(address), f"cannot listen ({error.strerror})", "give a free port") from error
    except BaseException:
        sock.close()
        raise


def _listen_unix(address: UnixAddress, deadlines: Deadlines, field: str) -> SocketListener:
    lock = _PathLock(address.path, field, str(address))
    try:
        lock.clear_stale(field, str(address))
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(raw.fileno(), 0o600)  # before bind: the socket is never there with a wider mode
            raw.bind(address.path)
            lock.made_socket()
            raw.listen(BACKLOG)
            return SocketListener(trio.socket.from_stdlib_socket(raw), address, lock, deadlines)
        except OSError as error:
            raw.close()
            lock.unlink_socket()
            raise ConfigError(field, str(address), f"cannot listen ({error.strerror})", REMEDY) from error
    except BaseException:
        lock.release()
        raise
