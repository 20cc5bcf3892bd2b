"""One connection's conversation: which message may go or come when. Everything that changes its state is in this file.

:class:`Session` is what one side knows of it. Messages become frames in :meth:`Session.send` and frames messages in
:meth:`Session.receive`; both move the state by one table, and a message that the table does not have is a ProtocolError
that names it, the state that this side is in, and the states in which it would have been right. Pure: no trio, no I/O.

::

    NEW ─HELLO▶ OPEN ─SETUP▶ BUILDING ─SETUP_OK▶ PRECOPY ⇄ BARRIER
    PRECOPY ─STATE▶ LOADING ─READY▶ READY ─COMMIT▶ COMMITTED ─RUNNING▶ RUNNING ─DONE▶ CLOSED
                                                   COMMITTED ─REFUSED▶ REFUSED ─DONE▶ CLOSED
    PRECOPY, BARRIER, LOADING, READY ─UNDO▶ UNDOING ─UNDONE▶ PRECOPY
    anything before COMMITTED ─ABORT▶ CLOSED; COMMITTED ─ABORT (the destination's)▶ REFUSED
    CLOSED (by the destination's ABORT) ─DONE▶ CLOSED
    OPEN ─QUERY▶ ASKED ─VERDICT▶ ANSWERED ─DONE▶ CLOSED

This is the CONTROL connection, which carries the pages as long as it is the only one. A connection with another role
(``messages.Role``) has no states of its own yet: it is refused after its HELLO.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.wire.frame import Frame, MessageType
from trivmm.migration.wire.messages import Abort, Done, Message, encode_message, parse_message

__all__ = ["LAST_LOOK_S", "Session", "SessionState"]

LAST_LOOK_S: Final = 1.0
"""How long a source goes on asking after ``commit``, however short that is: a question and its answer on a busy host.
Part of the protocol, since a destination answers for longer than its source asks."""


class SessionState(enum.Enum):
    NEW = "new"
    OPEN = "open"
    BUILDING = "building"
    PRECOPY = "precopy"
    BARRIER = "barrier"
    LOADING = "loading"
    READY = "ready"
    UNDOING = "undoing"
    COMMITTED = "committed"
    RUNNING = "running"
    REFUSED = "refused"
    ASKED = "asked"
    ANSWERED = "answered"
    CLOSED = "closed"


_S = SessionState
_T = MessageType

FROM_SOURCE: Final[dict[tuple[SessionState, MessageType], SessionState]] = {
    (_S.NEW, _T.HELLO): _S.OPEN,
    (_S.OPEN, _T.SETUP): _S.BUILDING,
    (_S.PRECOPY, _T.PAGES): _S.PRECOPY,
    (_S.PRECOPY, _T.ZERO): _S.PRECOPY,
    (_S.PRECOPY, _T.ROUND_END): _S.BARRIER,
    (_S.PRECOPY, _T.STATE): _S.LOADING,
    (_S.PRECOPY, _T.UNDO): _S.UNDOING,
    (_S.BARRIER, _T.UNDO): _S.UNDOING,
    (_S.LOADING, _T.UNDO): _S.UNDOING,
    (_S.READY, _T.UNDO): _S.UNDOING,
    (_S.READY, _T.COMMIT): _S.COMMITTED,
    (_S.RUNNING, _T.DONE): _S.CLOSED,
    (_S.REFUSED, _T.DONE): _S.CLOSED,
    (_S.CLOSED, _T.DONE): _S.CLOSED,  # its ABORT was heard
    (_S.OPEN, _T.QUERY): _S.ASKED,
    (_S.ANSWERED, _T.DONE): _S.CLOSED,
}

FROM_DESTINATION: Final[dict[tuple[SessionState, MessageType], SessionState]] = {
    (_S.BUILDING, _T.SETUP_OK): _S.PRECOPY,
    (_S.BUILDING, _T.SETUP_FAIL): _S.CLOSED,
    (_S.BARRIER, _T.ROUND_ACK): _S.PRECOPY,
    (_S.LOADING, _T.READY): _S.READY,
    (_S.UNDOING, _T.ROUND_ACK): _S.UNDOING,  # sent before the destination saw UNDO
    (_S.UNDOING, _T.READY): _S.UNDOING,
    (_S.UNDOING, _T.UNDONE): _S.PRECOPY,
    (_S.COMMITTED, _T.RUNNING): _S.RUNNING,
    (_S.COMMITTED, _T.REFUSED): _S.REFUSED,
    (_S.COMMITTED, _T.ABORT): _S.REFUSED,  # it gave up before it saw COMMIT: it never ran
    (_S.ASKED, _T.VERDICT): _S.ANSWERED,
    (_S.NEW, _T.ABORT): _S.CLOSED,  # a stranger is turned away
    (_S.ASKED, _T.ABORT): _S.CLOSED,
}

for _state in (_S.OPEN, _S.BUILDING, _S.PRECOPY, _S.BARRIER, _S.LOADING, _S.READY, _S.UNDOING):
    FROM_SOURCE[_state, _T.ABORT] = _S.CLOSED
    FROM_DESTINATION[_state, _T.ABORT] = _S.CLOSED

# Here a link that breaks may have brought an ABORT that says why, and nothing that somebody else waits for.
TOLD_WHY: Final = (_S.OPEN, _S.BUILDING, _S.PRECOPY, _S.BARRIER, _S.LOADING, _S.UNDOING, _S.ASKED)


@attrs.define(eq=False)
class Session:
    """One side's view. ``source`` says which side this is. ``state`` is for reading."""

    source: bool
    state: SessionState = SessionState.NEW

    # --- what else follows from the state ----------------------------------------------------------------------

    @property
    def takes_pages(self) -> bool:
        """Whether frames of pages may come (or go) now."""
        return self.state is SessionState.PRECOPY

    @property
    def may_be_told_why(self) -> bool:
        """Whether a link that broke in a send is worth a look for the peer's ABORT."""
        return self.state in TOLD_WHY

    @property
    def over(self) -> bool:
        return self.state is SessionState.CLOSED

    # --- messages ----------------------------------------------------------------------------------------------

    def send(self, message: Message) -> bytes:
        """The frame for a message that goes out next. :raises ProtocolError: this side would break the protocol."""
        data = encode_message(message)
        self._step(self.source, message.kind, "sending")
        return data

    def send_pages(self, kind: MessageType = MessageType.PAGES) -> None:
        """Frames of pages go out next, made by whoever has the pages. :raises ProtocolError: not now."""
        self._step(self.source, kind, "sending")

    def receive(self, frame: Frame) -> Message:
        """The message in a frame of the peer's. :raises ProtocolError: it is out of order, or makes no sense."""
        self._step(not self.source, frame.type, "the peer sent")
        return parse_message(frame)

    def farewell(self, reason: str) -> bytes:
        """The frame that takes leave, with a reason; where the peer has left, and said so, that it was heard.

        :raises ProtocolError: there is nothing to say."""
        return self.send(Done() if self.over else Abort(reason))

    def _step(self, from_source: bool, kind: MessageType, who: str) -> None:
        """The one place that moves the state."""
        table = FROM_SOURCE if from_source else FROM_DESTINATION
        after = table.get((self.state, kind))
        if after is None:
            right = sorted({state.value for state, each in table if each is kind})
            wanted = " or ".join(right) or "never, from this side"
            raise ProtocolError(f"{who} {kind.name} out of order: the session is {self.state.value}, not {wanted}")
        self.state = after
