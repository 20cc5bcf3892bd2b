"""Strict reading of one JSON object that a peer sent, field by field."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any, Final

from trivmm.errors import ProtocolError

__all__ = ["Fields"]

SHOWN: Final = 80  # characters of a hostile value that an error message repeats


def _show(value: object) -> str:
    said = repr(value)
    return said if len(said) <= SHOWN else said[:SHOWN] + "…"


class Fields:
    """The fields of one JSON object, taken one by one; :meth:`end` complains about those left over."""

    def __init__(self, what: str, value: object) -> None:
        if not isinstance(value, dict):
            raise ProtocolError(f"{what}: not an object but {_show(value)}")
        self._what = what
        self._left: dict[str, Any] = dict(value)

    def _take(self, name: str) -> Any:
        try:
            return self._left.pop(name)
        except KeyError:
            raise ProtocolError(f"{self._what}: field {name!r} is missing") from None

    def _wrong(self, name: str, value: object, wanted: str) -> ProtocolError:
        return ProtocolError(f"{self._what}: {name} is {_show(value)}, not {wanted}")

    def anything(self, name: str) -> Any:
        """A value that the caller checks."""
        return self._take(name)

    def text(self, name: str, limit: int) -> str:
        """A string of at most ``limit`` characters."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) > limit:
            raise self._wrong(name, value, f"a string of at most {limit} characters")
        return value

    def line(self, name: str, limit: int) -> str:
        """A text that people read: line breaks and terminal controls in it come out escaped, so it stays one line."""
        text = self.text(name, limit)
        return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)

    def maybe_text(self, name: str, limit: int) -> str | None:
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return None
        return self.text(name, limit)

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, high: float) -> float:
        """A finite number from 0 to ``high``."""
        value = self._take(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= high:
            raise self._wrong(name, value, f"a number from 0 to {high:g}")
        if not math.isfinite(value):  # pragma: no cover - load_json keeps these out
            raise self._wrong(name, value, "finite")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def objects(self, name: str, limit: int) -> dict[str, dict[str, Any]]:
        """An object of at most ``limit`` objects."""
        value = self.object(name)
        if len(value) > limit or not all(isinstance(each, dict) for each in value.values()):
            raise self._wrong(name, value, f"an object of at most {limit} objects")
        return value

    def array(self, name: str, limit: int) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) > limit:
            raise self._wrong(name, value, f"an array of at most {limit} elements")
        return value

    def blobs(self, name: str, limit: int, bytes_limit: int) -> dict[str, bytes]:
        """An object of at most ``limit`` base64 strings of at most ``bytes_limit`` bytes each."""
        found: dict[str, bytes] = {}
        for key, value in self.object(name).items():
            if len(found) == limit or not isinstance(value, str) or len(value) > bytes_limit * 4 // 3 + 4:
                raise self._wrong(f"{name}.{_show(key)}", value, f"one of {limit} base64 strings")
            try:
                found[key] = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError) as error:
                raise self._wrong(f"{name}.{_show(key)}", value, "base64") from error
        return found

    def end(self) -> None:
        """:raises ProtocolError: when a field was not asked for."""
        if self._left:
            raise ProtocolError(f"{self._what}: unknown field {_show(next(iter(self._left)))}")
