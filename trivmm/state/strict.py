"""The one strict converter: JSON from a peer or a client to frozen classes and back. Nothing is bent until it fits.

A class says what its fields may be by their types (``trivmm.values``): ``U16``, ``Annotated[bytes, AtMost(4096)]``, an
enum, another class. :func:`structure` builds it or refuses the value with the path of the field at fault, what stood
there (cut to a line) and what belongs there. A float is no integer, a boolean no number, a string no list; keys that
nobody knows and keys that are missing are refused; an array or object is left at its first mistake, so that a hostile
one costs no more than it brought. What values *mean* together is checked by whoever takes a class over.

Pure. ``trivmm.control.schema`` has a converter of the same hooks with its own words for API clients.
"""

from __future__ import annotations

import base64
import binascii
import enum
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, TypeAlias, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn

from trivmm.errors import ConfigError, ProtocolError, shown
from trivmm.values import AtMost, Exactly, Within, not_boolean, not_integer, not_text

__all__ = [
    "Unfit",
    "first_fault",
    "make_converter",
    "prepare",
    "refused",
    "structure",
    "unstructure",
]

T = TypeVar("T")
Check: TypeAlias = Callable[[object], "str | None"]
"""None for a value that fits, else what is wanted instead (``trivmm.values``)."""

MAX_ELEMENTS: Final = 1 << 12  # of an array or object whose class names no limit of its own
MAX_KEY: Final = 80  # characters of a peer's key that a path repeats


class Unfit(ValueError):
    """A value that is not what its place wants. :ivar value: what it is. :ivar wanted: what belongs there."""

    def __init__(self, value: object, wanted: str) -> None:
        self.value = value
        self.wanted = wanted
        super().__init__(f"{shown(value)} is not {wanted}")


def refused(where: str, value: object, wanted: str) -> ProtocolError:
    """The error for a field of saved state that can't be; ``where`` is its path."""
    return ProtocolError(f"{where} is {shown(value)}, not {wanted}")


# --- what a place wants --------------------------------------------------------------------------------------


def not_json_text(value: object) -> str | None:
    """File names that are not Unicode travel as surrogate escapes; any other lone surrogate is no text."""
    wanted = not_text(value)
    if wanted is None:
        try:
            os.fsencode(str(value))
        except UnicodeEncodeError:
            wanted = "text"
    return wanted


