"""The one list of waits: every deadline has a name, a default and a sentence that says what its expiry does.

Anything that waits for a guest, a peer, a thread, a device or the kernel does it inside a deadline of this table::

    with deadlines.enter("activation", lambda: f"device {name}: still activating"):
        await device.activate(...)

On expiry the block raises :class:`~trivmm.errors.DeadlineError` (or the class that the table names) with the
name, the limit and the diagnosis, which is evaluated *at expiry*. ``VmConfig.deadlines`` holds a VM's limits.
trio is imported only when a deadline is entered, so that light tools may read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs

from trivmm.errors import ConfigError, DeadlineError, PauseTimeout

__all__ = ["TABLE", "Deadline", "Deadlines", "markdown_table"]


@attrs.frozen
class Deadline:
    """A row of the table. ``default_s`` in seconds; ``expiry`` is what happens, in words."""

    name: str
    default_s: float
    expiry: str
    error: type[DeadlineError] = DeadlineError


_ROWS: Final = (
    Deadline("activation", 5.0, "the device is set NEEDS_RESET, its barrier opens, the VM goes on"),
    Deadline("pause", 1.0, "every vCPU is resumed, the VM runs again", PauseTimeout),
    Deadline("vcpu_start", 5.0, "boot or receiving fails, naming the vCPU whose thread did not start", PauseTimeout),
    Deadline("vcpu_stop", 2.0, "the vCPU is named in the log; a process-level error, never a silent hang"),
    Deadline("device_stop", 2.0, "the worker is named in the log; the VM cannot commit a migration while it exists"),
    Deadline("connect", 10.0, "the migration fails, the source runs"),
    Deadline("accept", 60.0, "receiving fails, nothing was created"),
    Deadline("handshake", 10.0, "the migration fails, the source runs"),
    Deadline("quiesce", 5.0, "in-flight device work did not end; the switchover is undone, the source runs"),
    Deadline("stall", 30.0, "no frame began, or one that did was not whole: the migration fails, the source runs"),
    Deadline(
        "intake",
        14400.0,
        "from SETUP to COMMIT: the destination gives up, the source runs; raise it for sources with a long `timeout_s`",
    ),
    Deadline("migration", 3600.0, "strategy cancel: the source runs; strategy ignore: switch over anyway"),
    Deadline("downtime", 0.3, "the switchover is undone and precopy goes on; after 5 attempts the strategy decides"),
    Deadline("commit", 10.0, "in doubt: the VM stays paused, an operator decides"),
    Deadline("resolve", 5.0, "in doubt and asked again: the destination does not answer, resuming wants `force`"),
    Deadline("rollback", 5.0, "undoing a switchover took too long; named in the log, a process-level error"),
    Deadline(
        "drain",
        1.0,
        "console output that its sink does not take stays in the ring and is part of the saved state",
    ),
    Deadline("typing", 1.0, "what is typed on the terminal is dropped until the guest takes input again"),
    Deadline("lease", 10.0, "the operation is refused, naming the one that owns the VM"),
    Deadline(
        "kernel",
        10.0,
        "a call that waits for the kernel (KVM's most of all) has not returned: its operation fails; its thread is "
        "named as stuck until it is back, and keeps what it works on",
    ),
    Deadline(
        "storage",
        60.0,
        "a call that waits for the storage behind a disk (a flush, a lock) has not returned: the migration fails, the "
        "source runs; its thread is named as stuck until it is back. In a switchover it has what is left of `downtime`",
    ),
    Deadline("passt", 2.0, "a passt that was started has not answered; it is used all the same, and the log says so"),
    Deadline(
        "vsock_greeting",
        2.0,
        "a vsock connection is not made: its client has not said CONNECT (it is closed), or the guest has not answered "
        "(both ends are told)",
    ),
    Deadline(
        "vsock_linger",
        30.0,
        "one end of a vsock connection is done and the other does not get on: what is left is dropped, both are told",
    ),
    Deadline("fetch", 600.0, "`trivmm image` gives a package up that has not come; what came of it is gone"),
    Deadline("lock", 2.0, "a register lock was held too long: a bug, reported with the lock's name"),
    Deadline("api_read", 10.0, "the connection is closed"),
    Deadline("api_write", 10.0, "the connection is closed"),
    Deadline("api_idle", 600.0, "the idle connection is closed"),
    Deadline(
        "verdict_read", 1.0, "nobody has fetched the outcome of a migration that took the VM away: the process ends"
    ),
    Deadline("free", 2.0, "nobody waits longer for the kernel to free a guest's RAM; a thread goes on with it"),
    Deadline(
        "shutdown_grace",
        5.0,
        "a migration past COMMIT is waited for first, up to `commit`; what then still runs is named, "
        "the process leaves by os._exit",
    ),
)

TABLE: Final[dict[str, Deadline]] = {row.name: row for row in _ROWS}


def _limit(name: str) -> float:
    return attrs.field(default=TABLE[name].default_s, validator=_positive)


def _positive(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise ConfigError(f"deadlines.{attribute.name}", value, "not a time", "give seconds, more than 0")


@attrs.frozen
class Deadlines:
    """A VM's limits, in seconds; one field and one method (``with deadlines.enter("pause", why)``) per row."""

    activation: float = _limit("activation")
    pause: float = _limit("pause")
    vcpu_start: float = _limit("vcpu_start")
    vcpu_stop: float = _limit("vcpu_stop")
    device_stop: float = _limit("device_stop")
    connect: float = _limit("connect")
    accept: float = _limit("accept")
    handshake: float = _limit("handshake")
    quiesce: float = _limit("quiesce")
    stall: float = _limit("stall")
    intake: float = _limit("intake")
    migration: float = _limit("migration")
    downtime: float = _limit("downtime")
    commit: float = _limit("commit")
    resolve: float = _limit("resolve")
    rollback: float = _limit("rollback")
    drain: float = _limit("drain")
    typing: float = _limit("typing")
    lease: float = _limit("lease")
    kernel: float = _limit("kernel")
    storage: float = _limit("storage")
    passt: float = _limit("passt")
    fetch: float = _limit("fetch")
    lock: float = _limit("lock")
    api_read: float = _limit("api_read")
    api_write: float = _limit("api_write")
    api_idle: float = _limit("api_idle")
    verdict_read: float = _limit("verdict_read")
    free: float = _limit("free")
    vsock_greeting: float = _limit("vsock_greeting")
    vsock_linger: float = _limit("vsock_linger")
    shutdown_grace: float = _limit("shutdown_grace")

    def limit_s(self, name: str) -> float:
        """Of the row ``name``, in seconds."""
        limit: float = getattr(self, TABLE[name].name)
        return limit

    @contextmanager
    def enter(
        self,
        name: str,
        diagnosis: Callable[[], str] | str,
        *,
        at_most_s: float | None = None,
        shield: bool = False,
    ) -> Iterator[None]:
        """Bound a block by the deadline ``name``, or by ``at_most_s`` seconds where that is less.

        :raises DeadlineError: (or the row's own class) on expiry, chained from ``trio.TooSlowError``.
        """
        import trio

        row = TABLE[name]
        limit_s = self.limit_s(name)
        if at_most_s is not None:
            limit_s = max(0.0, min(limit_s, at_most_s))
        with trio.move_on_after(limit_s, shield=shield) as scope:
            yield
        if scope.cancelled_caught:
            said = diagnosis if isinstance(diagnosis, str) else diagnosis()
            raise row.error(name, limit_s, said)


def markdown_table() -> str:
    """The table as the README shows it."""
    rows = ["| name | default | on expiry |", "| --- | --- | --- |"]
    rows += [f"| {row.name} | {row.default_s:g} s | {row.expiry} |" for row in _ROWS]
    return "\n".join(rows)
