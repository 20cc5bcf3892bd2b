"""What the frames say: one frozen class a message, its JSON body, and the strict way back. Pure.

The sequence of messages is drawn in ``frame``, their order checked by ``session``.
"""

from __future__ import annotations

import enum
from typing import Any, Final, TypeAlias

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.wire.frame import PAGE_BYTES, VERSION, Frame, MessageType, encode_frame
from trivmm.state.codec import state_from_json, state_to_json
from trivmm.state.fields import Fields
from trivmm.state.jsontext import dump_json, load_json
from trivmm.state.machine import MachineState

__all__ = [
    "SESSION_BYTES",
    "TYPE_OF",
    "Abort",
    "Commit",
    "Done",
    "Fate",
    "Hello",
    "Message",
    "Query",
    "Ready",
    "Refused",
    "Role",
    "RoundAck",
    "RoundEnd",
    "Running",
    "Setup",
    "SetupFail",
    "SetupOk",
    "State",
    "Undo",
    "Undone",
    "Verdict",
    "encode_message",
    "parse_message",
]

SESSION_BYTES: Final = 16
MAX_REASON: Final = 2000  # characters of an error text
MAX_REGIONS: Final = 8  # as TV_MAX_REGIONS
MAX_ROUND: Final = 1 << 32
MAX_PAGES: Final = 1 << 52  # as often as a page can be sent in a life
MAX_MS: Final = 1e9
MAX_LINKS: Final = 64  # connections for pages: far more than any host has queues


class Role(enum.Enum):
    """What a connection is for."""

    CONTROL = "control"  # a session's messages, or a question about one
    PAGES = "pages"  # one of several that carry pages
    FAULT = "fault"  # the pages that a running guest waits for


@attrs.frozen
class Hello:
    """The first frame of every connection. ``session`` 16 bytes; ``index`` which of its role, from 0."""

    session: bytes
    role: Role
    index: int = 0


@attrs.frozen
class Setup:
    """``machine`` for the destination's factory; ``memory`` (gpa, size) by slot."""

    machine: dict[str, Any]
    memory: tuple[tuple[int, int], ...]


@attrs.frozen
class SetupOk:
    """``resume_ms``: the destination's first guess of the time from COMMIT to RUNNING."""

    resume_ms: float


@attrs.frozen
class SetupFail:
    reason: str


@attrs.frozen
class RoundEnd:
    """``pages``: how many went out on this connection, zero pages included, each time that one was sent."""

    round: int
    pages: int


@attrs.frozen
class RoundAck:
    round: int


@attrs.frozen
class State:
    state: MachineState


@attrs.frozen
class Ready:
    """``resume_ms``: the destination's guess of its time from COMMIT to RUNNING; ``loaded_ms``: loading took."""

    resume_ms: float
    loaded_ms: float


@attrs.frozen
class Undo:
    reason: str


@attrs.frozen
class Undone:
    pass


@attrs.frozen
class Commit:
    session: bytes


@attrs.frozen
class Running:
    """``resume_ms``: what it took from COMMIT to the first vCPU's run."""

    resume_ms: float


@attrs.frozen
class Refused:
    """A promise: the destination never ran the machine and never will."""

    reason: str


@attrs.frozen
class Done:
    pass


@attrs.frozen
class Query:
    """What became of the session that HELLO named?"""


class Fate(enum.Enum):
    """What became of a machine at its destination, as that says it."""

    RUNNING = "running"  # it runs there, or ran
    REFUSED = "refused"  # it never ran there and never will, as in REFUSED
    PENDING = "pending"  # not settled yet: ask again
    UNKNOWN = "unknown"  # no such session there, or its start hung: it may have run

    @property
    def settled(self) -> bool:
        """Asking again brings nothing new."""
        return self in (Fate.RUNNING, Fate.REFUSED)


@attrs.frozen
class Verdict:
    fate: Fate
    reason: str


@attrs.frozen
class Abort:
    reason: str


Message: TypeAlias = (
    Hello
    | Setup
    | SetupOk
    | SetupFail
    | RoundEnd
    | RoundAck
    | State
    | Ready
    | Undo
    | Undone
    | Commit
    | Running
    | Refused
    | Done
    | Query
    | Verdict
    | Abort
)

TYPE_OF: Final[dict[type, MessageType]] = {
    Hello: MessageType.HELLO,
    Setup: MessageType.SETUP,
    SetupOk: MessageType.SETUP_OK,
    SetupFail: MessageType.SETUP_FAIL,
    RoundEnd: MessageType.ROUND_END,
    RoundAck: MessageType.ROUND_ACK,
    State: MessageType.STATE,
    Ready: MessageType.READY,
    Undo: MessageType.UNDO,
    Undone: MessageType.UNDONE,
    Commit: MessageType.COMMIT,
    Running: MessageType.RUNNING,
    Refused: MessageType.REFUSED,
    Done: MessageType.DONE,
    Query: MessageType.QUERY,
    Verdict: MessageType.VERDICT,
    Abort: MessageType.ABORT,
}


