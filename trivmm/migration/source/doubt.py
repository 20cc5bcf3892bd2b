"""A VM in doubt, at its source: what is kept so that its destination can be asked again, and what an answer allows.

Owned by the ``Vm``, from ``MigrationInDoubt`` until an answer settles it, an operator forces it, or the VM ends. Asking
changes nothing at either side, but that a destination whose answer settles it stops waiting for questions: so that
answer is kept here too, and is final. ``force`` is for silence: it never overrides an answer.
"""

from __future__ import annotations

from typing import Any

import attrs

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationInDoubt, RunsElsewhere
from trivmm.migration.link.transports import Dialer
from trivmm.migration.source.verdict import Finding, ask
from trivmm.migration.wire.messages import Fate

__all__ = ["Doubt", "Resolution"]


@attrs.frozen
class Resolution:
    """What asking again found. ``verdict``: ``running`` (there: the VM has left), ``refused`` (it never ran there and
    never will), ``unknown`` (the destination is there and does not know) or ``unreachable``. ``forced``: the doubt was
    taken away all the same. ``in_doubt``: it remains. ``advice`` says what can be done."""

    verdict: str
    reason: str
    advice: str
    in_doubt: bool
    forced: bool = False


@attrs.frozen
class Doubt:
    """``session`` None: the destination has no part in it, only the image locks are missing. ``reason`` is how it came
    about, ``found`` what the last question found."""

    destination: str
    session: bytes | None
    reason: str
    dialer: Dialer
    found: Finding | None = None

    def told(self) -> dict[str, Any]:
        """For vm.info."""
        session = None if self.session is None else self.session.hex()
        return {"destination": self.destination, "session": session, "reason": self.reason, "verdict": self.verdict}

    @property
    def verdict(self) -> str | None:
        """As in :class:`Resolution`; None: nobody has asked since."""
        if self.found is None:
            return None
        if self.found.fate is None:
            return "unreachable"
        return self.found.fate.value if self.found.settled else Fate.UNKNOWN.value

    async def look(self, deadlines: Deadlines) -> Doubt:
        """Ask, within ``resolve``, unless the answer is known."""
        if self.session is None:
            return attrs.evolve(self, found=Finding(Fate.REFUSED, self.reason))
        if self.found is not None and self.found.settled:
            return self
        return attrs.evolve(self, found=await ask(self.dialer, self.session, deadlines))

    def check(self, operation: str, force: bool) -> None:
        """:raises RunsElsewhere: the VM runs there. :raises MigrationInDoubt: nobody knows, without ``force``."""
        if self.verdict == "running":
            raise RunsElsewhere(operation, self.destination)
        if self.verdict != "refused" and not force:
            raise MigrationInDoubt(f"{operation}: the VM is in doubt: {self.why}; {self.advice}", self.session)

    @property
    def why(self) -> str:
        reason = "" if self.found is None else self.found.reason
        match self.verdict:
            case "running":
                return "the destination says that it runs the VM"
            case "refused":
                return f"it never ran there ({reason})" if self.session is not None else reason
        return reason

    @property
    def advice(self) -> str:
        match self.verdict:
            case "running":
                return "nothing is left to do: the VM is gone from here, as after any migration"
            case "refused":
                return "vm.resume runs it here"
        look = f"ask again when {self.destination} can be reached (vm.resolve-migration)"
        if self.verdict == "unknown":
            look = f"look whether the VM runs at {self.destination}"
        return (
            f"{look}; when you are sure that it does not run there, say force: if it does, two copies run, and write "
            "to the same images where no lock forbids it"
        )

    def resolution(self, force: bool) -> Resolution:
        settled = self.verdict in ("running", "refused")
        forced = force and not settled
        advice = "vm.resume runs it here, at your risk" if forced else self.advice
        return Resolution(self.verdict or "unknown", self.why, advice, not (settled or forced), forced)
