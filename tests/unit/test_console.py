"""Patterns and the cursor of a console: what matches, what comes with it, and where the next search begins."""

from __future__ import annotations

import re

import attrs
import pytest

from trivmm.console import ConsoleCursor, bytes_pattern
from trivmm.errors import ConfigError


@attrs.define
class Printed:
    """A console that keeps the last ``keep`` bytes."""

    output: bytes
    keep: int = 1 << 20

    @property
    def total(self) -> int:
        return len(self.output)

    def tail(self, since: int = 0) -> bytes:
        return self.output[max(since, len(self.output) - self.keep) :]


@pytest.mark.parametrize(
    "pattern",
    ["a.b", b"a.b", re.compile(r"a\.b"), re.compile(rb"a\.b"), re.compile("A[.]B", re.IGNORECASE)],
)
def test_text_bytes_and_expressions_find_bytes(pattern: str) -> None:
    cursor = ConsoleCursor(Printed(b"axb a.b\n"))
    found = cursor.find(bytes_pattern(pattern), 0)
    assert found is not None
    assert (found.text, found.match.group(), found.match.span()) == (b"axb a.b", b"a.b", (4, 7))
    assert cursor.at == 7


def test_text_is_utf_8() -> None:
    assert bytes_pattern("naïve?").search("so naïve?".encode()) is not None


@pytest.mark.parametrize("pattern", [re.compile("[é]"), re.compile(r"\u00e9"), 7])
def test_what_cannot_be_searched_for_in_bytes_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"pattern = .*; (compile it from bytes|give a str, bytes)"):
        bytes_pattern(pattern)


def test_the_next_search_begins_behind_the_match() -> None:
    console = Printed(b"t=1;t=2;")
    cursor, number = ConsoleCursor(console), bytes_pattern(re.compile(rb"t=(\d+);"))
    seen = []
    while (found := cursor.find(number, cursor.at)) is not None:
        seen.append((found.text, found.match[1]))
    assert seen == [(b"t=1;", b"1"), (b"t=2;", b"2")]
    console.output += b" and t=33;"
    found = cursor.find(number, cursor.at)
    assert found is not None
    assert (found.text, found.match[1]) == (b" and t=33;", b"33")
    assert cursor.at == console.total


def test_a_search_reaches_back_as_far_as_the_tail() -> None:
    console = Printed(b"gone " * 10 + b"kept end", keep=8)
    cursor = ConsoleCursor(console)
    assert cursor.find(bytes_pattern("gone"), 0) is None
    found = cursor.find(bytes_pattern("kept"), 0)
    assert found is not None
    assert found.text == b"kept"
    assert cursor.at == 54


def test_a_search_from_further_back_does_not_take_the_cursor_back() -> None:
    cursor = ConsoleCursor(Printed(b"first second"))
    assert cursor.find(bytes_pattern("second"), 0)
    assert cursor.find(bytes_pattern("first"), 0)
    assert cursor.at == 12
