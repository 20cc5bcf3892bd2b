"""Where a migration goes and comes in: ``unix:/path`` and ``tcp:host:port`` URLs, dialling, listening.

A :class:`Dialer` makes connections to the destination (more than one over a life: a verdict is asked for on a new
one); a :class:`Listener` accepts them. Unix ones are :mod:`trivmm.unixsocket`'s.
"""

from __future__ import annotations

import socket
from typing import Final, Protocol, TypeAlias

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, shown
from trivmm.migration.link.halves import Connection, LinkLost
from trivmm.migration.link.sockets import socket_connection
from trivmm.unixsocket import UnixListener, check_path, listen_unix

__all__ = ["Address", "Dialer", "Listener", "SocketDialer", "TcpAddress", "UnixAddress", "listen", "parse_url"]

BACKLOG: Final = 16
SEND_BUFFER: Final = 4 << 20  # asked for; the kernel gives what net.core.wmem_max allows
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
        check_path(path, field, url)
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
    @property
    def transport(self) -> str:
        """What carries the stream: ``unix``, ``tcp``, ``memory``."""

    async def dial(self) -> Connection:
        """:raises LinkLost: nobody listens there. :raises DeadlineError: (connect)."""


class Listener(Protocol):
    url: str

    async def accept(self) -> Connection: ...

    def close(self) -> None:
        """Idempotent; never blocks; removes what :func:`listen` left in the file system."""


@attrs.frozen(eq=False)
class SocketDialer:
    address: Address
    deadlines: Deadlines

    @property
    def transport(self) -> str:
        return "unix" if isinstance(self.address, UnixAddress) else "tcp"

    async def dial(self) -> Connection:
        try:
            with self.deadlines.enter("connect", f"{self.address}: no answer"):
                if isinstance(self.address, UnixAddress):
                    stream = await trio.open_unix_socket(self.address.path)
                else:
                    stream = await trio.open_tcp_stream(self.address.host, self.address.port)
        except (OSError, ValueError) as error:  # ValueError: a host name that can't be one (IDNA, NUL)
            why = getattr(error, "strerror", None) or str(error)
            raise LinkLost(f"{self.address}: cannot connect ({why}); is a receiver waiting there?") from error
        return _connection(stream.socket, str(self.address), self.deadlines)


def _connection(sock: trio.socket.SocketType, name: str, deadlines: Deadlines) -> Connection:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its buffers tune themselves
    return socket_connection(sock, name, deadlines)


class SocketListener:
    """``url`` has the real port where 0 was asked for."""

    def __init__(
        self, sock: trio.socket.SocketType, address: Address, files: UnixListener | None, d: Deadlines
    ) -> None:
        self.url = str(address)
        self._sock = sock
        self._files = files
        self._deadlines = d
        self._closed = False

    async def accept(self) -> Connection:
        while True:
            try:
                sock, _ = await self._sock.accept()
            except OSError as error:
                if self._closed:
                    raise trio.ClosedResourceError from error
                await trio.sleep(0.1)  # a connection that is gone already, or no descriptors left just now
                continue
            return _connection(sock, f"{self.url} (incoming)", self._deadlines)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._sock.close()
        if self._files is not None:
            self._files.close()


async def listen(address: Address, deadlines: Deadlines, field: str = "receiver_url") -> SocketListener:
    """A unix socket gets mode 0600. :raises ConfigError: the address can't be had."""
    if isinstance(address, UnixAddress):
        made = listen_unix(address.path, field, str(address), backlog=BACKLOG)
        return SocketListener(trio.socket.from_stdlib_socket(made.sock), address, made, deadlines)
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
