"""The HTTP of one connection, without I/O: bytes in, requests out; responses as the exact bytes that Cloud
Hypervisor's own client can read.

That client finds ``HTTP/1.1``, parses what follows up to the first CR as a number, finds ``Content-Length: `` spelled
so, and decodes UTF-8 per 256-byte read. Hence: a status line with an empty reason, that spelling, no chunking, bodies
in ASCII, no Content-Length where there is no body (204).

States: ``IDLE`` (between requests) → ``READING`` → a request is out → (its response) → ``IDLE``; ``CLOSED`` at the end.
"""

from __future__ import annotations

import enum
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import attrs
import h11

from trivmm.control.contract import API_ROOT

__all__ = ["MAX_BODY", "Bad", "HttpConnection", "Request", "Response", "State", "error_response"]

MAX_BODY: Final = 1 << 20  # a configuration is a few KiB; a client must not make us hold more than this
MAX_HEAD: Final = 16 << 10  # request line and headers
SERVER: Final = b"TriVMM API"


@attrs.frozen
class Request:
    """``name`` is the route without its root (``vm.info``), or None when the path is not under the root."""

    method: str
    name: str | None
    body: bytes


@attrs.frozen
class Response:
    """``body`` None answers without one (204, or an error that has nothing to say)."""

    status: int
    body: bytes | None = None
    stream: Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]] | None = None

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
            return Bad(error_response(status, "malformed request", str(error)))

    def _whole(self) -> Request:
        assert self._head is not None
        self.state = State.ANSWERING
        target = self._head.target.decode("ascii", "replace")
        path = target.partition("?")[0]
        name = path.removeprefix(API_ROOT) if path.startswith(API_ROOT) else None
        return Request(self._head.method.decode("ascii", "replace"), name, bytes(self._body))

    def _too_large(self) -> Bad:
        self.state = State.ANSWERING
        return Bad(error_response(413, "request too large", f"a body has at most {MAX_BODY} bytes"))

    def answer(self, response: Response, *, close: bool = False) -> bytes:
        """The response's bytes. The connection is then ``IDLE`` (or ``READING``: pipelined), or ``CLOSED``."""
        headers = [(b"Server", SERVER), (b"Connection", b"close" if close else b"keep-alive")]
        body = b"" if response.body is None or self._is_head() else response.body
        if response.status != 204:
            headers += [(b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body))]
        out = self._h11.send(h11.Response(status_code=response.status, headers=headers, reason=b"")) or b""
        if body:
            out += self._h11.send(h11.Data(data=body)) or b""
        out += self._h11.send(h11.EndOfMessage()) or b""
        self._head = None
        self._body.clear()
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self.state = State.READING if self._h11.trailing_data[0] else State.IDLE
        else:
            self.state = State.CLOSED
        return out

    def _is_head(self) -> bool:
        return self._head is not None and self._head.method == b"HEAD"