def encode_message(message: Message, version: int = VERSION) -> bytes:
    """A whole frame. Reasons are cut to their limit; a state that is too large is a ProtocolError."""
    value: dict[str, Any] = {}
    match message:
        case State(state):
            value = state_to_json(state)
        case Verdict(fate, reason):
            value = {"fate": fate.value, "reason": reason}
        case Hello(session, role, index):
            value = {"session": session.hex(), "role": role.value, "index": index}
        case Setup(machine, memory):
            value = {"machine": machine, "memory": [list(each) for each in memory]}
        case Commit(session):
            value = {"session": session.hex()}
        case _:
            value = attrs.asdict(message)
    if "reason" in value:
        value["reason"] = str(value["reason"])[:MAX_REASON]
    return encode_frame(TYPE_OF[type(message)], dump_json(value), version=version)


def _session(fields: Fields) -> bytes:
    text = fields.text("session", 2 * SESSION_BYTES)
    try:
        session = bytes.fromhex(text)
    except ValueError:
        session = b""
    if len(session) != SESSION_BYTES:
        raise ProtocolError(f"session is {text!r}, not {SESSION_BYTES} bytes in hex")
    return session


def _role(fields: Fields) -> Role:
    text = fields.text("role", MAX_REASON)
    for role in Role:
        if role.value == text:
            return role
    raise ProtocolError(f"HELLO: there is no role {text!r:.80}")


def _fate(fields: Fields) -> Fate:
    text = fields.text("fate", MAX_REASON)
    for fate in Fate:
        if fate.value == text:
            return fate
    raise ProtocolError(f"VERDICT: there is no fate {text!r:.80}")


def _memory(fields: Fields) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for each in fields.array("memory", MAX_REGIONS):
        if not (isinstance(each, list) and len(each) == 2 and all(type(part) is int for part in each)):
            raise ProtocolError("SETUP: memory is not an array of [gpa, size]")
        gpa, size = each
        floor = sum(found[-1]) if found else 0
        if gpa < floor or size <= 0 or gpa % PAGE_BYTES or size % PAGE_BYTES or gpa + size > 1 << 52:
            raise ProtocolError(f"SETUP: memory region [{gpa:#x}, {size:#x}] is unaligned, overlaps or lies outside")
        found.append((gpa, size))
    return tuple(found)


def parse_message(frame: Frame) -> Message:
    """The message in a frame. :raises ProtocolError: names the field at fault. PAGES and ZERO are not messages."""
    kind = frame.type
    if kind in (MessageType.PAGES, MessageType.ZERO):
        raise ProtocolError(f"{kind.name} where a message is due")
    value = load_json(kind.name, frame.body)
    if kind is MessageType.STATE:
        return State(state_from_json(value))
    fields = Fields(kind.name, value)
    message: Message
    match kind:
        case MessageType.HELLO:
            message = Hello(_session(fields), _role(fields), fields.integer("index", 0, MAX_LINKS - 1))
        case MessageType.SETUP:
            message = Setup(fields.object("machine"), _memory(fields))
        case MessageType.SETUP_OK:
            message = SetupOk(fields.number("resume_ms", MAX_MS))
        case MessageType.SETUP_FAIL:
            message = SetupFail(fields.line("reason", MAX_REASON))
        case MessageType.ROUND_END:
            message = RoundEnd(fields.integer("round", 0, MAX_ROUND), fields.integer("pages", 0, MAX_PAGES))
        case MessageType.ROUND_ACK:
            message = RoundAck(fields.integer("round", 0, MAX_ROUND))
        case MessageType.READY:
            message = Ready(fields.number("resume_ms", MAX_MS), fields.number("loaded_ms", MAX_MS))
        case MessageType.UNDO:
            message = Undo(fields.line("reason", MAX_REASON))
        case MessageType.UNDONE:
            message = Undone()
        case MessageType.COMMIT:
            message = Commit(_session(fields))
        case MessageType.RUNNING:
            message = Running(fields.number("resume_ms", MAX_MS))
        case MessageType.REFUSED:
            message = Refused(fields.line("reason", MAX_REASON))
        case MessageType.DONE:
            message = Done()
        case MessageType.QUERY:
            message = Query()
        case MessageType.VERDICT:
            message = Verdict(_fate(fields), fields.line("reason", MAX_REASON))
        case _:
            message = Abort(fields.line("reason", MAX_REASON))
    fields.end()
    return message
