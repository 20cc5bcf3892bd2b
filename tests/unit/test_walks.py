"""The walks of docs/architecture.md name functions: each is where it is said to be, and the walks stay short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALKS = re.findall(r"<!-- walk -->\n(.*?)<!-- /walk -->", TEXT, re.DOTALL)
HOP = re.compile(r"^(\d+)\. `([\w/.]+)` `([\w.]+)`: \S", re.MULTILINE)
LONGEST = (13, 15, 13)


def defined(path: Path) -> set[str]:
    """Functions and methods of a Python file, functions of a C file that others can call or that it has for itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".c":
        return set(re.findall(r"^[a-z].*?\b(\w+)\([^;]*\n\{", text, re.MULTILINE))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_there_are_three_walks_of_few_hops() -> None:
    assert len(WALKS) == len(LONGEST)
    for walk, limit in zip(WALKS, LONGEST, strict=True):
        hops = HOP.findall(walk)
        assert len(hops) == len(walk.strip().splitlines()), walk
        assert [int(number) for number, _, _ in hops] == list(range(1, len(hops) + 1))
        assert len(hops) <= limit


@pytest.mark.parametrize("hop", [hop[1:] for walk in WALKS for hop in HOP.findall(walk)], ids=" ".join)
def test_each_hop_is_there(hop: tuple[str, str]) -> None:
    file, name = hop
    path = ROOT / file if file.startswith("ffi/") else ROOT / "trivmm" / file
    assert name in defined(path), f"docs/architecture.md names {name} in {file}, which has no such function"
