"""The HTTP of one connection: whole, byte by byte, pipelined, oversized, malformed; and the exact bytes of answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivmm.control.http import MAX_BODY, Bad, HttpConnection, Request, Response, State, Stream, error_response

BODY = b'{"a":1}'
PUT = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
GET = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"
WANTED = Request("PUT", "vm.create", BODY)


def events(http: HttpConnection, data: bytes, size: int) -> list[Request | Bad]:
    """Feed in pieces of ``size``, answering 204 to every request."""
    found: list[Request | Bad] = []
    for at in range(0, len(data), size):
        http.feed(data[at : at + size])
        while (event := http.next_event()) is not None:
            found.append(event)
            http.answer(Response(204) if isinstance(event, Request) else event.response)
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
def test_a_request_in_pieces(size: int) -> None:
    assert events(HttpConnection(), PUT, size) == [WANTED]


@pytest.mark.parametrize("size", [1, 13, 4096])
def test_pipelined_requests_come_out_one_after_the_other(size: int) -> None:
    http = HttpConnection()
    assert events(http, PUT + GET + PUT, size) == [WANTED, Request("GET", "vmm.ping", b""), WANTED]
    assert http.state is State.IDLE


def test_a_pipelined_request_waits_for_the_answer_to_the_first() -> None:
    http = HttpConnection()
    http.feed(GET + PUT)
    assert http.next_event() == Request("GET", "vmm.ping", b"")
    assert http.state is State.ANSWERING
    assert http.next_event() is None
    http.answer(Response(204))
    assert http.state is State.READING
    assert http.next_event() == WANTED


def test_a_chunked_request_is_read() -> None:
    data = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert events(HttpConnection(), data, 1) == [Request("PUT", "vm.create", b"abc")]


def test_no_content_type_is_needed_and_the_query_is_ignored() -> None:
    data = b"GET /api/v1/vm.info?x=1 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert events(HttpConnection(), data, 99) == [Request("GET", "vm.info", b"")]


def test_a_path_elsewhere_has_no_route() -> None:
    for path in (b"/", b"/api/v2/vm.info", b"*", b"http://localhost", b"http://api/v1/vm.info"):
        (event,) = events(HttpConnection(), b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path, 99)
        assert isinstance(event, Request)
        assert event.name is None


def test_a_target_may_be_absolute() -> None:
    data = b"GET http://localhost:80/api/v1/vm.info?x=http://a HTTP/1.1\r\nHost: x\r\n\r\n"
    assert events(HttpConnection(), data, 99) == [Request("GET", "vm.info", b"")]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 5000, 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1), 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\n", 400),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    ],
)
def test_what_breaks_the_protocol_is_answered_and_ends_the_connection(data: bytes, status: int) -> None:
    http = HttpConnection()
    http.feed(data)
    event = http.next_event()
    assert isinstance(event, Bad)
    assert event.response.status == status
    sent = http.answer(event.response, close=True)
    assert sent.startswith(b"HTTP/1.1 %d \r\n" % status)
    assert isinstance(json.loads(sent.partition(b"\r\n\r\n")[2]), list)
    assert b"bytearray" not in sent
    assert http.state is State.CLOSED
    assert http.next_event() is None


def test_a_chunked_body_has_the_same_limit() -> None:
    http = HttpConnection()
    http.feed(b"PUT /api/v1/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for count in range(MAX_BODY // 0x10000):
        http.feed(chunk)
        assert http.next_event() is None
        assert http.held == (count + 1) * 0x10000
    http.feed(chunk)
    event = http.next_event()
    assert isinstance(event, Bad)
    assert event.response.status == 400
    assert b"at most" in (event.response.body or b"")
    assert http.held == 0


def test_the_bytes_of_an_answer() -> None:
    http = HttpConnection()
    events(http, GET[:-2], 99)
    http.feed(GET[-2:])
    assert http.next_event() is not None
    assert http.answer(Response.of({"ü": 1})) == (
        b"HTTP/1.1 200 \r\nServer: TriVMM API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
        b'Content-Length: 13\r\n\r\n{"\\u00fc": 1}'
    )


def test_the_bytes_of_an_answer_without_a_body() -> None:
    http = HttpConnection()
    http.feed(PUT)
    assert http.next_event() == WANTED
    assert http.answer(Response(204)) == b"HTTP/1.1 204 \r\nServer: TriVMM API\r\nConnection: keep-alive\r\n\r\n"
    assert http.state is State.IDLE


def test_the_head_of_a_stream_and_nothing_after_it() -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Stream]:
        raise AssertionError("the server opens it, not the protocol")
        yield

    http = HttpConnection()
    http.feed(GET + GET)
    assert http.next_event() is not None
    assert http.answer(Response(200, stream=opened)) == (
        b"HTTP/1.1 200 \r\nServer: TriVMM API\r\nConnection: close\r\nContent-Type: text/event-stream\r\n"
        b"Cache-Control: no-store\r\n\r\n"
    )
    assert http.state is State.CLOSED
    assert http.next_event() is None  # the pipelined one is not answered: the connection ends with the stream


def test_an_old_or_closing_client_is_closed_after_its_answer() -> None:
    for data in (b"GET /x HTTP/1.0\r\n\r\n", b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
        http = HttpConnection()
        http.feed(data)
        assert isinstance(http.next_event(), Request)
        assert b"\r\nConnection: close\r\n" in http.answer(error_response(404, "not found"))
        assert http.state is State.CLOSED


def test_a_client_that_waits_for_100_continue() -> None:
    http = HttpConnection()
    http.feed(b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert http.next_event() is None
    assert http.wants_continue
    assert http.continue_bytes() == b"HTTP/1.1 100 \r\n\r\n"
    assert not http.wants_continue
    http.feed(b"{}")
    assert http.next_event() == Request("PUT", "vm.create", b"{}")


@pytest.mark.parametrize("upto", [0, 10, len(PUT) - 3])
def test_a_peer_that_leaves(upto: int) -> None:
    http = HttpConnection()
    if upto:
        http.feed(PUT[:upto])
        assert http.next_event() is None
    http.feed(b"")
    assert http.next_event() is None
    assert http.state is State.CLOSED


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([GET, PUT, PUT[:50], b"\r\n", b"Host: x\r\n"]), max_size=8))
def test_any_bytes_end_in_requests_or_one_refusal(pieces: list[bytes]) -> None:
    http = HttpConnection()
    for piece in pieces:
        if not piece or http.state is State.CLOSED:
            continue
        http.feed(piece)
        while (event := http.next_event()) is not None:
            http.answer(event.response if isinstance(event, Bad) else Response(204), close=isinstance(event, Bad))
