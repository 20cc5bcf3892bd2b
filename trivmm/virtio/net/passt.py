"""A passt of one network interface: user-mode networking, without root, by a program that does nothing else.

It gets one end of a socket pair and ends when the other end is closed; so nothing of it is left wherever the VMM's
process ends, however it does. The guest gets its addresses by DHCP; the gateway's address is the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from typing import Final

from trivmm.errors import ConfigError, reason_of, shown

__all__ = ["PROGRAM", "Passt", "find_passt"]

logger = logging.getLogger(__name__)

PROGRAM: Final = "passt"
REMEDY: Final = "install passt (apt-get install passt), or give tap=NAME"
SAID_MOST: Final = 400  # characters of its last words that a message repeats
HEARD_MOST: Final = 4096  # bytes of what it says that are kept: the first ones, and it never waits for us to read them
ETHERTYPE_ARP, REQUEST = 0x0806, 1
SHORTEST: Final = 60


def find_passt() -> str:
    """:raises ConfigError: when it is not installed."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise ConfigError("net.link", PROGRAM, "there is no such program", REMEDY)
    return found


class Passt:
    """``fd`` is our end, a nonblocking unix stream socket that its taker owns. Made in a thread: it waits for the
    program, ``passt`` seconds at the most."""

    def __init__(self, mac: bytes, limit_s: float) -> None:
        """``mac`` is the guest's, ``limit_s`` the deadline ``passt``.

        :raises ConfigError: it can't be started, or ended at once, with its last words."""
        self._limit_s = limit_s
        program = find_passt()
        self._said = _fixed_file(HEARD_MOST)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [program, "--foreground", "--quiet", "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._said,
                    start_new_session=True,  # Ctrl-C at our terminal is not for it
                )
        except OSError as error:
            ours.close()
            os.close(self._said)
            raise ConfigError("net.link", PROGRAM, f"cannot start it ({reason_of(error)})", REMEDY) from error
        try:
            self._until_it_answers(ours, mac)
        except BaseException:
            ours.close()
            self.end()
            raise
        ours.setblocking(False)
        self.fd = ours.detach()

    def _until_it_answers(self, sock: socket.socket, mac: bytes) -> None:
        """Ask it for an address, as a machine does that sees whether one is free: it has them all."""
        probe = b"\xff" * 6 + mac + struct.pack(">HHHBBH", ETHERTYPE_ARP, 1, 0x0800, 6, 4, REQUEST)
        probe = (probe + mac + bytes(4) + bytes(6) + bytes((192, 0, 2, 1))).ljust(SHORTEST, b"\0")
        ends = time.monotonic() + self._limit_s
        with contextlib.suppress(OSError):
            sock.sendall(struct.pack(">I", len(probe)) + probe)
        if select.select([sock], [], [], self._limit_s)[0]:
            with contextlib.suppress(OSError):
                sock.settimeout(max(0.1, ends - time.monotonic()))
                if head := sock.recv(4, socket.MSG_WAITALL):
                    sock.recv(min(int.from_bytes(head, "big"), 1 << 16), socket.MSG_WAITALL)
                    return
            raise ConfigError("net.link", PROGRAM, f"it ended at once: {self._last_words()}", REMEDY)
        logger.warning("passt has not answered within %g s; it may come yet", self._limit_s)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._limit_s)
        said = os.pread(self._said, HEARD_MOST, 0).rstrip(b"\0").decode(errors="replace").strip().splitlines()
        return shown(said[-1])[1:-1][:SAID_MOST] if said else f"its status is {self._process.returncode}"

    def end(self) -> None:
        """It has lost its socket, or is to be gone now. Idempotent."""
        if self._said < 0:
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed, and reaped when the next one is started
            self._process.wait(self._limit_s)
        os.close(self._said)
        self._said = -1


def _fixed_file(size: int) -> int:
    """A descriptor of a file in memory that never grows: what is written past its end is lost."""
    fd = os.memfd_create("said", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return fd
