"""A server that outlives what it serves: it listens before the VMM is there, and tells of its end after it has gone."""

from __future__ import annotations

import attrs
import trio

from trivmm.control.http import Request, Response, error_response
from trivmm.control.server import Handler
from trivmm.deadlines import Deadlines

__all__ = ["Gate"]


@attrs.define(eq=False)
class Gate:
    """A handler. Requests wait for :meth:`open`, ``api_read`` at most; after :meth:`close` each is told so."""

    deadlines: Deadlines
    _handler: Handler | None = None
    _opened: trio.Event = attrs.field(factory=trio.Event)
    _closed: bool = False

    def open(self, handler: Handler) -> None:
        self._handler = handler
        self._opened.set()

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._opened.set()

    async def __call__(self, request: Request) -> Response:
        with self.deadlines.enter("api_read", "the VMM is not ready yet"):
            await self._opened.wait()
        if self._closed or self._handler is None:
            return error_response(500, f"{request.name} failed", "the VMM is shutting down")
        return await self._handler(request)
