"""virtio-vsock (virtio 1.2 section 5.10), streams only: one worker in C for its three queues and all its sockets.

``ffi/vsock.h`` says how it works. Connections are this host's. They outlive a worker, so a switchover that is undone
loses none; they end with their driver, and with a move: the destination tells its driver of a transport reset, as
Cloud Hypervisor and Firecracker do after a restore. The path of the listening socket is handed over at COMMIT, like an
image's lock.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from typing import Any, Final

from trivmm._native import ffi, lib
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.unixsocket import UnixListener, listen_unix
from trivmm.virtio.device import RING_FEATURES, NoState, WorkerDevice
from trivmm.virtio.vsock.config import VsockConfig

__all__ = ["VsockDevice"]

logger = logging.getLogger(__name__)

F_STREAM: Final = 1 << 0
QUEUE_SIZE: Final = 256
MAX_NS: Final = 1 << 62  # some limit that no clock reaches
COUNTS: Final = tuple(name for name, _ in ffi.typeof("struct tv_vsock_counts").fields)
FAULTS: Final[dict[str, str]] = {
    "malformed": "packets that are no packets",
    "misaddressed": "packets with another address",
    "over_credit": "more data than there was room for",
    "out_of_order": "packets that make no sense in their connection's state",
    "bad_greeting": "clients that did not say CONNECT <port>",
    "refused": "more connections than there may be",
    "no_descriptors": "no descriptors left for more connections",
}
"""What is worth one line in the log, the first time; the counters have how often."""


class SocketLock:
    """The listening socket as what one process at a time may have; see :class:`trivmm.virtio.port.Storage`."""

    def __init__(self, path: str, native: Any) -> None:
        self._path = path
        self._native = native
        self._listener: UnixListener | None = None

    def take_lock(self) -> None:
        """Idempotent. :raises ConfigError: when there can be no socket at the path."""
        if self._listener is not None:
            return
        listener = listen_unix(self._path, "vsock.socket")
        listener.sock.setblocking(False)
        if lib.tv_vsock_listen(self._native, listener.sock.fileno()):
            listener.close()
            raise ConfigError("vsock.socket", self._path, "cannot be watched", "look at the host's limits (epoll)")
        self._listener = listener

    def release_lock(self) -> None:
        """Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            lib.tv_vsock_listen(self._native, -1)
            listener.close()

    def flush(self) -> None:
        """Streams have nothing that a later host could want."""

    def refresh(self) -> None:
        """Nor was anything cached."""


class VsockDevice(WorkerDevice):
    """``listen``: its socket is there from now on; otherwise from the first :meth:`SocketLock.take_lock`."""

    device_type = 19
    features = RING_FEATURES | F_STREAM
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)  # receive, transmit, events: section 5.10.2

    def __init__(
        self,
        config: VsockConfig,
        memory: GuestMemory,
        name: str = "_vsock0",
        *,
        listen: bool = True,
        deadlines: Deadlines | None = None,
    ) -> None:
        """:raises ConfigError: when there can be no socket at the path."""
        super().__init__(config.id or name, memory)
        self._cid = config.cid
        self._native = lib.tv_vsock_new(config.cid, os.fsencode(config.socket))
        if self._native == ffi.NULL:
            raise ConfigError("vsock.socket", config.socket, "no memory or descriptors for it", "raise ulimit -n")
        limits = deadlines or Deadlines()
        self.set_patience(limits.vsock_greeting, limits.vsock_linger)
        self._counts = lib.tv_vsock_counts(self._native)
        self._told: set[str] = set()
        self.storage = self._socket = SocketLock(config.socket, self._native)
        try:
            if listen:
                self._socket.take_lock()
        except BaseException:
            self.close()
            raise

    def set_patience(self, greeting_s: float, linger_s: float) -> None:
        """How long a connection may be half made, and half closed. Before the first activation."""
        lib.tv_vsock_set_patience(self._native, *(min(round(each * 1e9), MAX_NS) for each in (greeting_s, linger_s)))

    def read_config(self, offset: int, size: int) -> bytes:
        return struct.pack("<Q", self._cid)[offset : offset + size].ljust(size, b"\xff")

    def _shared_out(self, queues: Sequence[int]) -> list[Sequence[int]]:
        """One thread: the queues have their connections in common."""
        return [queues] if queues else []

    def _make_worker(self, features: int) -> Any:
        native = ffi.new("struct tv_vsock_worker *")
        lib.tv_vsock_worker_init(native, self._native)
        return native

    async def stop(self) -> None:
        await super().stop()
        self._log_faults()

    def reset(self) -> None:
        super().reset()
        lib.tv_vsock_reset(self._native)

    def load(self, state: NoState) -> None:
        """Nothing travels: whatever the driver was connected to is elsewhere."""
        lib.tv_vsock_moved(self._native)

    def counters(self) -> dict[str, int]:
        """See ``struct tv_vsock_counts``."""
        self._log_faults()
        return {name: int(getattr(self._counts, name)) for name in COUNTS}

    def _log_faults(self) -> None:
        for name, what in FAULTS.items():
            if name not in self._told and getattr(self._counts, name):
                self._told.add(name)
                logger.warning("%s: %s; said once, counted as %s", self.name, what, name)

    def close(self) -> None:
        """After the last worker, or with a thread that is stuck, which keeps what it works on. Idempotent; what it
        counted can still be read."""
        self._socket.release_lock()
        native, self._native = self._native, ffi.NULL
        if native != ffi.NULL and not self._workers:
            counts = ffi.new("struct tv_vsock_counts *")
            counts[0] = self._counts[0]
            self._counts = counts
            lib.tv_vsock_free(native)
