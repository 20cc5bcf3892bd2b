"""Failures on cue: what a VMM shall fail at, for people who test what is built around one.

A fault is written as on the command line of ``trivmm fake``::

    VERB=KIND                       pause=timeout  boot=error  info=delay:2s
    send-migration=PHASE:KIND       send-migration=precopy:lost  send-migration=switchover:stall:1s

``VERB`` is a route without its ``vm.``; ``times=N`` after a comma ends the fault after N times. The kinds of every
verb: ``error[:TEXT]``, ``delay:SECONDS`` (then it is carried out), ``timeout`` (pause only: after its deadline, named).
A migration fails in the phase that is named, on a real link to a real receiver: ``lost`` (the link breaks, after COMMIT
too: then the source asks on a new one), ``stall:SECONDS`` (nothing moves for so long, once, or until the list of faults
is replaced), in setup and commit also ``refused`` (the destination says no), in commit ``in-doubt`` (the link breaks
after COMMIT and nobody answers any more) and ``deaf:SECONDS`` (COMMIT goes out, and for so long no answer is heard, on
this connection or another; like a stall, and like it followed by what else is asked for in that phase).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.migration.link.halves import Connection, FrameReceiver, FrameSender, LinkLost
from trivmm.migration.link.transports import Dialer, SocketDialer, parse_url
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.wire.frame import HEADER_BYTES, Frame, FrameReader, MessageType, parse_header
from trivmm.migration.wire.messages import Refused, SetupFail, encode_message

__all__ = ["Fault", "Faults", "faulty_dial", "parse_fault"]

MOVE: Final = "send-migration"
PHASES: Final[Mapping[str, tuple[str, ...]]] = {
    "setup": ("lost", "stall", "refused"),
    "precopy": ("lost", "stall"),
    "switchover": ("lost", "stall"),
    "commit": ("lost", "stall", "deaf", "refused", "in-doubt"),
}
KINDS: Final = ("error", "delay", "timeout")
TIMED: Final = ("stall", "deaf", "delay")
DEFAULT_S: Final = {"stall": 30.0, "deaf": 30.0, "delay": 1.0}
MAX_SECONDS: Final = 3600.0
MAX_TIMES: Final = 1_000_000
PHASE_OF: Final = {
    MessageType.SETUP: "setup",
    MessageType.ROUND_END: "precopy",
    MessageType.STATE: "switchover",
    MessageType.COMMIT: "commit",
}


@attrs.define
class Fault:
    """``phase`` is empty but for migrations; ``times`` None: every time."""

    verb: str
    phase: str
    kind: str
    seconds: float
    text: str
    times: int | None

    def __str__(self) -> str:
        where = f"{self.phase}:" if self.phase else ""
        what = f":{self.seconds:g}s" if self.kind in TIMED else f":{self.text}" if self.text else ""
        return f"{self.verb}={where}{self.kind}{what}" + (f",times={self.times}" if self.times is not None else "")


def parse_fault(text: str, verbs: Iterable[str]) -> Fault:
    """:raises ConfigError: naming what makes no sense in it, and what would."""
    verb, equals, what = text.partition("=")
    known = sorted(verbs)
    if not equals or verb not in known:
        raise ConfigError("--fail", text, f"unknown verb {verb!r}", f"give VERB=KIND, VERB one of {', '.join(known)}")
    what, *options = what.split(",")
    times: int | None = None
    for option in options:
        name, _, value = option.partition("=")
        if name != "times" or not value.isdecimal() or not 1 <= int(value) <= MAX_TIMES:
            raise ConfigError("--fail", text, f"unknown option {option!r}", "give times=N, N at least 1")
        times = int(value)
    words = what.split(":")
    phase = words.pop(0) if verb == MOVE and words[0] in PHASES else ""
    if verb == MOVE and not phase and words[0] == "stall":
        phase = "precopy"  # where it is most seen
    kind, rest = (words[0], ":".join(words[1:])) if words else ("", "")
    kinds = PHASES[phase] if phase else tuple(each for each in KINDS if each != "timeout" or verb == "pause")
    if kind not in kinds:
        where = f" in phase {phase}" if phase else f" for {verb}"
        more = f", or a phase ({', '.join(PHASES)}) and its kind" if verb == MOVE and not phase else ""
        raise ConfigError("--fail", text, f"unknown kind {kind!r}{where}", f"give {', '.join(kinds)}{more}")
    seconds = _seconds(text, rest or f"{DEFAULT_S[kind]:g}s") if kind in TIMED else 0.0
    return Fault(verb, phase, kind, seconds, "" if kind in TIMED else rest, times)


def _seconds(text: str, written: str) -> float:
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)(ms|s)?", written)
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else -1.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError("--fail", text, f"{written!r} is not a time", f"give 2s or 500ms, {MAX_SECONDS:g}s at most")
    return seconds


@attrs.define(eq=False)
class Faults:
    """What shall fail, in the order that it was asked for. May change at any time."""

    faults: list[Fault] = attrs.field(factory=list)
    _replaced: trio.Event = attrs.field(factory=trio.Event, init=False)

    def replace(self, faults: Iterable[Fault]) -> None:
        """From now on these; a stall that is under way ends."""
        self.faults[:] = faults
        self._replaced.set()
        self._replaced = trio.Event()

    async def stall(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._replaced.wait()

    def ear(self, seconds: float) -> Callable[[], Awaitable[None]]:
        """Returns when so much time has passed since now, or the list was replaced."""
        until, replaced = trio.current_time() + seconds, self._replaced

        async def hear() -> None:
            with trio.move_on_at(until):
                await replaced.wait()

        return hear

    def take(self, verb: str, phase: str = "", *, but: Fault | None = None) -> Fault | None:
        """The first one that is due here, counted."""
        for fault in self.faults:
            if fault is not but and (fault.verb, fault.phase) == (verb, phase):
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                return fault
        return None

    def told(self) -> list[str]:
        return [str(fault) for fault in self.faults]


def faulty_dial(faults: Faults) -> Callable[[str, Deadlines], Dialer]:
    """How a VMM with these faults reaches a destination."""

    def dial(url: str, deadlines: Deadlines) -> Dialer:
        return _FaultyDialer(SocketDialer(parse_url(url, "destination_url"), deadlines), faults)

    return dial


@attrs.define(eq=False)
class _FaultyDialer:
    _dialer: SocketDialer
    _faults: Faults
    _dead: bool = False
    _hear: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    @property
    def transport(self) -> str:
        return self._dialer.transport

    async def dial(self) -> Connection:
        if self._dead:
            await trio.lowlevel.checkpoint()
            raise LinkLost("nobody can be reached any more: as --fail asked")
        await self._hear()
        real = await self._dialer.dial()
        receiver = _FaultyReceiver(real.receiver, self)
        return attrs.evolve(real, sender=_FaultySender(real, receiver, self._faults, self), receiver=receiver)


@attrs.define(eq=False)
class _FaultyReceiver:
    """``answer`` is what the destination is made to say."""

    _real: FrameReceiver
    _dialer: _FaultyDialer
    answer: bytes | None = attrs.field(default=None, init=False)

    async def receive(self, sink: PageSink | None = None) -> Frame:
        await self._dialer._hear()
        if self.answer is not None:
            reader = FrameReader()
            reader.feed(self.answer)
            self.answer = None
            frame = reader.next_frame()
            assert frame is not None
            await trio.lowlevel.checkpoint()
            return frame
        return await self._real.receive(sink)


@attrs.define(eq=False)
class _FaultySender:
    """Looks at what is sent, to know the phase."""

    _real: Connection
    _receiver: _FaultyReceiver
    _faults: Faults
    _dialer: _FaultyDialer
    _sender: FrameSender = attrs.field(default=attrs.Factory(lambda self: self._real.sender, takes_self=True))
    _had: set[str] = attrs.field(factory=set)  # phases whose fault has happened: precopy has many rounds

    async def send(self, data: bytes) -> None:
        kind = parse_header(data[:HEADER_BYTES]).type
        phase = PHASE_OF.get(kind, "")
        fault = self._faults.take(MOVE, phase) if phase and phase not in self._had else None
        self._had.add(phase)
        if fault is not None and fault.kind in ("stall", "deaf"):
            if fault.kind == "stall":
                await self._faults.stall(fault.seconds)
            else:
                self._dialer._hear = self._faults.ear(fault.seconds)
            fault = self._faults.take(MOVE, phase, but=fault)
        match fault:
            case Fault(kind="lost" | "in-doubt" as kind_of_loss):
                await self._sender.send(data)
                self._dialer._dead = kind_of_loss == "in-doubt"
                await self._real.aclose()
                raise LinkLost(f"{self._real.name}: the connection is lost, as --fail asked")
            case Fault(kind="refused", phase="setup"):
                await self._sender.send(data)
                await self._real.receiver.receive()  # what it says is not passed on
                self._receiver.answer = encode_message(SetupFail("refused, as --fail asked"))
                return
            case Fault(kind="refused"):
                self._receiver.answer = encode_message(Refused("refused, as --fail asked"))
                return
        await self._sender.send(data)

    async def send_pages(self, dirty: DirtySet, limit: int, counts: PageCounts) -> bool:
        return await self._sender.send_pages(dirty, limit, counts)
