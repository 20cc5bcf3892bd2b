"""The table and the JSON of a torture run. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from trivmm.cli.table import table
from trivmm.testing.torture.judge import Judgement, Observation, Verdict
from trivmm.testing.torture.plan import KINDS, Plan

__all__ = ["Result", "Results"]


@attrs.frozen
class Result:
    plan: Plan
    seen: Observation
    judgement: Judgement
    seconds: float

    def line(self) -> str:
        """One trial on one line, or more where promises were broken."""
        harmed = "" if self.seen.harmed or self.plan.kind.name == "move" else ", not reached"
        head = f"{self.plan.number:4}  {self.plan}{harmed}: {self.judgement.verdict.value}, {self.seen.sent.value}"
        return "\n".join(
            [f"{head}, {self.seconds:.1f} s", *(f"      BROKEN: {each}" for each in self.judgement.broken)]
        )

    def json(self) -> dict[str, Any]:
        plan, seen = self.plan, self.seen
        return {
            "trial": plan.number,
            "kind": plan.kind.name,
            "plan": str(plan),
            "verdict": self.judgement.verdict.value,
            "sent": seen.sent.value,
            "harmed": seen.harmed,
            "committed": seen.committed,
            "verdict_s": None if seen.verdict_s is None else round(seen.verdict_s, 3),
            "guest_errors": seen.guest_errors,
            "resumed": seen.resumed,
            "left_over": list(seen.left_over),
            "broken": list(self.judgement.broken),
            "seconds": round(self.seconds, 2),
        }


_COLUMNS: Final[dict[str, Callable[[Result], bool]]] = {
    "trials": lambda each: True,
    "harmed": lambda each: each.seen.harmed,
    "one copy": lambda each: each.judgement.verdict is Verdict.ONE_COPY,
    "in doubt": lambda each: each.judgement.verdict is Verdict.IN_DOUBT,
    "lost": lambda each: each.judgement.verdict is Verdict.LOST,
    "two copies": lambda each: each.judgement.verdict is Verdict.TWO_COPIES,
    "deadline kept": lambda each: each.judgement.deadline_kept,
    "left over": lambda each: bool(each.seen.left_over),
    "guest errors": lambda each: each.seen.guest_errors > 0,
    "broken": lambda each: not each.judgement.ok,
}


@attrs.define
class Results:
    results: list[Result] = attrs.field(factory=list)

    @property
    def ok(self) -> bool:
        return all(each.judgement.ok for each in self.results)

    def counts(self) -> dict[str, dict[str, int]]:
        """Trials by kind, and in all of them (``all``), by column."""
        by_kind = {name: [each for each in self.results if each.plan.kind.name == name] for name in KINDS}
        groups = {name: found for name, found in by_kind.items() if found} | {"all": self.results}
        return {
            name: {column: sum(map(counts, found)) for column, counts in _COLUMNS.items()}
            for name, found in groups.items()
        }

    def table(self) -> str:
        return table(["kind", *_COLUMNS], [[name, *row.values()] for name, row in self.counts().items()])

    def json(self) -> dict[str, Any]:
        return {"ok": self.ok, "kinds": self.counts(), "trials": [each.json() for each in self.results]}
