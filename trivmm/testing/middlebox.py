"""A middle box between the two ends of a migration: it relays frames, and at one of them it closes or goes silent.

What a firewall, a proxy or a cable does to a link, at a named message, on real unix sockets, between processes too.
Closing it ends its threads: they wait for nothing but its sockets.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import attrs

from trivmm.migration.wire.frame import HEADER_BYTES, MessageType, parse_header

__all__ = ["MiddleBox", "Strike", "middle_box"]

JOIN_S: Final = 30.0


@attrs.frozen
class Strike:
    """``at`` the first frame of this type, from either side: ``close`` the link in good order, ``silence`` it (whatever
    comes is taken and lost), or ``pass``. ``forward``: the frame itself still arrives. ``first`` is called before any
    of that; the frame waits for it."""

    at: MessageType
    how: str
    forward: bool = False
    first: Callable[[], None] = lambda: None


@attrs.define(eq=False)
class MiddleBox:
    """Listens at ``path``, relays to ``target``. ``down``: new connections are closed at sight. ``struck`` is set
    after the strike, which happens once; the links that came after it are relayed faithfully."""

    path: str
    target: str
    strike: Strike | None = None
    down: bool = False
    struck: threading.Event = attrs.field(factory=threading.Event)
    _listener: socket.socket = attrs.field(factory=lambda: socket.socket(socket.AF_UNIX), init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _threads: list[threading.Thread] = attrs.field(factory=list, init=False)
    _socks: list[socket.socket] = attrs.field(factory=list, init=False)
    _taken: bool = attrs.field(default=False, init=False)

    @property
    def url(self) -> str:
        return f"unix:{self.path}"

    def open(self) -> None:
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="middle box")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                with self._lock:
                    self._socks += [near, far]
                if self.down:
                    _hang_up(near, far)
                    continue
                try:
                    far.connect(self.target)
                except OSError:
                    _hang_up(near, far)
                    continue
                muted = threading.Event()
                self._start(self._relay, near, far, muted)
                self._start(self._relay, far, near, muted)

    def _relay(self, source: socket.socket, target: socket.socket, muted: threading.Event) -> None:
        with suppress(OSError):
            while frame := _frame(source):
                if muted.is_set():
                    continue
                strike = self._strikes(parse_header(frame[:HEADER_BYTES]).type)
                if strike is None:
                    target.sendall(frame)
                else:
                    self._carry_out(strike, frame, source, target, muted)
        if not muted.is_set():
            _hang_up(source, target)

    def _carry_out(
        self, strike: Strike, frame: bytes, source: socket.socket, target: socket.socket, muted: threading.Event
    ) -> None:
        strike.first()
        try:
            if strike.how == "silence":
                muted.set()  # first of all: what the frame brings about must not slip through
            if strike.forward:
                target.sendall(frame)
            if strike.how == "close":
                _hang_up(source, target)
        finally:
            self.struck.set()

    def _strikes(self, kind: MessageType) -> Strike | None:
        with self._lock:
            if self._taken or self.strike is None or kind is not self.strike.at:
                return None
            self._taken = True
            return self.strike

    def close(self) -> None:
        """Idempotent."""
        _hang_up(self._listener)
        self._listener.close()
        self._threads[0].join(JOIN_S)
        _hang_up(*self._socks)
        for thread in self._threads:
            thread.join(JOIN_S)
            assert not thread.is_alive()
        for sock in self._socks:
            sock.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def _hang_up(*socks: socket.socket) -> None:
    for sock in socks:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _frame(sock: socket.socket) -> bytes:
    """A whole frame; empty at the end of the stream."""
    header = _exactly(sock, HEADER_BYTES)
    return header + _exactly(sock, parse_header(header).length) if header else b""


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


@contextmanager
def middle_box(path: str, target: str, strike: Strike | None = None) -> Iterator[MiddleBox]:
    """For the length of the block."""
    box = MiddleBox(path, target, strike)
    box.open()
    try:
        yield box
    finally:
        box.close()
