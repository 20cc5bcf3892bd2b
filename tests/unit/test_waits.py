"""Reads the source and fails on a wait that nothing bounds.

A wait is an ``await`` (or ``async for``) of a call that can block on a guest, a peer, a thread, a device or another
task, and a blocking call of threading or the operating system. It is bounded when it stands inside one of our
deadlines or trio's timeouts *in the same function*, or when its function is on the list below, with the reason why
something else ends it. The list is exact: an entry that excuses nothing fails too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import trivmm

ROOT = Path(trivmm.__file__).parent

WAITS = {
    "accept",
    "connect",
    "receive",
    "receive_some",
    "recv",
    "recvmsg",
    "run_sync",
    "send",
    "send_all",
    "sendall",
    "sleep_forever",
    "wait",
    "wait_for_exit",
    "wait_output",
    "wait_readable",
    "wait_writable",
}
BLOCKING = {"acquire", "join", "poll", "select"}
BOUNDS = {"enter", "fail_after", "fail_at", "move_on_after", "move_on_at"}
EXCUSED: dict[str, str] = {}


def _called(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):
            return function.attr
        if isinstance(function, ast.Name):
            return function.id
    return None


class Finder(ast.NodeVisitor):
    """Collects ``file:function`` of every unbounded wait."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path: list[str] = []
        self.bounded = 0
        self.found: dict[str, list[int]] = {}

    def _note(self, node: ast.AST) -> None:
        if not self.bounded:
            place = f"{self.name}:{'.'.join(self.path)}"
            self.found.setdefault(place, []).append(getattr(node, "lineno", 0))

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.path.append(node.name)
        before, self.bounded = self.bounded, 0
        self.generic_visit(node)
        self.bounded = before
        self.path.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        bounds = sum(_called(item.context_expr) in BOUNDS for item in node.items)
        self.bounded += bounds
        self.generic_visit(node)
        self.bounded -= bounds

    visit_With = visit_AsyncWith = _with

    def visit_Await(self, node: ast.Await) -> None:
        if _called(node.value) in WAITS:
            self._note(node)
        self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._note(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if name in BLOCKING and not node.args and not any(word.arg == "timeout" for word in node.keywords):
            self._note(node)
        self.generic_visit(node)


def unbounded_waits() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        finder = Finder(str(path.relative_to(ROOT)))
        finder.visit(ast.parse(path.read_text(encoding="utf-8")))
        found |= finder.found
    return found


def test_every_wait_is_bounded_or_says_why() -> None:
    found = unbounded_waits()
    unknown = {place: lines for place, lines in found.items() if place not in EXCUSED}
    assert not unknown, f"unbounded waits: {unknown}"
    stale = [place for place in EXCUSED if place not in found]
    assert not stale, f"these excuses excuse nothing: {stale}"
    assert all(EXCUSED.values())


def test_the_finder_finds() -> None:
    source = """
async def bad(event):
    await event.wait()
async def good(event, deadlines):
    with deadlines.enter("pause", "why"):
        await event.wait()
def blocking(thread, lock):
    thread.join()
    lock.acquire(timeout=1)
"""
    finder = Finder("x.py")
    finder.visit(ast.parse(source))
    assert set(finder.found) == {"x.py:bad", "x.py:blocking"}
