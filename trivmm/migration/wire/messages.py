"""What the frames say: one frozen class a message, and its JSON body by the one strict converter. Pure.

The sequence of messages is drawn in ``frame``, their order checked by ``session``. A class says what its fields may be
by their types; its ``kind`` is the frame's.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar, Final, TypeAlias, get_args

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.wire.frame import PAGE_BYTES, Frame, MessageType, encode_frame
from trivmm.state.codec import state_from_json, state_to_json
from trivmm.state.jsontext import dump_json, load_json
from trivmm.state.machine import MachineState
from trivmm.state.strict import prepare, structure, unstructure
from trivmm.values import AtMost, Exactly, Within

__all__ = [
    "SESSION_BYTES",
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
    "prepare_messages",
]

SESSION_BYTES: Final = 16
MAX_REASON: Final = 2000  # characters of an error text
MAX_REGIONS: Final = 8  # as TV_MAX_REGIONS
MAX_LINKS: Final = 64  # connections for pages: far more than any host has queues
MAX_ADDRESS: Final = 1 << 52  # of guest memory: no processor has more bits

SessionId = Annotated[bytes, Exactly(SESSION_BYTES)]
RoundNumber = Annotated[int, Within(0, 1 << 32)]
SentPages = Annotated[int, Within(0, 1 << 52)]  # as often as a page can be sent in a life
Milliseconds = Annotated[float, Within(0, 1e9)]
Reason = Annotated[str, AtMost(MAX_REASON)]


def _line(text: object) -> str:
    """A text that people read: line breaks and terminal controls in it come out escaped, so it stays one line. Cut to
    what a peer takes."""
    said = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))
    return said[:MAX_REASON]


class Role(enum.Enum):
    """What a connection is for."""

    CONTROL = "control"  # a session's messages, or a question about one
    PAGES = "pages"  # one of several that carry pages
    FAULT = "fault"  # the pages that a running guest waits for


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
class Hello:
    """The first frame of every connection. ``index`` is which of its role, from 0."""

    kind: ClassVar = MessageType.HELLO
    session: SessionId
    role: Role
    index: Annotated[int, Within(0, MAX_LINKS - 1)] = 0


def _regions(instance: object, attribute: object, memory: tuple[tuple[int, int], ...]) -> None:
    floor = 0
    for gpa, size in memory:
        if gpa < floor or size <= 0 or gpa % PAGE_BYTES or size % PAGE_BYTES or gpa + size > MAX_ADDRESS:
            raise ProtocolError(f"memory region [{gpa:#x}, {size:#x}] is unaligned, overlaps or lies outside")
        floor = gpa + size


@attrs.frozen
class Setup:
    """``machine`` for the destination's factory; ``memory`` (gpa, size) by slot."""

    kind: ClassVar = MessageType.SETUP
    machine: dict[str, Any]
    memory: Annotated[tuple[tuple[int, int], ...], AtMost(MAX_REGIONS)] = attrs.field(validator=_regions)


@attrs.frozen
class SetupOk:
    """``resume_ms``: the destination's first guess of the time from COMMIT to RUNNING."""

    kind: ClassVar = MessageType.SETUP_OK
    resume_ms: Milliseconds


@attrs.frozen
class SetupFail:
    kind: ClassVar = MessageType.SETUP_FAIL
    reason: Reason = attrs.field(converter=_line)


@attrs.frozen
class RoundEnd:
    """``pages``: how many went out on this connection, zero pages included, each time that one was sent."""

    kind: ClassVar = MessageType.ROUND_END
    round: RoundNumber
    pages: SentPages


@attrs.frozen
class RoundAck:
    kind: ClassVar = MessageType.ROUND_ACK
    round: RoundNumber


@attrs.frozen
class State:
    """Its body is the state itself, in ``state.codec``'s shape."""

    kind: ClassVar = MessageType.STATE
    state: MachineState


@attrs.frozen
class Ready:
    """``resume_ms``: the destination's guess of its time from COMMIT to RUNNING; ``loaded_ms``: loading took."""

    kind: ClassVar = MessageType.READY
    resume_ms: Milliseconds
    loaded_ms: Milliseconds


@attrs.frozen
class Undo:
    kind: ClassVar = MessageType.UNDO
    reason: Reason = attrs.field(converter=_line)


@attrs.frozen
class Undone:
    kind: ClassVar = MessageType.UNDONE


@attrs.frozen
class Commit:
    kind: ClassVar = MessageType.COMMIT
    session: SessionId


@attrs.frozen
class Running:
    """``resume_ms``: what it took from COMMIT to the first vCPU's run."""

    kind: ClassVar = MessageType.RUNNING
    resume_ms: Milliseconds


@attrs.frozen
class Refused:
    """A promise: the destination never ran the machine and never will."""

    kind: ClassVar = MessageType.REFUSED
    reason: Reason = attrs.field(converter=_line)


@attrs.frozen
class Done:
    kind: ClassVar = MessageType.DONE


@attrs.frozen
class Query:
    """What became of the session that HELLO named?"""

    kind: ClassVar = MessageType.QUERY


@attrs.frozen
class Verdict:
    kind: ClassVar = MessageType.VERDICT
    fate: Fate
    reason: Reason = attrs.field(converter=_line)


@attrs.frozen
class Abort:
    kind: ClassVar = MessageType.ABORT
    reason: Reason = attrs.field(converter=_line)


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
CLASSES: Final[dict[MessageType, type[Message]]] = {each.kind: each for each in get_args(Message)}


def prepare_messages() -> None:
    """Make the first of each as quick as any other: nobody's downtime pays for that."""
    for each in CLASSES.values():
        prepare(each)


def encode_message(message: Message) -> bytes:
    """A whole frame. :raises ProtocolError: it is a state that is too large."""
    value = state_to_json(message.state) if isinstance(message, State) else unstructure(message)
    return encode_frame(message.kind, dump_json(value))


def parse_message(frame: Frame) -> Message:
    """The message in a frame. :raises ProtocolError: names the field at fault. PAGES and ZERO are not messages."""
    name, cls = frame.type.name, CLASSES.get(frame.type)
    if cls is None:
        raise ProtocolError(f"{name} where a message is due")
    value = load_json(name, frame.body)
    if cls is State:
        return State(state_from_json(value))
    return structure(name, value, cls)
