"""Every error that TriVMM raises on purpose.

Three families, by whose fault it is: :class:`ConfigError` (the user can mend it: field, value, remedy),
:class:`DeadlineError` (something did not happen in time: name, limit, diagnosis) and the rest of
:class:`TrivmmError` (a state, a peer, a guest). Nothing here imports trio: light tools use it too.
"""

from __future__ import annotations

import json
import os
from typing import Final

__all__ = [
    "CommitRefused",
    "ConfigError",
    "DeadlineError",
    "GuestCrash",
    "GuestMemoryError",
    "HypervisorError",
    "IllegalTransition",
    "MigrationCancelled",
    "MigrationError",
    "MigrationInDoubt",
    "NoSuchDevice",
    "NotSupported",
    "PastCommit",
    "PauseTimeout",
    "ProtocolError",
    "RunsElsewhere",
    "TrivmmError",
    "VmMigrating",
    "VmNotCreated",
    "WrongState",
    "one_line",
    "reason_of",
    "shown",
]

MAX_SHOWN: Final = 256  # characters of a value in a message: a path is readable, a hostile body is not repeated
MAX_LINE: Final = (
    2000  # of a message: ours have a few hundred; what a user, guest or peer adds is not repeated at length
)


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """``text`` as it may stand in a log, on a terminal or in an answer: whatever is not printable (line breaks, escape
    sequences, half a surrogate pair) is escaped as in JSON, and what is longer than ``limit`` is cut."""
    text = text[: limit + 1]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    return text if len(text) <= limit else text[:limit] + "…"


def shown(value: object) -> str:
    """A value as messages spell it: JSON on one line, cut at ``MAX_SHOWN``. Costs what it shows, not what there is."""
    text = ""
    try:
        for piece in _ENCODER.iterencode(value):
            text += piece
            if len(text) > MAX_SHOWN:
                break
    except (TypeError, ValueError, RecursionError):  # keys that JSON can't spell, a list in itself
        text = f"<{type(value).__name__}>"
    return one_line(text, MAX_SHOWN)


def reason_of(error: Exception) -> str:
    """Why a call into the operating system failed: without the path, which Python adds, and the message has."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _plain(value: object) -> str:
    """What JSON doesn't have; only Python callers can give it."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(os.fspath(value)) if isinstance(value, os.PathLike) else repr(value)


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, default=_plain)


class TrivmmError(Exception):
    """Base of all errors raised on purpose. ``str()`` is one line: what happened, to what, what can be done. What it
    repeats of a user, a guest or a peer is bounded and printable, see :func:`one_line`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(TrivmmError):
    """A mistake in what the user asked for. Its text spells the value as JSON, for whoever asked: an API client,
    a command line or a Python caller.

    :ivar field: the option or key at fault, as the user spells it (``memory.size``, ``--disk path``).
    :ivar value: what was given.
    :ivar problem: what is wrong with it.
    :ivar remedy: what the user can do.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field} = {shown(value)}: {problem}; {remedy}")


class NotSupported(ConfigError):
    """Asked for something that exists in the contract but not (yet) here; says so by name."""


class HypervisorError(TrivmmError):
    """A hypervisor call failed. ``call`` names it (``KVM_CREATE_VM``), ``errno`` is the kernel's answer or None."""

    def __init__(self, call: str, problem: str, remedy: str = "", errno: int | None = None) -> None:
        self.call = call
        self.errno = errno
        super().__init__(f"{call}: {problem}" + (f"; {remedy}" if remedy else ""))


class GuestMemoryError(TrivmmError):
    """An access outside guest RAM. ``gpa`` and ``length`` in bytes."""

    def __init__(self, gpa: int, length: int, what: str = "access") -> None:
        self.gpa = gpa
        self.length = length
        super().__init__(f"{what} of {length} bytes at guest physical {gpa:#x} is not inside one RAM region")


class GuestCrash(TrivmmError):
    """The guest cannot go on: it triple-faults after every reboot, or its hypervisor has an internal error.

    :ivar vcpu: index of the vCPU.
    :ivar reason: ``triple fault``, ``KVM internal error (emulation)``, …
    :ivar details: registers and instruction bytes, several lines.
    """

    def __init__(self, vcpu: int, reason: str, details: str) -> None:
        self.vcpu = vcpu
        self.reason = reason
        self.details = details
        super().__init__(f"vcpu{vcpu}: {reason}: {details.splitlines()[0] if details else 'no registers'}")


class IllegalTransition(TrivmmError):
    """A step that a transition table does not have. ``thing`` is whose table; both states are carried."""

    def __init__(self, thing: str, source: object, target: object) -> None:
        self.thing = thing
        self.source = source
        self.target = target
        super().__init__(f"{thing}: no step from {source} to {target}")


class WrongState(TrivmmError):
    """The VM is not in a state that allows the operation."""

    def __init__(self, operation: str, state: str, allowed: str) -> None:
        self.operation = operation
        self.state = state
        self.allowed = allowed
        super().__init__(f"{operation}: the VM is {state}; it must be {allowed}")


class VmNotCreated(TrivmmError):
    """There is no VM."""

    def __init__(self) -> None:
        super().__init__("VM is not created; create it first (vm.create, or --kernel on the command line)")


class NoSuchDevice(TrivmmError):
    """The VM has no device of this id."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no device with id {shown(name)}")
        self.name = name


class VmMigrating(TrivmmError):
    """The VM is owned by a migration; it can be read but not changed."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(f"{operation}: the VM is migrating; wait for the end, or cancel the migration")


class DeadlineError(TrivmmError):
    """A named deadline expired.

    :ivar name: its name in ``trivmm.deadlines``.
    :ivar limit_s: the limit in seconds.
    :ivar diagnosis: who or what did not answer.
    """

    def __init__(self, name: str, limit_s: float, diagnosis: str) -> None:
        self.name = name
        self.limit_s = limit_s
        self.diagnosis = diagnosis
        super().__init__(f"deadline {name} ({limit_s:g} s) expired: {diagnosis}")


class PauseTimeout(DeadlineError):
    """Not every vCPU stopped in time. The pause was rolled back: the VM runs."""


class MigrationError(TrivmmError):
    """A migration failed before its commit: the source runs."""


class MigrationCancelled(MigrationError):
    """A migration was cancelled before its commit: the source runs."""


class PastCommit(TrivmmError):
    """A migration has seen its COMMIT: only its verdict ends it. ``what`` is told of it (``COMMIT was sent``)."""

    def __init__(self, what: str) -> None:
        super().__init__(f"cancel-migration: {what}: nothing can be cancelled any more; wait for the verdict")


class ProtocolError(MigrationError):
    """The peer sent something that the migration protocol does not allow."""


class CommitRefused(MigrationError):
    """The destination answered REFUSED after COMMIT: it never ran the VM, the source runs again."""


class MigrationInDoubt(TrivmmError):
    """Nobody knows whether the destination runs the VM, or its image locks are gone: it stays paused, an operator
    decides (docs/in-doubt.md).

    :ivar session: what to ask the destination about; None where it has nothing to say: COMMIT was never sent, or was
        refused, and only the image locks are missing.
    """

    def __init__(self, message: str, session: bytes | None = None) -> None:
        self.session = session
        super().__init__(message)


class RunsElsewhere(TrivmmError):
    """The destination of a migration says that it runs the VM: it never runs here again.

    :ivar destination: its URL.
    """

    def __init__(self, operation: str, destination: str) -> None:
        self.destination = destination
        super().__init__(
            f"{operation}: {destination} says that it runs the VM; delete it here, or let vm.resolve-migration end it"
        )
