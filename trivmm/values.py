"""What one value may be, whoever gives it: a JSON body, an option string or a Python call. Pure.

The ``not_…`` functions give None for a value that fits, else what is wanted instead, for a message's remedy. The limits
in ``Annotated[…]`` are what a frozen class says of its fields; whoever builds it from JSON keeps them
(``trivmm.state.strict``).
"""

from __future__ import annotations

from typing import Annotated, Final

import attrs

from trivmm.errors import ConfigError

__all__ = [
    "U8",
    "U16",
    "U32",
    "U64",
    "AtMost",
    "Exactly",
    "Name",
    "Within",
    "not_boolean",
    "not_integer",
    "not_text",
    "parse_size",
]

MAX_TEXT: Final = 1 << 16  # a kernel takes 2 KiB of command line; no path or id is longer than this
MAX_INTEGER: Final = (1 << 64) - 1  # the contract's integers are u64 at most
SUFFIXES: Final = {"K": 10, "M": 20, "G": 30, "T": 40}
MAX_DIGITS: Final = 19  # of a number in text: 2^63 has 19


@attrs.frozen
class Within:
    """A number from ``low`` to ``high``, both included."""

    low: int
    high: float


@attrs.frozen
class AtMost:
    """So many characters of a string, bytes of bytes, elements of an array or object."""

    limit: int


@attrs.frozen
class Exactly:
    """So many bytes."""

    length: int


U8 = Annotated[int, Within(0, (1 << 8) - 1)]
U16 = Annotated[int, Within(0, (1 << 16) - 1)]
U32 = Annotated[int, Within(0, (1 << 32) - 1)]
U64 = Annotated[int, Within(0, (1 << 64) - 1)]
Name = Annotated[str, AtMost(256)]  # of a device, a kind, a part: short words


def not_text(value: object) -> str | None:
    """File names need not be Unicode, so lone surrogates are text here; what comes as JSON has none."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
        return f"text of at most {MAX_TEXT} characters without a zero"
    return None


def not_integer(value: object) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        return "an integer from 0 to 2^64-1"
    return None


def not_boolean(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def parse_size(field: str, text: str) -> int:
    """Bytes of ``512M``: a whole number, or one with K, M, G or T. :raises ConfigError: naming ``field``."""
    digits, shift = text.strip(), 0
    if digits[-1:] in SUFFIXES:
        digits, shift = digits[:-1], SUFFIXES[digits[-1]]
    if not digits.isascii() or not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise ConfigError(field, text, "not a size", "give bytes, or a number with K, M, G or T, such as 512M")
    return int(digits) << shift
