"""Where a guest's console output goes, and where its input comes from.

``ends`` is what a sink and the guest's line are to each other; ``plain`` sinks only take output: nowhere, a file, a
terminal; ``clients`` are those that talk both ways with a client that comes and goes; ``opening`` makes the one that a
configuration asks for.

A sink outlives its machine where the guest reboots: the path stays, and so does the client. While no machine runs it,
nothing moves.
"""

from trivmm.platform.sinks.clients import BACKLOG_BYTES, ClientSink, PtySink, SocketSink
from trivmm.platform.sinks.ends import GuestInput, GuestOutput, Sink
from trivmm.platform.sinks.opening import LineConfig, open_sink
from trivmm.platform.sinks.plain import FdSink, NullSink

__all__ = [
    "BACKLOG_BYTES",
    "ClientSink",
    "FdSink",
    "GuestInput",
    "GuestOutput",
    "LineConfig",
    "NullSink",
    "PtySink",
    "Sink",
    "SocketSink",
    "open_sink",
]
