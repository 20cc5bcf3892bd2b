"""One owner's verdicts: what became of the sessions that came in, and the doors that only answer for them any more.

An owner is whoever may receive more than once: a ``Vmm``, or an ``open_incoming`` block for itself. Two owners in one
process see nothing of each other. A verdict is written down here before anybody is told, and kept until its source says
that it has heard it; a later receiver of the same owner answers for it too, whatever its address, and takes an address
over at which an earlier one only answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import trio

from trivmm.migration.wire.messages import Verdict

__all__ = ["Verdicts"]

MAX_SETTLED: Final = 64  # sessions that nobody said DONE to: each is a source that died, or may be in doubt


@attrs.define(eq=False)
class Verdicts:
    """``nursery`` is where it is answered for machines that do not run here: it should live as long as the owner."""

    nursery: trio.Nursery
    _settled: dict[bytes, Verdict] = attrs.field(factory=dict, init=False)  # by session, the latest last
    _doors: dict[str, Callable[[], None]] = attrs.field(factory=dict, init=False)  # by URL: how to take it over

    def settle(self, session_id: bytes, verdict: Verdict) -> None:
        self._settled[session_id] = verdict
        while len(self._settled) > MAX_SETTLED:
            del self._settled[next(iter(self._settled))]

    def of(self, session_id: bytes) -> Verdict | None:
        return self._settled.get(session_id)

    def heard(self, session_id: bytes) -> None:
        """Its source knows: nobody will ask about that session again."""
        self._settled.pop(session_id, None)

    def only_answers(self, url: str, hand_over: Callable[[], None]) -> None:
        """The door at ``url`` takes nobody in any more; ``hand_over`` frees the address at once."""
        self._doors[url] = hand_over

    def closed(self, url: str, hand_over: Callable[[], None]) -> None:
        """That door does not answer any more, unless another one is there by now."""
        if self._doors.get(url) == hand_over:
            del self._doors[url]

    def take_over(self, url: str) -> None:
        """Whoever only answers at ``url`` leaves it, for the one who asks."""
        hand_over = self._doors.pop(url, None)
        if hand_over is not None:
            hand_over()
