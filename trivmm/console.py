"""Finding text in what a guest prints: patterns, matches, and how far an owner has read.

Pure: the console is anything with a position (``total``) and a bounded ``tail``, such as ``trivmm.platform.serial``.
"""

from __future__ import annotations

import re
from typing import Protocol, TypeAlias

import attrs

from trivmm.errors import ConfigError

__all__ = ["ConsoleCursor", "ConsoleMatch", "ConsoleOutput", "ConsolePattern", "bytes_pattern"]

ConsolePattern: TypeAlias = "str | bytes | re.Pattern[str] | re.Pattern[bytes]"


class ConsoleOutput(Protocol):
    @property
    def total(self) -> int: ...

    def tail(self, since: int = 0) -> bytes: ...


@attrs.frozen
class ConsoleMatch:
    """``text``: all output from where the wait began up to the end of the match; ``match`` counts within it."""

    text: bytes
    match: re.Match[bytes]


@attrs.define(eq=False)
class ConsoleCursor:
    """How far one console has been read: ``at`` is a position in its output, in bytes from its start."""

    console: ConsoleOutput
    at: int = 0

    def find(self, pattern: re.Pattern[bytes], since: int) -> ConsoleMatch | None:
        """The first match at or after ``since``, as far as the tail reaches back; moves the cursor behind it."""
        text = self.console.tail(since)
        match = pattern.search(text)
        if match is None:
            return None
        start = self.console.total - len(text)  # later than ``since`` where the tail has lost what is between
        self.at = max(self.at, start + match.end())
        return ConsoleMatch(text[: match.end()], match)


def bytes_pattern(pattern: ConsolePattern) -> re.Pattern[bytes]:
    """What to search for in bytes: text and bytes as they are, a regular expression as bytes.

    :raises ConfigError: for a text expression that means something else there: with letters outside ASCII."""
    if isinstance(pattern, str):
        try:
            return re.compile(re.escape(pattern.encode()))
        except UnicodeEncodeError:
            raise ConfigError("pattern", pattern, "half a surrogate pair is no text", "give bytes") from None
    if isinstance(pattern, bytes):
        return re.compile(re.escape(pattern))
    if not isinstance(pattern, re.Pattern):
        raise ConfigError("pattern", pattern, "not a pattern", "give a str, bytes, or what re.compile gives")
    if isinstance(pattern.pattern, bytes):
        return re.compile(pattern.pattern, pattern.flags)
    try:
        return re.compile(pattern.pattern.encode("ascii"), pattern.flags & ~re.UNICODE)
    except (UnicodeEncodeError, re.error) as error:
        why = "a console prints bytes, and this expression is of other letters than ASCII"
        raise ConfigError("pattern", pattern.pattern, why, "compile it from bytes") from error
