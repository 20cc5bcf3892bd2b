"""JSON text that a peer sent, to Python's values and back: what is nested too deep, or is no JSON, is a ProtocolError.

Pure. What the values may be is the next step's to say: ``trivmm.state.strict``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from trivmm.errors import ProtocolError, shown

__all__ = ["MAX_DEPTH", "dump_json", "is_too_deep", "load_json"]

MAX_DEPTH: Final = 32  # arrays and objects within each other; a saved state has 7. Python's own recursion ends at 1000
ESCAPE: Final = re.compile(rb"\\.", re.DOTALL)
BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
NO_BRACKETS: Final = bytes(each for each in range(256) if each not in b'"[]{}')


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number here")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999, which parse_constant does not see
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def is_too_deep(body: bytes) -> bool:
    """Whether arrays and objects are nested more than ``MAX_DEPTH`` deep, or as many were never closed.

    Such a body never reaches the parser, nor anything else that recurses: repr, a conversion, a copy. Works at the
    speed of bytes' own methods: strings are cut out, then the innermost brackets go, level by level.
    """
    bare = ESCAPE.sub(b"", body) if b"\\" in body else body
    rest = b"".join(bare.translate(BRACKETS, NO_BRACKETS).split(b'"')[::2])
    for _ in range(MAX_DEPTH):
        before, rest = rest, rest.replace(b"[]", b"")
        if len(rest) == len(before):
            break
    return b"[]" in rest or rest.count(b"[") > MAX_DEPTH  # a bracket too few or too many is the parser's to tell


def load_json(what: str, body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. :raises ProtocolError: when it is none; ``what`` names it."""
    if is_too_deep(body):
        raise ProtocolError(f"{what}: not JSON (nested more than {MAX_DEPTH} deep)")
    try:
        value = json.loads(
            body.decode("ascii"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except ValueError as error:
        raise ProtocolError(f"{what}: not JSON ({shown(str(error))})") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: not a JSON object but {shown(value)}")
    return value


def dump_json(value: dict[str, Any]) -> bytes:
    """ASCII JSON without spaces. :raises ValueError: / :raises TypeError: when the value is not JSON."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
