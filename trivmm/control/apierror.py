"""What goes wrong between an API client and its server. Light: imports nothing but our errors."""

from __future__ import annotations

import json
from typing import Any

from trivmm.errors import TrivmmError, shown

__all__ = ["ApiError", "ApiUnreachable", "MigrationFailed", "answer_of", "messages_of"]


class ApiError(TrivmmError):
    """The server answered with an error.

    :ivar status: the HTTP code.
    :ivar messages: what it said, outermost first, root cause last.
    """

    def __init__(self, status: int, messages: tuple[str, ...]) -> None:
        self.status = status
        self.messages = messages
        super().__init__(": ".join(messages) if messages else f"HTTP status {status}")


class ApiUnreachable(TrivmmError):
    """Nobody answers on the API socket, or the connection broke. ``path`` is the socket's."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"API socket {path}: {problem}; is a VMM serving there?")


class MigrationFailed(TrivmmError):
    """A migration ended without taking the VM away.

    :ivar state: ``Failed`` or ``Cancelled``.
    :ivar progress: the last ``vm.migration-progress``.
    """

    def __init__(self, state: str, reason: str, progress: dict[str, Any]) -> None:
        self.state = state
        self.progress = progress
        super().__init__(f"the migration {state.lower()}: {reason}" if reason else f"the migration {state.lower()}")


def answer_of(body: bytes) -> Any:
    """The JSON of an answer, or None where it has none. :raises ApiError: it is something else."""
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        raise ApiError(200, (f"the answer is not JSON: {shown(body)}",)) from None


def messages_of(body: bytes) -> tuple[str, ...]:
    """The JSON array of strings in an error's body; anything else becomes one string."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body.decode(errors="replace").strip()
    if isinstance(found, list):
        return tuple(str(item) for item in found)
    return (str(found),) if found else ()
