"""Which message may go or come when: one table for both sides, and the class that walks it.

The state is that of the *session* as one side sees it. A message that the table does not have is a ProtocolError
that names the message, the state that this side is in and the states in which it would have been right::

    NEW ─SETUP▶ BUILDING ─SETUP_OK▶ PRECOPY ⇄ BARRIER
    PRECOPY ─STATE▶ LOADING ─READY▶ READY ─COMMIT▶ COMMITTED ─RUNNING▶ RUNNING ─DONE▶ CLOSED
                                                   COMMITTED ─REFUSED▶ REFUSED ─DONE▶ CLOSED
    PRECOPY, BARRIER, LOADING, READY ─UNDO▶ UNDOING ─UNDONE▶ PRECOPY
    anything before COMMITTED ─ABORT▶ CLOSED; COMMITTED ─ABORT (the destination's)▶ REFUSED
    CLOSED (by the destination's ABORT) ─DONE▶ CLOSED
    NEW ─QUERY▶ ASKED ─VERDICT▶ ANSWERED ─DONE▶ CLOSED
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.wire.frame import MessageType

__all__ = ["Session", "SessionState"]


class SessionState(enum.Enum):
    NEW = "new"
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
    (_S.NEW, _T.SETUP): _S.BUILDING,
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
    (_S.NEW, _T.QUERY): _S.ASKED,
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

for _state in (_S.BUILDING, _S.PRECOPY, _S.BARRIER, _S.LOADING, _S.READY, _S.UNDOING):
    FROM_SOURCE[_state, _T.ABORT] = _S.CLOSED
    FROM_DESTINATION[_state, _T.ABORT] = _S.CLOSED


@attrs.define(eq=False)
class Session:
    """One side's view. ``source`` says which side this is."""

    source: bool
    state: SessionState = SessionState.NEW

    def sent(self, kind: MessageType) -> None:
        """Account for a message about to be sent. :raises ProtocolError: this side would break the protocol."""
        self._step(FROM_SOURCE if self.source else FROM_DESTINATION, kind, "sending")

    def received(self, kind: MessageType) -> None:
        """Account for the peer's message. :raises ProtocolError: it is out of order."""
        self._step(FROM_DESTINATION if self.source else FROM_SOURCE, kind, "the peer sent")

    def _step(self, table: dict[tuple[SessionState, MessageType], SessionState], kind: MessageType, who: str) -> None:
        after = table.get((self.state, kind))
        if after is None:
            right = sorted({state.value for state, each in table if each is kind})
            wanted = " or ".join(right) or "never, from this side"
            raise ProtocolError(f"{who} {kind.name} out of order: the session is {self.state.value}, not {wanted}")
        self.state = after