def not_number(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return "a number that is not negative"
    return None


def make_converter(text: Check = not_json_text, number: Check = not_number) -> cattrs.Converter:
    """``text`` and ``number`` say what a plain ``str`` and ``float`` may be; a plain ``int`` has 64 bits, unsigned."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, check in ((str, text), (float, number), (int, not_integer), (bool, not_boolean)):
        converter.register_structure_hook(kind, _checked(check))
    converter.register_structure_hook_func(_is(bytes), _structure_bytes)
    converter.register_structure_hook_func(_is(int, float, str, bounded=True), _bounded(text))
    converter.register_structure_hook_func(_is(enum.Enum), _structure_enum)
    converter.register_structure_hook_factory(_is(tuple), lambda kind: _array_hook(kind, converter))
    converter.register_structure_hook_factory(_is(dict), lambda kind: _table_hook(kind, converter))
    converter.register_structure_hook_factory(attrs.has, lambda cls: _object_hook(cls, converter))
    converter.register_unstructure_hook(bytes, lambda value: base64.b64encode(value).decode("ascii"))
    return converter


def _is(*classes: type, bounded: bool = False) -> Callable[[Any], bool]:
    """Whether a type is one of these, with a limit or without; with ``bounded``, only with one."""

    def fits(kind: Any) -> bool:
        bare = _bare(kind)
        bare = get_origin(bare) or bare
        return isinstance(bare, type) and issubclass(bare, classes) and (bare is not kind or not bounded)

    return fits


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _limit(kind: Any) -> Any:
    found = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((each for each in found if isinstance(each, Within | AtMost | Exactly)), None)


def _checked(check: Check) -> Callable[[Any, Any], Any]:
    def structure_checked(value: Any, _: Any) -> Any:
        wanted = check(value)
        if wanted is not None:
            raise Unfit(value, wanted)
        return value

    return structure_checked


def _bounded(text: Check) -> Callable[[Any, Any], Any]:
    def structure_bounded(value: Any, kind: Any) -> Any:
        limit, bare = _limit(kind), _bare(kind)
        if bare is str:
            if text(value) is not None or len(value) > limit.limit:
                raise Unfit(value, f"text of at most {limit.limit} characters")
            return value
        numbers, name = (int, "an integer") if bare is int else (int | float, "a number")
        if isinstance(value, bool) or not isinstance(value, numbers) or not limit.low <= value <= limit.high:
            raise Unfit(value, f"{name} from {limit.low} to {limit.high}")
        return bare(value)

    return structure_bounded


def _structure_bytes(value: Any, kind: Any) -> bytes:
    """Bytes are base64 in JSON. What is too long is not decoded."""
    limit = _limit(kind)
    most = limit.length if isinstance(limit, Exactly) else limit.limit
    wanted = f"{'' if isinstance(limit, Exactly) else 'at most '}{most} bytes in base64"
    if not isinstance(value, str) or len(value) > most * 4 // 3 + 4:
        raise Unfit(value, wanted)
    try:
        made = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character that is not ASCII
        raise Unfit(value, wanted) from None
    if len(made) > most or (isinstance(limit, Exactly) and len(made) != most):
        raise Unfit(value, wanted)
    return made


def _structure_enum(value: Any, kind: Any) -> Any:
    for each in kind:
        if type(value) is type(each.value) and value == each.value:
            return each
    raise Unfit(value, f"one of {', '.join(str(each.value) for each in kind)}")


def _object_hook(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    build = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True)

    def structure_object(value: Any, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise Unfit(value, "an object")
        return build(value, kind)

    return structure_object


def _array_hook(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """``tuple[X, ...]``, or so many elements, each of its kind."""
    kinds = get_args(_bare(kind))
    alike = len(kinds) == 2 and kinds[1] is Ellipsis
    limit = _limit(kind)
    most = MAX_ELEMENTS if limit is None else limit.limit
    hooks = [(each, converter.get_structure_hook(each)) for each in kinds if each is not Ellipsis]

    def structure_array(value: Any, _: Any) -> Any:
        if not isinstance(value, list) or not (len(value) <= most if alike else len(value) == len(hooks)):
            raise Unfit(value, f"an array of {f'at most {most}' if alike else len(hooks)} elements")
        made = []
        for place, each in enumerate(value):
            element, hook = hooks[0] if alike else hooks[place]
            with _inside(place, kind):
                made.append(hook(each, element))
        return tuple(made)

    return structure_array


def _table_hook(kind: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """``dict[str, X]``."""
    key_kind, element = get_args(_bare(kind))
    limit = _limit(kind)
    most = MAX_ELEMENTS if limit is None else limit.limit
    name_hook, hook = converter.get_structure_hook(key_kind), converter.get_structure_hook(element)

    def structure_table(value: Any, _: Any) -> Any:
        if not isinstance(value, dict) or len(value) > most:
            raise Unfit(value, f"an object of at most {most} fields")
        made = {}
        for name, each in value.items():
            with _inside(name, kind):
                made[name_hook(name, key_kind)] = hook(each, element)
        return made

    return structure_table


@contextmanager
def _inside(place: int | str, kind: Any) -> Iterator[None]:
    """Says where in an array or object a mistake is, as cattrs says it of a class's fields; at the first one."""
    try:
        yield
    except Exception as error:
        error.__notes__ = [*getattr(error, "__notes__", ()), IterableValidationNote(str(place), place, kind)]
        raise IterableValidationError("in an array or object", [error], kind) from None


# --- what was at fault ---------------------------------------------------------------------------------------


def first_fault(error: Exception, path: str = "") -> tuple[str, Exception]:
    """The path of the first mistake in a tree of them, from ``path`` on, and the mistake itself."""
    found: BaseException = error
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
        for note in getattr(found, "__notes__", ()):
            if isinstance(note, IterableValidationNote) and isinstance(note.index, int):
                path = f"{path}[{note.index}]"
            elif isinstance(note, AttributeValidationNote | IterableValidationNote):
                step = note.name if isinstance(note, AttributeValidationNote) else _cut(str(note.index))
                path = f"{path}.{step}" if path else step
    assert isinstance(found, Exception)
    return path, found


def _cut(key: str) -> str:
    """A key that a peer chose, as a path shows it."""
    return key if key.isprintable() and len(key) <= MAX_KEY else f"{shown(key[:MAX_KEY])}…"


CONVERTER: Final = make_converter()


def prepare(cls: type) -> None:
    """Build what a class and those in it are structured and unstructured with, a few ms each that the first use would
    take: before somebody's clock runs."""
    CONVERTER.get_structure_hook(cls)
    CONVERTER.get_unstructure_hook(cls)


def structure(where: str, value: object, cls: type[T]) -> T:
    """A ``cls`` from JSON that a peer sent; ``where`` is its name.

    :raises ProtocolError: naming the field that is missing, unknown, of a wrong type or out of bounds.
    :raises ConfigError: which the class itself raised."""
    try:
        return CONVERTER.structure(value, cls)
    except (BaseValidationError, Unfit) as error:
        path, fault = first_fault(error, where)
    if isinstance(fault, ConfigError):
        raise fault
    if isinstance(fault, Unfit):
        raise refused(path, fault.value, fault.wanted)
    if isinstance(fault, ForbiddenExtraKeysError):
        raise ProtocolError(f"{path}: unknown field {shown(min(fault.extra_fields))}")
    if isinstance(fault, KeyError):
        raise ProtocolError(f"{path} is missing")
    raise ProtocolError(f"{path}: {str(fault)[:MAX_KEY]}")


def unstructure(value: object) -> Any:
    """JSON that :func:`structure` takes."""
    return CONVERTER.unstructure(value)
