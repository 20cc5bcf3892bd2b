"""What the benchmarks share: medians, and one way to show results (a table on a terminal, JSON with ``--json``)."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

import attrs
from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "median", "parser_for", "show"]


@attrs.frozen
class Figure:
    """One line of results. ``aim`` is the least value that is good enough."""

    name: str
    value: float
    unit: str = ""
    aim: float | None = None
    note: str = ""


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def parser_for(doc: str | None, *, runs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=runs, help=f"alternating runs (default {runs})")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def show(title: str, figures: Sequence[Figure], *, as_json: bool) -> None:
    """Ratios first: they are what may be compared from day to day; the rest says how they came about."""
    ordered = sorted(figures, key=lambda each: each.aim is None)
    if as_json:
        print(json.dumps({"benchmark": title, "figures": [attrs.asdict(each) for each in ordered]}, indent=1))
        return
    table = Table(title=title, title_justify="left")
    for column in ("what", "median", "aim", "note"):
        table.add_column(column, justify="right" if column in ("median", "aim") else "left")
    for each in ordered:
        met = each.aim is None or each.value >= each.aim
        value = f"{each.value:,.2f} {each.unit}".rstrip()
        aim = "" if each.aim is None else f"≥ {each.aim:g}" + ("" if met else " (missed)")
        table.add_row(each.name, value, aim, each.note)
    Console().print(table)
