"""Cloud Hypervisor's option syntax: ``key=value,key=value`` strings, to the JSON of the API. Pure.

A value with commas is quoted or bracketed; sizes take ``K``, ``M``, ``G``, ``T``; toggles are ``on``, ``off``,
``true``, ``false``. Which keys an option has is a table (:data:`Keys`) of whoever has the option.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from trivmm.errors import ConfigError, shown
from trivmm.values import MAX_DIGITS

__all__ = [
    "Convert",
    "Keys",
    "as_text",
    "one_of",
    "parse_console",
    "parse_integer",
    "parse_list",
    "parse_object",
    "parse_pairs",
    "parse_toggle",
    "split_commas",
]

Convert: TypeAlias = Callable[[str, str], object]
"""From (option and key, as a message names them; text) to the JSON value. :raises ConfigError:"""
Keys: TypeAlias = Mapping[str, tuple[str, Convert]]
"""By the option's key: the JSON key, and what makes its value."""

CONSOLE_WORDS: Final = ("off", "null", "tty", "pty")
CONSOLE_PATHS: Final = ("file", "socket")


def split_commas(option: str, text: str) -> list[str]:
    """Split at commas outside of ``"…"`` and ``[…]``; quotes outside of brackets go.

    :raises ConfigError: they don't match up."""
    parts, current, depth, quoted = [], "", 0, False
    for char in text.strip():
        if char == '"':
            quoted = not quoted
            current += char if depth else ""
        elif char == "," and not quoted and depth == 0:
            parts.append(current)
            current = ""
        else:
            depth += 0 if quoted else (char == "[") - (char == "]")
            current += char
            if depth < 0:
                break
    if quoted or depth:
        raise ConfigError(option, text, "quotes or brackets do not match", "close what was opened")
    return [*parts, current]


def parse_pairs(option: str, text: str, known: Iterable[str], main: str = "") -> dict[str, str]:
    """``key=value`` pairs; ``main`` is the key that a lone value was probably meant for.

    :raises ConfigError: an unknown key (with the nearest known one), or one without value."""
    names = list(known)
    pairs: dict[str, str] = {}
    if not text.strip():
        return pairs
    for part in split_commas(option, text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals and key not in names and main and not pairs:
            raise ConfigError(option, part, "no key", f"give {main}={_one_line(part.strip())}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{option} {_one_line(key)}", value, "unknown key", hint)
        if not equals:
            raise ConfigError(f"{option} {key}", "", "no value", f"give {key}=…")
        if key in pairs:
            raise ConfigError(f"{option} {key}", value, "given twice", "give it once")
        pairs[key] = value.strip()
    return pairs


def _one_line(text: str) -> str:
    """A line break in it would make two lines of a message's one."""
    return shown(text)[1:-1]


def parse_integer(option: str, text: str) -> int:
    """:raises ConfigError:"""
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        raise ConfigError(option, text, "not a number", "give a whole number")
    return int(text)


def parse_toggle(option: str, text: str) -> bool:
    """:raises ConfigError:"""
    match text.lower():
        case "on" | "true":
            return True
        case "off" | "false":
            return False
    raise ConfigError(option, text, "neither on nor off", "give on or off")


def parse_list(option: str, text: str) -> list[str]:
    """``[a,b]``, or one without brackets; a text with commas is quoted. :raises ConfigError:"""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [each.strip() for each in split_commas(option, inner)] if inner else []


def as_text(option: str, text: str) -> str:
    return text


def one_of(*names: str) -> Convert:
    def convert(option: str, text: str) -> str:
        for name in names:
            if name.lower() == text.lower():
                return name
        raise ConfigError(option, text, "unknown", f"give {' or '.join(name.lower() for name in names)}")

    return convert


def parse_object(option: str, text: str, keys: Keys, main: str) -> dict[str, Any]:
    """JSON of ``key=value`` pairs; ``main`` as in :func:`parse_pairs`. :raises ConfigError:"""
    made: dict[str, Any] = {}
    for key, value in parse_pairs(option, text, keys, main).items():
        name, convert = keys[key]
        made[name] = convert(f"{option} {key}", value)
    return made


def parse_console(option: str, text: str, keys: Keys | None = None) -> dict[str, Any]:
    """``off``, ``null``, ``tty``, ``pty``, ``file=PATH`` or ``socket=PATH``, as ``--serial`` and ``--console`` take;
    beside it the pairs that ``keys`` knows. :raises ConfigError:"""
    made: dict[str, Any] = {}
    pairs = []
    for part in split_commas(option, text):
        key, equals, value = part.partition("=")
        if not (key in CONSOLE_WORDS and not equals) and not (key in CONSOLE_PATHS and value):
            pairs.append(part)
            continue
        if "mode" in made:
            raise ConfigError(option, text, "more than one mode", "give one")
        made["mode"] = key.capitalize()
        if value:
            made[key] = value
    if "mode" not in made:
        modes = ", ".join([*CONSOLE_WORDS, *(f"{key}=PATH" for key in CONSOLE_PATHS)])
        raise ConfigError(option, text, "no such mode", f"give one of {modes}")
    if pairs and keys is None:
        raise ConfigError(option, text, "more than a mode", f"leave {pairs[0]} out, or quote a path with commas")
    return made | parse_object(option, ",".join(f'"{part}"' for part in pairs), keys or {}, "")
