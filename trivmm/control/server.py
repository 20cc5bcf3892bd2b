"""The API server: h11 on trio over a unix socket.

The socket is :mod:`trivmm.unixsocket`'s: made at a path with a lock file beside it (both go away with the server), or
passed in. Reads are ``recvmsg``: descriptors that a client passes go with its request (``trivmm.control.descriptors``).
A request has ``api_read`` from its first byte to its last, a response ``api_write``, an idle connection ``api_idle``; a
running handler is bounded by its own operation.

**Too many clients.** The server takes a quarter of the process's descriptors at the most, so that the VM has the rest.
When its table is full, or no descriptor is left, the oldest connection on which nothing happens is given up for the one
that comes (:mod:`trivmm.control.connections`): an idle one is closed, a half-sent request is told 503. Only where every
connection has a request in progress is the one that comes told 503.

**Streams.** A response with a ``stream`` sends server-sent events until the stream ends, the client hangs up (an end of
file, also of a half-closed connection), or does not take a chunk within ``api_write``. A comment line now and then
finds clients that stopped. At most ``MAX_STREAMS`` at once, and half of the connections; one more is told 429.

**The end.** When the server is cancelled, a call that runs is cancelled, answers 500 with its JSON, and then the
connection closes. Streams are asked to finish, so that they can send a last event. All of that is shielded from the
cancellation, for half of ``shutdown_grace`` at the most.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import resource
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeAlias

import attrs
import trio

from trivmm.control.connections import Doing, Table
from trivmm.control.descriptors import SPACE, Passed
from trivmm.control.http import Bad, HttpConnection, OpenStream, Request, Response, State, Stream, error_response
from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError
from trivmm.unixsocket import SocketFd, adopt_listener, listen_unix
from trivmm.unwrapped import unwrapped_nursery

__all__ = ["Handler", "open_server"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256  # each costs a task, a descriptor and up to 80 KiB of an unfinished request
MIN_CONNECTIONS: Final = 8  # in a process that may have next to no descriptors
SHARE_OF_DESCRIPTORS: Final = 4  # one in so many is for clients, the rest is for the VM
MAX_HELD: Final = 32 << 20  # of half-sent bodies, all connections together
MAX_STREAMS: Final = 16  # each keeps a connection for as long as its client likes
ROOM: Final = 8  # connections given up at once when no descriptor is left: the VM may be who needs one
READ_BYTES: Final = 64 << 10
LINGER_S: Final = 1.0
LINGER_READS: Final = 256  # 16 MiB at the most
MAX_STREAM_INPUT: Final = 16 << 10  # a client that has asked for a stream has nothing more to say
KEEPALIVES: Final = 20  # comments in the time that an idle connection has
KEEPALIVE: Final = b": \n\n"
ACCEPT_PAUSE_S: Final = 0.1  # after EMFILE and its like: the listener would be readable at once again

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


@asynccontextmanager
async def open_server(where: str | SocketFd, handler: Handler, deadlines: Deadlines) -> AsyncIterator[None]:
    """Serve ``handler`` on the unix socket ``where`` for the length of the block; it listens once the block begins.
    A descriptor that is passed is the server's from here, and closed at the end.

    :raises ConfigError: when the socket can't be had, or another process serves there."""
    with _listening(where) as listener:
        server = _Server(handler, deadlines)
        async with unwrapped_nursery() as nursery:
            nursery.start_soon(server.hurry_at_the_end, name="API end")
            nursery.start_soon(server.accept, listener, name="API listener")
            yield
            nursery.cancel_scope.cancel()


@contextmanager
def _listening(where: str | SocketFd) -> Iterator[trio.socket.SocketType]:
    if isinstance(where, SocketFd):
        with trio.socket.from_stdlib_socket(adopt_listener(where, "--api-socket")) as listener:
            yield listener
        return
    made = listen_unix(where, "--api-socket")
    try:
        with trio.socket.from_stdlib_socket(made.sock) as listener:
            yield listener
    finally:
        made.close()


