"""What a connection is for, which its first frame says: HELLO, with the session that it belongs to and its role.

======== ===================================================================================================
CONTROL  a session's messages from SETUP to DONE; or, on a connection of its own, a question about it (QUERY)
PAGES    one of several that carry a session's pages, each with a ROUND_END; its index tells them apart
FAULT    the pages that a guest which runs already waits for
======== ===================================================================================================

Every role has its place in the format. In this version the CONTROL connection carries the pages, and the other two are
refused by name. So a session's page links are one, over the same link as its messages; whoever works with them works
with a tuple. A round is over when every page link has had its ROUND_END; one ROUND_ACK on CONTROL says that all of it
has landed.
"""

from __future__ import annotations

import attrs

from trivmm.errors import ProtocolError
from trivmm.migration.link.control import Link
from trivmm.migration.link.transports import Dialer
from trivmm.migration.pages.land import PageSink
from trivmm.migration.pages.send import DirtySet, PageCounts
from trivmm.migration.wire.messages import Hello, Role, RoundEnd
from trivmm.migration.wire.session import Session

__all__ = ["LandingLink", "PageLink", "greeted", "open_control"]


async def open_control(dialer: Dialer, session_id: bytes) -> Link:
    """A new CONTROL connection of a session, its HELLO on the way.

    :raises LinkLost: nobody is there. :raises DeadlineError: (connect, stall)."""
    link = Link(await dialer.dial(), Session(source=True))
    try:
        await link.send(Hello(session_id, Role.CONTROL))
    except BaseException:
        await link.close()  # noqa: ASYNC102 - shielded and bounded inside
        raise
    return link


async def greeted(link: Link) -> Hello:
    """What a new connection says that it is. Bounded by the caller.

    :raises ProtocolError: it is for something that there is not yet, or no HELLO at all."""
    hello = await link.expect(Hello)
    if hello.role is not Role.CONTROL:
        what = f"{hello.role.name} {hello.index}" if hello.role is Role.PAGES else hello.role.name
        raise ProtocolError(f"{what}: several connections are not supported yet")
    return hello


@attrs.define(eq=False)
class PageLink:
    """The source's end of a connection that carries pages. ``sent`` is what went out on it since it was opened."""

    link: Link
    sent: PageCounts = attrs.field(factory=PageCounts, init=False)

    async def send_pages(self, dirty: DirtySet, limit: int) -> PageCounts:
        """About ``limit`` pages of ``dirty``. What went out is counted and discarded there, whatever is raised."""
        counts = PageCounts()
        try:
            await self.link.send_pages(dirty, limit, counts)
        finally:
            self.sent.add(counts)
        return counts

    async def end_round(self, number: int) -> None:
        await self.link.send(RoundEnd(number, self.sent.all_pages))


@attrs.define(eq=False)
class LandingLink:
    """The destination's end of one. ``ended``: how many ROUND_ENDs came on it."""

    sink: PageSink
    ended: int = attrs.field(default=0, init=False)

    def end_round(self, message: RoundEnd) -> None:
        """:raises ProtocolError: a page was lost on the way, or came twice."""
        landed = self.sink.counts.all_pages
        if landed != message.pages:
            raise ProtocolError(f"round {message.round} ends with {landed} pages landed, {message.pages} were sent")
        self.ended += 1
