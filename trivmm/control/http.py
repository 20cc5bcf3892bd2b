"""The HTTP of one connection, without I/O: bytes in, requests out; responses as the exact bytes that Cloud
Hypervisor's own client can read.

That client finds ``HTTP/1.1``, parses what follows up to the first CR as a number, finds ``Content-Length: `` spelled
so, and decodes UTF-8 per 256-byte read. Hence: a status line with an empty reason, that spelling, no chunking, bodies
in ASCII, no Content-Length where there is no body (204). Its server answers 400 to whatever it can't read, a request
that is too large included, and its clients know no 413 or 431: neither do we.

States: ``IDLE`` (between requests) → ``READING`` → a request is out → (its response) → ``IDLE``; ``CLOSED`` at the end,
where a streaming answer begins too: it has no length and no chunks, so only the end of the connection ends it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, TypeAlias

import attrs
import h11

from trivmm.control.contract import API_ROOT
from trivmm.control.descriptors import Passed

__all__ = [
    "MAX_BODY",
    "Bad",
    "HttpConnection",
    "OpenStream",
    "Request",
    "Response",
    "State",
    "Stream",
    "error_response",
]

MAX_BODY: Final = 1 << 20  # a configuration is a few KiB; a client must not make us hold more than this
MAX_HEAD: Final = 16 << 10  # request line and headers
SERVER: Final = b"TriVMM API"
SCHEME: Final = "http://"
STREAM_HEAD: Final = (  # by hand: h11 would chunk a body without a length
    b"HTTP/1.1 %d \r\nServer: %s\r\nConnection: close\r\n"
    b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"
)


@attrs.frozen
class Request:
    """``name`` is the route without its root (``vm.info``), or None when the path is not under the root. ``passed`` are
    descriptors that came with it; what nobody takes of them is closed by the server."""

    method: str
    name: str | None
    body: bytes
    passed: Passed = attrs.field(factory=Passed, eq=False)


class Stream(Protocol):
    """The chunks of a streaming answer: whole server-sent events, each sent as soon as it comes.

    Cancelling a wait for the next one is how the server tells that the client is gone."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def finish(self) -> None:
        """The server ends: the iteration gives what it has, a last event with it, and stops; it waits for nothing new.

        Idempotent, never blocks. A stream that has come to its own end has nothing to do here."""


OpenStream: TypeAlias = Callable[[], AbstractAsyncContextManager[Stream]]


@attrs.frozen
class Response:
    """``body`` None answers without one (204, or an error that has nothing to say). ``stream`` opens a stream of
    server-sent events in place of a body; the server enters it once the head has been sent, and leaves it always."""

    status: int
    body: bytes | None = None
    stream: OpenStream | None = None

    @classmethod
    def of(cls, value: object, status: int = 200) -> Response:
        return cls(status, json.dumps(value, ensure_ascii=True).encode())


@attrs.frozen
class Bad:
    """The client broke the protocol: ``response`` is to be sent, then the connection closed."""

    response: Response


class State(enum.Enum):
    IDLE = "idle"
    READING = "reading"
    ANSWERING = "answering"
    CLOSED = "closed"


def error_response(status: int, *messages: str) -> Response:
    """A JSON array of strings, from the outermost message to the root cause."""
    return Response.of(list(messages), status)


class HttpConnection:
    """One connection. Call :meth:`next_event`; where it gives None, :meth:`feed` it more."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._ended = False
        self.state = State.IDLE

    @property
    def held(self) -> int:
        """Bytes of an unfinished body. What is held besides is at most ``MAX_HEAD`` and one ``feed``."""
        return len(self._body)

    def feed(self, data: bytes) -> None:
        """Bytes from the peer; ``b""`` at its end of file."""
        self._h11.receive_data(data)
        self._ended = not data
        if data and self.state is State.IDLE:
            self.state = State.READING

    @property
    def wants_continue(self) -> bool:
        """The client waits for ``100 Continue`` before it sends the body."""
        return self._head is not None and self._h11.they_are_waiting_for_100_continue

    def continue_bytes(self) -> bytes:
        return self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b""

    def next_event(self) -> Request | Bad | None:
        """A whole request, a protocol error, or None: more bytes are needed (or, in ``CLOSED``, none come)."""
        if self.state in (State.ANSWERING, State.CLOSED):
            return None
        try:
            while True:
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    return None
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    self.state = State.CLOSED
                    return None
                self.state = State.READING
                if isinstance(event, h11.Request):
                    self._head = event
                    length = dict(event.headers).get(b"content-length")
                    if length is not None and int(length) > MAX_BODY:
                        return self._too_large()
                elif isinstance(event, h11.Data):
                    if len(self._body) + len(event.data) > MAX_BODY:
                        return self._too_large()
                    self._body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return self._whole()
        except (h11.RemoteProtocolError, ValueError) as error:  # ValueError: a Content-Length of 5000 digits
            if self._ended:
                self.state = State.CLOSED  # it closed in the middle of a request: nobody is there to be told
                return None
            self.state = State.ANSWERING
            status = getattr(error, "error_status_hint", 400)
            status = 400 if status == 431 else status
            said = str(error).partition(": bytearray(")[0]  # h11 quotes the line as Python would
            return Bad(error_response(status, "malformed request", said))

    def _whole(self) -> Request:
        assert self._head is not None
        self.state = State.ANSWERING
        target = self._head.target.decode("ascii", "replace")
        if target.startswith(SCHEME):  # the absolute form, RFC 9112 section 3.2.2
            target = "/" + target.removeprefix(SCHEME).partition("/")[2]
        path = target.partition("?")[0]
        name = path.removeprefix(API_ROOT) if path.startswith(API_ROOT) else None
        body = bytes(self._body)
        self._body.clear()
        return Request(self._head.method.decode("ascii", "replace"), name, body)

    def _too_large(self) -> Bad:
        self.state = State.ANSWERING
        self._body.clear()
        return Bad(error_response(400, "request too large", f"a body has at most {MAX_BODY} bytes"))

    def answer(self, response: Response, *, close: bool = False) -> bytes:
        """The response's bytes (a stream's head). The connection is then ``IDLE`` (or ``READING``: pipelined), or
        ``CLOSED``."""
        if response.stream is not None:
            self.state = State.CLOSED
            return STREAM_HEAD % (response.status, SERVER)
        headers = [(b"Server", SERVER), (b"Connection", b"close" if close else b"keep-alive")]
        body = b"" if response.body is None or self._is_head() else response.body
        if response.status != 204:
            headers += [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
        out = self._h11.send(h11.Response(status_code=response.status, headers=headers, reason=b"")) or b""
        if body:
            out += self._h11.send(h11.Data(data=body)) or b""
        out += self._h11.send(h11.EndOfMessage()) or b""
        self._head = None
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self.state = State.READING if self._h11.trailing_data[0] else State.IDLE
        else:
            self.state = State.CLOSED
        return out

    def _is_head(self) -> bool:
        return self._head is not None and self._head.method == b"HEAD"
