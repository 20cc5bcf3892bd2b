"""Unix sockets that others find by a path: made there, or passed in as a descriptor that listens. Without trio.

A socket that is made has mode 0600 and a lock file beside it (``PATH.lock``). Who holds the lock may remove and make
the socket: a socket left by a killed process is removed, since the lock dies with its holder, and one in use never is.
Both files go away when the listener is closed. A socket that is passed in stays its maker's in the file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import Final

import attrs

from trivmm.errors import ConfigError

__all__ = ["BACKLOG", "SocketFd", "UnixListener", "adopt_listener", "check_path", "listen_unix"]

BACKLOG: Final = 1024  # a non-blocking connect to a full queue fails; the kernel caps this at net.core.somaxconn
MAX_UNIX_PATH: Final = 107  # sun_path less its final zero
LOCK_TRIES: Final = 10  # each lost race means that another listener came and went in between
IN_USE: Final = "in use by another process"
OTHER: Final = "give another path"

_FILE_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


@attrs.frozen
class SocketFd:
    """The number of a descriptor that the process inherited, as ``fd=N`` names it."""

    fd: int

    def __str__(self) -> str:
        return f"fd={self.fd}"


@attrs.define(eq=False)
class UnixListener:
    """``sock`` listens. Who wraps it for trio closes that wrapper first: trio wakes whoever waits in ``accept``."""

    sock: socket.socket
    _path: str
    _inode: tuple[int, int]
    _lock: int
    _closed: bool = attrs.field(default=False, init=False)

    def close(self) -> None:
        """Idempotent; never blocks; removes the socket (unless somebody replaced it) and its lock file."""
        if self._closed:
            return
        self._closed = True
        self.sock.close()
        _unlink_if(self._path, self._inode)
        _release(self._path, self._lock)


def check_path(path: str, field: str, value: object) -> None:
    """:raises ConfigError: no socket can have that path."""
    if not path:
        raise ConfigError(field, value, "no path", "give the path of a socket")
    try:
        fits = len(os.fsencode(path)) <= MAX_UNIX_PATH and "\0" not in path
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        fits = False
    if not fits:
        raise ConfigError(field, value, f"a socket path has at most {MAX_UNIX_PATH} bytes, none of them zero", OTHER)


def listen_unix(
    path: str,
    field: str,
    value: object = None,
    *,
    backlog: int = BACKLOG,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> UnixListener:
    """Make and lock a socket at ``path``, and listen there; one of datagrams has nobody to listen for.

    ``field`` and ``value`` (by default the path) are what the user wrote. :raises ConfigError: names them."""
    value = path if value is None else value
    check_path(path, field, value)
    lock = _lock(path, field, value)
    sock = socket.socket(socket.AF_UNIX, kind)
    inode: tuple[int, int] | None = None
    try:
        try:
            _remove_stale(path, field, value, kind)
            os.fchmod(sock.fileno(), 0o600)  # before bind: the socket is never there with a wider mode
            sock.bind(path)
            inode = _inode(os.lstat(path))
            if kind == socket.SOCK_STREAM:
                sock.listen(backlog)
        except OSError as error:
            raise ConfigError(field, value, f"cannot listen ({error.strerror})", OTHER) from error
        return UnixListener(sock, path, inode, lock)
    except BaseException:
        sock.close()
        if inode is not None:
            _unlink_if(path, inode)
        _release(path, lock)
        raise


def adopt_listener(where: SocketFd, field: str, *, backlog: int = BACKLOG) -> socket.socket:
    """The inherited listening socket; from here it is ours, and no child of ours inherits it.

    Its queue is made ``backlog`` long: a parent that waits for one connection often gave it room for one.
    :raises ConfigError: says what the descriptor is instead."""
    remedy = "pass a unix stream socket that listens"
    try:
        mode = os.fstat(where.fd).st_mode
    except OSError as error:
        raise ConfigError(field, str(where), f"not an open descriptor ({error.strerror})", remedy) from error
    if not stat.S_ISSOCK(mode):
        kind = next((name for test, name in _FILE_KINDS if test(mode)), "no socket")
        raise ConfigError(field, str(where), f"the descriptor is {kind}", remedy)
    sock = socket.socket(fileno=where.fd)
    family, kind = _name(sock.family), _name(sock.type)
    try:
        if (family, kind) != ("AF_UNIX", "SOCK_STREAM"):
            raise ConfigError(field, str(where), f"the descriptor is a socket of {family}, {kind}", remedy)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(field, str(where), "the descriptor is a socket that does not listen", remedy)
        os.set_inheritable(where.fd, False)
        try:
            sock.listen(backlog)
        except OSError as error:
            raise ConfigError(field, str(where), f"cannot listen ({error.strerror})", remedy) from error
    except BaseException:
        sock.detach()  # what we don't take stays open: it is somebody else's
        raise
    return sock


def _name(number: int) -> str:
    """Of a family or type: Python gives those that it knows as an enum."""
    return getattr(number, "name", str(int(number)))


# --- the lock file -------------------------------------------------------------------------------------------------


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _lock(path: str, field: str, value: object) -> int:
    """The lock file's descriptor, locked. A file that its holder removed while we waited for it is tried again."""
    lock_path = path + ".lock"
    for _ in range(LOCK_TRIES):
        try:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            remedy = "give a path in a directory that exists and is yours"
            raise ConfigError(field, value, f"cannot make {lock_path} ({error.strerror})", remedy) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _inode(os.fstat(fd)) == _inode(os.stat(lock_path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(field, value, IN_USE, OTHER) from None
        except FileNotFoundError:
            pass
        except OSError as error:  # a file system without locks
            os.close(fd)
            raise ConfigError(field, value, f"cannot lock {lock_path} ({error.strerror})", OTHER) from error
        os.close(fd)
    raise ConfigError(field, value, "the lock file keeps changing", OTHER)


def _release(path: str, lock: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path + ".lock")
    os.close(lock)


def _unlink_if(path: str, inode: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        if _inode(os.lstat(path)) == inode:
            os.unlink(path)


def _remove_stale(path: str, field: str, value: object, kind: socket.SocketKind) -> None:
    """Under the lock: a socket there that nobody answers was left by a killed process."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(field, value, "exists and is not a socket", OTHER)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):  # EAGAIN: its queue is full
        raise ConfigError(field, value, IN_USE, OTHER)
    if code != errno.ECONNREFUSED:
        raise ConfigError(field, value, f"is a socket that can't be tried ({os.strerror(code)})", OTHER)
    os.unlink(path)
