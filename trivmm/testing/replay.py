"""Recorded requests of Cloud Hypervisor's own client, sent byte for byte, in every state of a VM's life.

The VMM is the real one, behind a real server on a real socket; only its CPUs are scripted. A migration that a request
asks for goes to, or waits at, an address in the caller's folder where nobody is: what is recorded names addresses of
the machine it was recorded on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import attrs
import trio

from trivmm.control.contract import API_ROOT
from trivmm.control.routes import Router
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.events import EventBus
from trivmm.incoming import Incoming, open_incoming
from trivmm.migration.link.transports import Dialer
from trivmm.migration.source.sender import socket_dialer
from trivmm.testing.fake import fake_hypervisor
from trivmm.vmm import Vmm, VmmEnd, open_vmm

__all__ = [
    "STATES",
    "WAITS",
    "Answer",
    "Recorded",
    "Replay",
    "label_of",
    "open_replay",
    "pieces_of",
    "replay_in_states",
    "route_of",
]

WAITS: Final = "waits"
ANSWER_LIMIT_S: Final = 60.0  # the slowest verb is bounded by deadlines that sum to less
STATES: Final[Mapping[str, tuple[str, ...]]] = {  # a state of the recorded life → the verbs that lead to it
    "no VM": (),
    "Created": ("create",),
    "Running": ("create", "boot"),
    "Paused": ("create", "boot", "pause"),
    "after vm.shutdown": ("create", "boot", "shutdown"),
    "after vm.delete": ("create", "boot", "shutdown", "delete"),
}
Recorded = Mapping[str, Any]
"""``{args, request, headers, body}``: the request line, the headers and the body as JSON, or None."""


@attrs.frozen
class Answer:
    """``status`` is the whole status line, or ``waits``: no answer while nobody connects. ``then`` is the state of the
    VM afterwards (``no VM``; ``exit 0``: the process has nothing left to do; ``waits``: in the middle of it)."""

    status: str
    body: Any
    then: str

    @property
    def code(self) -> str:
        return self.status.split()[1] if " " in self.status else self.status


def label_of(recorded: Recorded) -> str:
    return " ".join(recorded["args"])


def route_of(recorded: Recorded) -> str:
    return str(recorded["request"].split()[1].removeprefix(API_ROOT))


def pieces_of(recorded: Recorded) -> list[bytes]:
    """The request in the pieces in which the client writes it: its length comes after the other headers, on its own,
    and the body is compact JSON."""
    body = None if recorded["body"] is None else json.dumps(recorded["body"], separators=(",", ":")).encode()
    lengths = [header for header in recorded["headers"] if header.startswith("Content-Length:")]
    others = [header for header in recorded["headers"] if header not in lengths]
    pieces = ["\r\n".join([recorded["request"], *others, ""]).encode()]
    pieces += [f"{header}\r\n".encode() for header in lengths]
    return [*pieces, b"\r\n", *([] if body is None else [body])]


@attrs.define(eq=False)
class Replay:
    """A VMM and its API socket. ``config`` is what its VM is made of, as JSON."""

    vmm: Vmm
    path: str
    config: Mapping[str, Any]
    end: VmmEnd | None = None  # once the process would have nothing left to do

    async def watch(self) -> None:
        """Bounded by the block that this is the replay of."""
        self.end = await self.vmm.ended()

    async def bring_to(self, state: str) -> None:
        """From ``no VM``. :raises RuntimeError: a verb on the way was refused."""
        for verb in STATES[state]:
            answer = await self.call("PUT", f"vm.{verb}", self.config if verb == "create" else None)
            if answer[0] != "HTTP/1.1 204 ":
                raise RuntimeError(f"{verb} on the way to {state}: {answer}")

    async def send(self, recorded: Recorded) -> Answer:
        """A request that waits for a peer is left once it listens."""
        status, body = WAITS, None
        with self.vmm.events.subscribe() as events:
            async with trio.open_nursery() as nursery:

                async def listens() -> None:
                    async for event in events:
                        if event.event == "migration-receive-ready":
                            nursery.cancel_scope.cancel()

                nursery.start_soon(listens)
                status, body = await self._exchange(pieces_of(recorded))
                nursery.cancel_scope.cancel()
            return Answer(status, body, WAITS if status == WAITS else await self._state())

    async def call(self, method: str, route: str, body: object = None) -> tuple[str, Any]:
        """(the status line, the body's JSON or None), of a request in the client's own form."""
        headers = ["Host: localhost", "Accept: */*"]
        if body is not None:
            headers.append(f"Content-Length: {len(json.dumps(body, separators=(',', ':')))}")
        request = f"{method} {API_ROOT}{route} HTTP/1.1"
        return await self._exchange(pieces_of({"request": request, "headers": headers, "body": body}))

    async def _state(self) -> str:
        if self.end is not None:
            return f"exit {0 if self.end.kind == 'asked' else 1}"
        _, info = await self.call("GET", "vm.info")
        return str(info["state"]) if isinstance(info, dict) else "no VM"

    async def _exchange(self, pieces: Sequence[bytes]) -> tuple[str, Any]:
        with trio.fail_after(ANSWER_LIMIT_S):
            stream = await trio.open_unix_socket(self.path)
        async with stream:
            with trio.fail_after(ANSWER_LIMIT_S):
                return await _asked(stream, pieces)


async def _asked(stream: trio.SocketStream, pieces: Sequence[bytes]) -> tuple[str, Any]:
    for piece in pieces:
        await stream.send_all(piece)
    found = b""
    while b"\r\n\r\n" not in found:
        found += await _some(stream)
    head, _, content = found.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    length = next((int(each.split()[1]) for each in headers if each.startswith("Content-Length: ")), 0)
    while len(content) < length:
        content += await _some(stream)
    return status, json.loads(content) if length else None


async def _some(stream: trio.SocketStream) -> bytes:
    found = await stream.receive_some(1 << 16)
    if not found:
        raise ConnectionError("the server closed the connection without a whole answer")
    return found


@asynccontextmanager
async def open_replay(folder: Path, config: Mapping[str, Any]) -> AsyncIterator[Replay]:
    """A VMM without a VM. Everything that it makes is in ``folder``."""
    nobody = f"unix:{folder}/nobody.sock"

    def dial_nobody(url: str, deadlines: Deadlines) -> Dialer:
        socket_dialer(url, deadlines)  # what was asked for must make sense all the same
        return socket_dialer(nobody, deadlines)

    def listen_for_nobody(url: str, **options: Any) -> AbstractAsyncContextManager[Incoming]:
        return open_incoming(f"{nobody}.receive", **options)

    path, deadlines, events = str(folder / "api.sock"), Deadlines(), EventBus()
    with mock.patch("trivmm.vmm.moves.open_incoming", listen_for_nobody):
        async with (
            open_vmm(fake_hypervisor(), deadlines=deadlines, events=events, dial=dial_nobody) as vmm,
            open_server(path, Router(vmm), deadlines),
        ):
            replay = Replay(vmm, path, config)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(replay.watch)
                yield replay
                nursery.cancel_scope.cancel()


async def replay_in_states(
    requests: Sequence[Recorded], folder: Path, config: Mapping[str, Any]
) -> dict[str, dict[str, Answer]]:
    """What each request gets in each state, by state and label: a VMM for each of them that was not refused."""
    found: dict[str, dict[str, Answer]] = {}
    for state in STATES:
        found[state] = {}
        left = list(requests)
        while left:
            async with open_replay(folder, config) as replay:
                await replay.bring_to(state)
                while left:
                    recorded = left.pop(0)
                    answer = found[state][label_of(recorded)] = await replay.send(recorded)
                    if answer.code in ("200", "204", WAITS) and not recorded["request"].startswith("GET"):
                        break
    return found
