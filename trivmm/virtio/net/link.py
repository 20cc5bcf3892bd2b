"""What an interface is tied to, as this process has it: the links of ``ffi/net_link.c``, one a pair of queues.

They are a device's *storage* in the sense that one side at a time has them (:class:`~trivmm.virtio.port.Storage`): the
side that runs the VM. A migration's source lets go of taps, sockets and their paths before COMMIT, its destination
takes them at COMMIT. What a switch has to know of that, the device announces.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from trivmm._native import ffi, lib
from trivmm.errors import ConfigError, NotSupported, reason_of
from trivmm.unixsocket import UnixListener, listen_unix
from trivmm.virtio.net.config import NetConfig, mac_bytes, split_link
from trivmm.virtio.net.passt import Passt, find_passt
from trivmm.virtio.net.tap import TUN, dup_taps, open_taps

__all__ = ["NetLinks"]

PEERS = 8  # that wait while no worker takes them; the last one to come is the one that counts


class NetLinks:
    """``natives``: a ``struct tv_net_link *`` each, which live as long as this does; what is behind them comes with
    :meth:`take_lock` and goes with :meth:`release_lock`. Neither while a worker runs."""

    def __init__(self, config: NetConfig, *, incoming: bool, passt_s: float) -> None:
        """:raises ConfigError: naming what is wrong with it."""
        self._config = config
        self._passt_s = passt_s
        self._listener: UnixListener | None = None
        self._passt: Passt | None = None
        self._taken = False
        if incoming and config.fds is not None:
            raise NotSupported(
                "net.fds", list(config.fds), "descriptors do not travel with a migration yet", "give tap=NAME or a link"
            )
        kind = lib.TV_NET_TAP if config.is_tap else lib.TV_NET_STREAM
        if config.link is not None and config.link.startswith("dgram:"):
            kind = lib.TV_NET_DGRAM
        self.natives = [self._new(kind) for _ in range(config.pairs)]
        self._aim()
        if not incoming:
            self.take_lock()

    def _new(self, kind: int) -> Any:
        native = lib.tv_net_link_new(kind, -1, -1)
        if native == ffi.NULL:
            raise MemoryError("a network link")
        return ffi.gc(native, lib.tv_net_link_free)

    def _aim(self) -> None:
        link = self._config.link
        if link is None:
            return
        kind, path = split_link(link)
        there = {"connect": path, "dgram": self._config.peer}.get(kind)
        if there is not None:
            name = os.fsencode(there)
            lib.tv_net_link_to(self.natives[0], name, len(name))

    # --- Storage -------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Nothing is kept here that another could want."""

    def refresh(self) -> None:
        """What can be seen before it is taken. :raises ConfigError: it can't be."""
        config = self._config
        if config.link == "passt":
            find_passt()
        elif config.is_tap and not os.path.exists(TUN):
            raise ConfigError("net.tap", config.tap or "", f"there is no {TUN}", "load the kernel's tun module")

    def take_lock(self) -> None:
        """Idempotent. :raises ConfigError: the tap, or the socket's path, can't be had."""
        if self._taken:
            return
        config = self._config
        if config.link is None:
            fds = open_taps(config) if config.fds is None else dup_taps(config.fds)
            for native, fd in zip(self.natives, fds, strict=True):
                native.fd = fd
        else:
            try:
                self._take_link(config.link)
            except OSError as error:
                self.release_lock()
                problem = f"cannot make it ({reason_of(error)})"
                raise ConfigError("net.link", config.link, problem, "look at the host's limits (ulimit -n)") from error
        self._taken = True

    def _take_link(self, link: str) -> None:
        native, (kind, path) = self.natives[0], split_link(link)
        if kind == "listen":
            self._listener = listen_unix(path, "net.link", link, backlog=PEERS)
            native.listen_fd = _copy(self._listener.sock)
        elif kind == "dgram":
            self._listener = listen_unix(path, "net.link", link, kind=socket.SOCK_DGRAM)
            native.fd = _copy(self._listener.sock)
        elif kind == "passt":
            self._passt = Passt(mac_bytes(self._config.mac), self._passt_s)
            native.fd = self._passt.fd
        # A peer that is dialled may come later: the worker looks for it.

    def release_lock(self) -> None:
        """Idempotent. Nobody is on the other end after this, and the paths are free."""
        self._taken = False
        for native in self.natives:
            lib.tv_net_link_drop(native)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._passt is not None:
            self._passt.end()
            self._passt = None

    def close(self) -> None:
        self.release_lock()


def _copy(sock: socket.socket) -> int:
    """A descriptor of the same socket, which C owns; nonblocking."""
    copy = sock.dup()
    copy.setblocking(False)
    return copy.detach()
