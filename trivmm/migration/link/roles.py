"""What a connection is for, which its first frame says: HELLO, with the session that it belongs to and its role.

======== ===================================================================================================
CONTROL  a session's messages from SETUP to DONE; or, on a connection of its own, a question about it (QUERY)
PAGES    one of several that carry a session's pages, each with a ROUND_END; its index tells them apart
FAULT    the pages that a guest which runs already waits for
======== ===================================================================================================

Every role has its place in the format. In this version the CONTROL connection carries the pages, and the other two are
refused by name.
"""

from __future__ import annotations

from trivmm.errors import ProtocolError
from trivmm.migration.link.control import Link
from trivmm.migration.link.transports import Dialer
from trivmm.migration.wire.messages import Hello, Role
from trivmm.migration.wire.session import Session

__all__ = ["greeted", "open_control"]


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
