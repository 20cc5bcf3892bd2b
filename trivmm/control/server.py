"""The API server: h11 on trio over a unix socket.

The socket is :mod:`trivmm.unixsocket`'s: mode 0600, a lock file beside it; both go away with the server. Reads are
``recvmsg``: descriptors that a client passes are received and, as nothing here uses them, closed. A request has
``api_read`` from its first byte to its last, a response ``api_write``, an idle connection ``api_idle``; a running
handler is bounded by its own operation. When the server is cancelled, a call that runs is cancelled, answers 500 with
its JSON, and then the connection closes.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeAlias

import trio

from trivmm.control.http import Bad, HttpConnection, Request, Response, State, error_response
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError
from trivmm.unixsocket import listen_unix

__all__ = ["Handler", "open_server", "serve_connection"]

LOG: Final = logging.getLogger(__name__)
MAX_CONNECTIONS: Final = 64  # each costs a task and a descriptor; more are told 503
READ_BYTES: Final = 64 << 10
MAX_FDS: Final = 253  # the kernel's SCM_MAX_FD: no message carries more
LINGER_S: Final = 1.0
LINGER_READS: Final = 256  # 16 MiB at the most
ACCEPT_PAUSE_S: Final = 0.1  # after EMFILE and its like: the listener would be readable at once again

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


@asynccontextmanager
async def open_server(path: str, handler: Handler, deadlines: Deadlines) -> AsyncIterator[None]:
    """Serve ``handler`` on the unix socket ``path`` for the length of the block; it listens once the block begins.

    :raises ConfigError: when the socket can't be had, or another process serves there."""
    with _listening(path) as listener:
        failure: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept, listener, handler, deadlines, name="API listener")
            try:
                yield
            except trio.Cancelled:
                raise
            except BaseException as error:
                failure = error  # raised again outside the nursery, so that it isn't wrapped in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


@contextmanager
def _listening(path: str) -> Iterator[trio.socket.SocketType]:
    made = listen_unix(path, "--api-socket")
    try:
        with trio.socket.from_stdlib_socket(made.sock) as listener:
            yield listener
    finally:
        made.close()


async def _accept(listener: trio.socket.SocketType, handler: Handler, deadlines: Deadlines) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            try:
                sock, _ = await listener.accept()
            except OSError as error:
                LOG.warning("accept: %s", error)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(nursery.child_tasks) >= MAX_CONNECTIONS:
                _refuse(sock)
                continue
            nursery.start_soon(serve_connection, sock, handler, deadlines, name="API connection")


def _refuse(sock: trio.socket.SocketType) -> None:
    answer = b"HTTP/1.1 503 \r\nConnection: close\r\nContent-Length: 24\r\n\r\n"
    with sock, contextlib.suppress(OSError):
        os.write(sock.fileno(), answer + b'["too many connections"]')


async def serve_connection(sock: trio.socket.SocketType, handler: Handler, deadlines: Deadlines) -> None:
    """Serve one connection until it ends, and close it. Faults of the peer are survived, and logged at most."""
    http = HttpConnection()
    with sock:
        try:
            while http.state is not State.CLOSED:
                event = await _read_request(sock, http, deadlines)
                if isinstance(event, Bad):
                    await _send(sock, http.answer(event.response, close=True), deadlines)
                    await _linger(sock)
                elif event is not None:
                    await _answer(sock, http, event, handler, deadlines)
        except DeadlineError as error:
            LOG.info("API connection closed: %s", error)
        except OSError as error:
            LOG.info("API connection lost: %s", error)


async def _answer(
    sock: trio.socket.SocketType, http: HttpConnection, request: Request, handler: Handler, deadlines: Deadlines
) -> None:
    try:
        response = await handler(request)
    except trio.Cancelled:
        response = error_response(500, f"{request.name} was cancelled", "the VMM is shutting down")
        with trio.move_on_after(deadlines.api_write, shield=True):
            await _send(sock, http.answer(response, close=True), deadlines)
        raise
    except Exception as error:  # a bug of ours: the client gets an answer, the log the traceback
        LOG.exception("API handler failed")
        response = error_response(500, f"{request.name} failed", f"internal error: {type(error).__name__}: {error}")
    await _send(sock, http.answer(response), deadlines)


async def _read_request(
    sock: trio.socket.SocketType, http: HttpConnection, deadlines: Deadlines
) -> Request | Bad | None:
    """The next request, or None when the peer is done."""
    event = http.next_event()
    if event is None and http.state is State.IDLE:
        with deadlines.enter("api_idle", "no request on an open API connection"):
            http.feed(await _receive(sock))
        event = http.next_event()
    if event is not None or http.state is not State.READING:
        return event
    with deadlines.enter("api_read", "a request did not come to its end"):
        while event is None and http.state is State.READING:
            if http.wants_continue:
                await _send(sock, http.continue_bytes(), deadlines)
            http.feed(await _receive(sock))
            event = http.next_event()
    return event


async def _receive(sock: trio.socket.SocketType) -> bytes:
    """Bounded by the caller. Descriptors that come along are closed."""
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = await sock.recvmsg(READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i")
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            for fd in fds:
                os.close(fd)
            LOG.info("closed %d descriptors that came with an API request: nothing uses them yet", len(fds))
    return data


async def _linger(sock: trio.socket.SocketType) -> None:
    """Let a client that is still sending its refused request read why, before the close resets it."""
    sock.shutdown(socket.SHUT_WR)
    with trio.move_on_after(LINGER_S):
        for _ in range(LINGER_READS):
            if not await _receive(sock):
                return


async def _send(sock: trio.socket.SocketType, data: bytes, deadlines: Deadlines) -> None:
    """Shielded: an answer that was decided reaches its client even while the server is being cancelled."""
    with deadlines.enter("api_write", "a client does not take its response", shield=True):
        view = memoryview(data)
        while view:
            view = view[await sock.send(view) :]
