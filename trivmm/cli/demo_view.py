"""What the demo shows: each migration while it happens, and the closing table."""

from __future__ import annotations

import statistics
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import attrs
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from trivmm.cli.demo import DemoOptions
    from trivmm.guest import ProbeReport

__all__ = ["DemoView", "MoveRow"]

BARS: Final = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """One block a value, scaled to the largest."""
    top = max(values, default=0) or 1
    return "".join(BARS[min(len(BARS) - 1, int(value / top * (len(BARS) - 1)))] for value in values)


@attrs.define(eq=False)
class MoveRow:
    """One migration, as the table shows it. Rates are activations per second, by the VMM's own counters."""

    number: int
    source: str
    target: str
    transport: str
    rate_before: float
    activations: int = 0
    watched_s: float = 0.0
    rounds: int = 0
    bytes_sent: int = 0
    downtime_ms: float | None = None
    attempts: int = 0
    errors: int = 0

    @property
    def rate_during(self) -> float | None:
        return self.activations / self.watched_s if self.watched_s >= 0.1 else None

    def take(self, progress: dict[str, Any]) -> None:
        self.rounds = int(progress.get("round", 0))
        self.bytes_sent = int(progress["memory_transmission_info"]["memory_bytes_transmitted"])
        self.attempts = int(progress.get("attempts", 0))
        self.downtime_ms = progress.get("downtime_ms")


class DemoView:
    """A live picture on a terminal, plain lines elsewhere; nothing but the result with ``--json``."""

    def __init__(self, backend: str, options: DemoOptions) -> None:
        self.backend = backend
        self.options = options
        self.rows: list[MoveRow] = []
        self._console = Console(stderr=options.as_json)
        self._dirty: list[float] = []
        self._live: Live | None = None
        self._drawn = sys.stdout.isatty() and not options.as_json

    def __enter__(self) -> DemoView:
        where = "under /dev/kvm" if self.backend == "kvm" else f"on the {self.backend} back end (no usable /dev/kvm)"
        self._console.print(f"TriVMM demo: the probe guest runs {where} and moves {self.options.moves} times.")
        if self._drawn:
            self._live = Live(Text("booting the probe guest …"), console=self._console, refresh_per_second=10)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.__exit__(kind, error, trace)
            self._live = None

    def progress(self, row: MoveRow, progress: dict[str, Any]) -> None:
        row.take(progress)
        if self._live is None:
            return
        memory = progress["memory_transmission_info"]
        dirty = int(memory["memory_pages_4k_remaining_iteration"])
        self._dirty = [*self._dirty[-59:], float(dirty)]
        total = max(int(memory["memory_bytes_total"]) >> 12, 1)
        grid = Table.grid(padding=(0, 2))
        grid.add_row("move", f"{row.number} of {self.options.moves}: {row.source} → {row.target} over {row.transport}")
        grid.add_row("phase", Text(str(progress.get("phase", "")), style="bold cyan"))
        grid.add_row("round", f"{row.rounds}, {row.bytes_sent / (1 << 20):.1f} MiB sent")
        grid.add_row("dirty", f"{dirty} pages  {sparkline(self._dirty)}")
        grid.add_row("activations", f"{row.activations} while it moves")
        if row.downtime_ms is not None:
            grid.add_row("downtime", f"{row.downtime_ms:.1f} ms of {self.options.downtime_ms}")
        done = total - min(dirty, total)
        self._live.update(Group(self._table(), grid, ProgressBar(total=total, completed=done, width=60)))

    def moved(self, row: MoveRow) -> None:
        self.rows.append(row)
        self._dirty = []
        if self._live is None and not self.options.as_json:
            self._console.print(
                f"move {row.number}: {row.source} → {row.target} over {row.transport}, {row.rounds} rounds, "
                f"{row.bytes_sent / (1 << 20):.1f} MiB, downtime {_ms(row.downtime_ms)}, "
                f"{row.activations} activations while it moved",
                soft_wrap=True,
                highlight=False,
            )

    def _table(self) -> Table:
        table = Table(title=f"live migrations on {self.backend}", title_justify="left")
        for name in ("#", "move", "over", "rounds", "MiB", "downtime", "act/s", "moving", "ratio", "lost"):
            table.add_column(name, justify="left" if name in ("move", "over") else "right", no_wrap=True)
        for row in self.rows:
            during = row.rate_during
            ratio = "–" if during is None or not row.rate_before else f"{during / row.rate_before:.2f}"
            table.add_row(
                str(row.number),
                f"{row.source}→{row.target}",
                row.transport,
                str(row.rounds),
                f"{row.bytes_sent / (1 << 20):.0f}",
                _ms(row.downtime_ms),
                f"{row.rate_before:.1f}",
                "–" if during is None else f"{during:.1f}",
                ratio,
                str(row.errors),
            )
        return table

    def summary(self, report: ProbeReport) -> dict[str, Any]:
        """The result as JSON-able data; ``ok`` is the verdict."""
        downtimes = [row.downtime_ms for row in self.rows if row.downtime_ms is not None]
        ratios = [
            row.rate_during / row.rate_before for row in self.rows if row.rate_during is not None and row.rate_before
        ]
        return {
            "backend": self.backend,
            "moves": [attrs.asdict(row) for row in self.rows],
            "downtime_ms": {
                "limit": self.options.downtime_ms,
                "median": statistics.median(downtimes) if downtimes else None,
                "worst": max(downtimes, default=None),
            },
            "activation_ratio": statistics.median(ratios) if ratios else None,
            "guest": {
                "pages_checked": report.checked,
                "errors": report.errors,
                "stuck": report.stuck,
                "activations": report.rng_act + report.blk_act,
                "longest_gap_ms": report.gap_ms,
            },
            "ok": len(self.rows) == self.options.moves and report.errors == 0 and report.stuck == 0,
        }

    def print_table(self, summary: dict[str, Any]) -> None:
        guest, downtime = summary["guest"], summary["downtime_ms"]
        self._console.print(self._table())
        ratio = summary["activation_ratio"]
        lines = [
            ("back end", self.backend),
            (
                "downtime",
                f"median {_ms(downtime['median'])}, worst {_ms(downtime['worst'])}, limit {downtime['limit']} ms",
            ),
            (
                "activations",
                f"{guest['activations']} in the guest's life; rate while moving / before: "
                f"{'–' if ratio is None else f'{ratio:.2f}'}",
            ),
            (
                "integrity",
                f"{guest['pages_checked']} page checks, {guest['errors']} lost or stale, "
                f"{guest['stuck']} requests stuck: the guest's own word",
            ),
            ("verdict", "every move completed, nothing was lost" if summary["ok"] else "FAILED"),
        ]
        for name, text in lines:
            self._console.print(
                f"{name:>12}  {text}", style="bold" if name == "verdict" else None, highlight=False, soft_wrap=True
            )


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"
