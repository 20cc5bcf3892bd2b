"""Descriptors that API clients pass along with a request (SCM_RIGHTS): received, owned, closed if nobody takes them.

A request has those that came before its last byte did. Whoever takes them owns them from then on; the server closes the
rest once the request is answered, and all of a connection's when that ends.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from typing import Final

__all__ = ["MAX_FDS", "SPACE", "Passed"]

logger = logging.getLogger(__name__)

MAX_FDS: Final = 253  # the kernel's SCM_MAX_FD: no message carries more
MAX_KEPT: Final = 32  # a connection: more than any request has a use for
SPACE: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Passed:
    """In the order in which they came; at most :data:`MAX_KEPT`, more are closed at once."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def receive(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """What ``recvmsg`` gave, with ``MSG_CMSG_CLOEXEC``."""
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                room = MAX_KEPT - len(self._fds)
                self._fds += fds[:room]
                _close(fds[room:].tolist(), "too many")

    @property
    def fds(self) -> tuple[int, ...]:
        """Still ours: see :meth:`take`."""
        return tuple(self._fds)

    def take(self) -> tuple[int, ...]:
        """The caller owns them."""
        fds, self._fds = self._fds, []
        return tuple(fds)

    def close(self) -> None:
        """Idempotent."""
        _close(self.take(), "nothing uses them")


def _close(fds: list[int] | tuple[int, ...], why: str) -> None:
    for fd in fds:
        os.close(fd)
    if fds:
        logger.info("closed %d descriptors that came with an API request: %s", len(fds), why)