def _how_many() -> int:
    """Connections at once: raising the soft limit of descriptors is left to whoever starts the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    share = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft // SHARE_OF_DESCRIPTORS
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, share))


@attrs.frozen(eq=False)
class _Connection:
    sock: trio.socket.SocketType
    http: HttpConnection = attrs.field(factory=HttpConnection)
    passed: Passed = attrs.field(factory=Passed)  # since the last request

    def has_input(self) -> bool:
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))


@attrs.define(eq=False)
class _Server:
    """The connections of one listener. Faults of a peer are survived, and logged at most."""

    _handler: Handler
    _deadlines: Deadlines
    _table: Table[_Connection] = attrs.field(factory=lambda: Table(_how_many(), MAX_HELD), init=False)
    _max_streams: int = attrs.field(init=False)
    _streaming: int = attrs.field(default=0, init=False)
    _streams: set[Stream] = attrs.field(factory=set, init=False)
    _guards: set[trio.CancelScope] = attrs.field(factory=set, init=False)  # what the end does not cut, but hurries
    _end_by: float = attrs.field(default=math.inf, init=False)  # on trio's clock; finite from the end on
    _was_full: bool = attrs.field(default=False, init=False)

    @_max_streams.default
    def _some_streams(self) -> int:
        return min(MAX_STREAMS, self._table.limit // 2)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def hurry_at_the_end(self) -> None:
        """Cancelled together with everything else; from then on what is shielded has a common deadline."""
        try:
            await trio.sleep_forever()
        finally:
            limit_s = min(self._deadlines.api_write, self._deadlines.shutdown_grace / 2)
            self._end_by = trio.current_time() + limit_s
            for guard in self._guards:
                guard.deadline = min(guard.deadline, self._end_by)
            for stream in self._streams:
                _finish(stream)

    @contextmanager
    def _to_the_end(self) -> Iterator[None]:
        """Shielded: an answer that was decided reaches its client even while the server is being cancelled."""
        with trio.CancelScope(shield=True, deadline=self._end_by) as guard:
            self._guards.add(guard)
            try:
                yield
            finally:
                self._guards.discard(guard)

    # --- coming and going ------------------------------------------------------------------------------------------

    async def accept(self, listener: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            failing = False
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE) and self._make_room(ROOM):
                        continue
                    if not failing:
                        logger.warning("accept: %s", error)
                    failing = True
                    await trio.sleep(ACCEPT_PAUSE_S)
                    continue
                failing = False
                if self._table.full and not self._make_room(1):
                    _tell_too_many(_Connection(sock), "too many requests in progress")
                    sock.close()
                    continue
                connection = _Connection(sock)
                self._table.add(connection)
                nursery.start_soon(self._serve, connection, name="API connection")

    def _make_room(self, count: int) -> bool:
        """Give up so many connections, or as many as can be. False: none."""
        if not self._was_full:
            self._was_full = True
            logger.warning("too many API connections: from now on the oldest ones on which nothing happens are closed")
        made = False
        for _ in range(count):
            victim = self._table.oldest(_Connection.has_input)
            if victim is None:
                break
            self._give_up(victim)
            made = True
        return made

    def _give_up(self, connection: _Connection) -> None:
        """At once, its descriptor included; its task wakes up to a closed socket and ends."""
        doing = self._table.remove(connection)
        logger.info("an API connection that was %s is given up for others", doing.value if doing else "closing")
        if connection.http.state is State.READING:
            _tell_too_many(connection, "too many connections, and this request did not come to its end")
        connection.sock.close()

    async def _serve(self, connection: _Connection) -> None:
        http = connection.http
        with connection.sock:
            try:
                while http.state is not State.CLOSED:
                    event = await self._read_request(connection)
                    if isinstance(event, Bad):
                        await self._send(connection, http.answer(event.response, close=True))
                        await self._linger(connection)
                    elif event is not None:
                        response = await self._handled(connection, attrs.evolve(event, passed=connection.passed))
                        event = None  # its body is not kept while a slow client takes the answer
                        await self._answer(connection, response)
            except DeadlineError as error:
                logger.info("API connection closed: %s", error)
            except (OSError, trio.ClosedResourceError) as error:
                logger.info("API connection lost: %s", error)
            finally:
                connection.passed.close()
                self._table.remove(connection)

    # --- one request -----------------------------------------------------------------------------------------------

    async def _read_request(self, connection: _Connection) -> Request | Bad | None:
        """The next request, or None when the peer is done."""
        http = connection.http
        event = self._next_event(connection)
        if event is None and http.state is State.IDLE:
            self._table.put(connection, Doing.IDLE)
            with self._deadlines.enter("api_idle", "no request on an open API connection"):
                http.feed(await self._receive(connection))
            event = self._next_event(connection)
        if event is None and http.state is State.READING:
            self._table.put(connection, Doing.READING)
            with self._deadlines.enter("api_read", "a request did not come to its end"):
                while event is None and http.state is State.READING:
                    if http.wants_continue:
                        await self._send(connection, http.continue_bytes())
                    http.feed(await self._receive(connection))
                    event = self._next_event(connection)
        self._table.put(connection, Doing.BUSY)
        return event

    def _next_event(self, connection: _Connection) -> Request | Bad | None:
        event = connection.http.next_event()
        for victim in self._table.hold(connection, connection.http.held):
            self._give_up(victim)
        return event

    async def _handled(self, connection: _Connection, request: Request) -> Response:
        try:
            response = await self._handler(request)
        except trio.Cancelled:
            response = error_response(500, f"{request.name} was cancelled", "the VMM is shutting down")
            with trio.move_on_after(self._deadlines.api_write, shield=True):
                await self._send(connection, connection.http.answer(response, close=True))
            raise
        except Exception as error:  # a bug of ours: the client gets an answer, the log the traceback
            logger.exception("API handler failed")
            problem = f"internal error: {type(error).__name__}: {error}"
            response = error_response(500, f"{request.name} failed", problem)
        request.passed.close()
        if response.stream is not None and self._streaming >= self._max_streams:
            return error_response(429, f"{request.name} failed", f"there are {self._streaming} streams already")
        return response

    async def _answer(self, connection: _Connection, response: Response) -> None:
        if response.stream is None:
            await self._send(connection, connection.http.answer(response))
            return
        self._streaming += 1
        try:
            await self._send(connection, connection.http.answer(response))
            with self._to_the_end():
                await self._stream(connection, response.stream)
        finally:
            self._streaming -= 1

    # --- a stream --------------------------------------------------------------------------------------------------

    async def _stream(self, connection: _Connection, opened: OpenStream) -> None:
        """A fault of the stream's own ends it, and is logged."""
        try:
            async with opened() as stream:
                self._streams.add(stream)
                try:
                    if self._end_by < math.inf:
                        _finish(stream)
                    await self._send_stream(connection, stream)
                finally:
                    self._streams.discard(stream)
        except Exception:
            logger.exception("an API stream failed")

    async def _send_stream(self, connection: _Connection, stream: Stream) -> None:
        """Runs inside the guard: the server's end does not cancel it, it asks the stream to finish."""
        one_at_a_time = trio.Lock()

        async def push(chunk: bytes) -> None:
            try:
                async with one_at_a_time:
                    await self._send(connection, chunk)
            except (DeadlineError, OSError, trio.ClosedResourceError) as error:
                logger.info("API stream ends: %s", error)
                nursery.cancel_scope.cancel()

        async def keep_alive() -> None:
            while True:
                await trio.sleep(self._deadlines.api_idle / KEEPALIVES)
                await push(KEEPALIVE)

        async def until_it_hangs_up() -> None:
            left = MAX_STREAM_INPUT
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                while left > 0 and (data := await self._receive(connection)):
                    left -= len(data)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive, name="API stream keepalive")
            nursery.start_soon(until_it_hangs_up, name="API stream hang-up")
            async for chunk in stream:
                await push(chunk)
            nursery.cancel_scope.cancel()

    # --- bytes -----------------------------------------------------------------------------------------------------

    async def _receive(self, connection: _Connection) -> bytes:
        """Bounded by the caller."""
        data, ancillary, _, _ = await connection.sock.recvmsg(READ_BYTES, SPACE, socket.MSG_CMSG_CLOEXEC)
        connection.passed.receive(ancillary)
        if connection not in self._table:
            raise trio.ClosedResourceError("given up for others")
        return data

    async def _linger(self, connection: _Connection) -> None:
        """Let a client that is still sending its refused request read why, before the close resets it."""
        self._table.put(connection, Doing.READING)
        connection.sock.shutdown(socket.SHUT_WR)
        with trio.move_on_after(LINGER_S):
            for _ in range(LINGER_READS):
                if not await self._receive(connection):
                    return

    async def _send(self, connection: _Connection, data: bytes) -> None:
        with self._to_the_end(), self._deadlines.enter("api_write", "a client does not take its response"):
            view = memoryview(data)
            while view:
                view = view[await connection.sock.send(view) :]


def _finish(stream: Stream) -> None:
    try:
        stream.finish()
    except Exception:
        logger.exception("an API stream did not finish")


def _tell_too_many(connection: _Connection, why: str) -> None:
    answer = connection.http.answer(error_response(503, "the API is busy", why), close=True)
    with contextlib.suppress(OSError):  # one that does not even take this is closed without it
        os.write(connection.sock.fileno(), answer)
