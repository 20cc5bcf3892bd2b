"""The strict converter: what fits comes back equal; everything else is one line that names the field."""

from __future__ import annotations

import copy
import enum
import json
from typing import Annotated, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.errors import ConfigError, ProtocolError
from trivmm.state.strict import structure, unstructure
from trivmm.values import U8, U16, AtMost, Exactly, Name, Within


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@attrs.frozen
class Inner:
    byte: U8
    blob: Annotated[bytes, AtMost(4)] = b""
    colour: Colour = Colour.RED


def _odd(instance: object, attribute: object, value: int) -> None:
    if value % 2 == 0:
        raise ConfigError("odd", value, "even", "give an odd one")


@attrs.frozen
class Outer:
    name: Name
    inner: tuple[Inner, ...]
    pair: tuple[U8, U16]
    few: Annotated[tuple[U8, ...], AtMost(3)]
    table: Annotated[dict[Name, Inner], AtMost(2)]
    share: Annotated[float, Within(0, 10)]
    maybe: Colour | None
    word: Annotated[bytes, Exactly(2)]
    free: dict[str, Any]
    flag: bool
    plain: int
    odd: int = attrs.field(default=1, validator=_odd)


GOOD: dict[str, Any] = {
    "name": "n",
    "inner": [{"byte": 1, "blob": "AAA=", "colour": "green"}, {"byte": 2, "blob": "", "colour": "red"}],
    "pair": [1, 2],
    "few": [0, 255],
    "table": {"q": {"byte": 1, "blob": "", "colour": "red"}},
    "share": 1.5,
    "maybe": None,
    "word": "AAE=",
    "free": {"z": [1, {}]},
    "flag": True,
    "plain": 1 << 63,
    "odd": 3,
}


def test_what_fits_comes_back() -> None:
    made = structure("thing", GOOD, Outer)
    assert made.inner[0] == Inner(1, b"\0\0", Colour.GREEN)
    assert (made.pair, made.word, made.maybe) == ((1, 2), b"\0\1", None)
    assert json.loads(json.dumps(unstructure(made))) == GOOD
    assert structure("thing", GOOD | {"share": 2, "maybe": "red"}, Outer).maybe is Colour.RED
    left_out = {key: value for key, value in GOOD.items() if key != "odd"}
    assert structure("thing", left_out, Outer).odd == 1


def changed(path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    made = copy.deepcopy(GOOD)
    at: Any = made
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = new
    return made


@pytest.mark.parametrize(
    ("path", "new", "says"),
    [
        (("name",), 5, "thing.name is 5, not text of at most 256 characters"),
        (("name",), "x" * 257, f'thing.name is "{"x" * 255}…, not text of at most 256 characters'),
        (("name",), "\ud800", r'thing.name is "\ud800", not text of at most 256 characters'),
        (("name",), "a\0", r'thing.name is "a\u0000", not text of at most 256 characters'),
        (("inner",), "abc", 'thing.inner is "abc", not an array of at most 4096 elements'),
        (("inner",), {}, "thing.inner is {}, not an array of at most 4096 elements"),
        (("inner",), [{}] * 4097, None),
        (("inner", 1), [], "thing.inner[1] is [], not an object"),
        (("inner", 1), "byte", 'thing.inner[1] is "byte", not an object'),
        (("inner", 1), {"byte": 1, "more": 2}, 'thing.inner[1]: unknown field "more"'),
        (("inner", 1), {}, "thing.inner[1].byte is missing"),
        (("inner", 1, "byte"), 1.0, "thing.inner[1].byte is 1.0, not an integer from 0 to 255"),
        (("inner", 1, "byte"), True, "thing.inner[1].byte is true, not an integer from 0 to 255"),
        (("inner", 1, "byte"), "1", 'thing.inner[1].byte is "1", not an integer from 0 to 255'),
        (("inner", 1, "byte"), 256, "thing.inner[1].byte is 256, not an integer from 0 to 255"),
        (("inner", 1, "byte"), None, "thing.inner[1].byte is null, not an integer from 0 to 255"),
        (("inner", 0, "blob"), "é", 'thing.inner[0].blob is "é", not at most 4 bytes in base64'),
        (("inner", 0, "blob"), "AAA", 'thing.inner[0].blob is "AAA", not at most 4 bytes in base64'),
        (("inner", 0, "blob"), "AAAAAAA=", 'thing.inner[0].blob is "AAAAAAA=", not at most 4 bytes in base64'),
        (("inner", 0, "blob"), "A" * 1000, None),
        (("word",), "AAAA", 'thing.word is "AAAA", not 2 bytes in base64'),
        (("inner", 0, "colour"), "blue", 'thing.inner[0].colour is "blue", not one of red, green'),
        (("inner", 0, "colour"), ["red"], 'thing.inner[0].colour is ["red"], not one of red, green'),
        (("maybe",), 0, "thing.maybe is 0, not one of red, green"),
        (("pair",), [1], "thing.pair is [1], not an array of 2 elements"),
        (("pair", 1), 1 << 16, "thing.pair[1] is 65536, not an integer from 0 to 65535"),
        (("few",), [1] * 4, "thing.few is [1, 1, 1, 1], not an array of at most 3 elements"),
        (("few",), [1, -1, None], "thing.few[1] is -1, not an integer from 0 to 255"),
        (("table",), [], "thing.table is [], not an object of at most 2 fields"),
        (("table",), {key: {"byte": 1} for key in "abc"}, None),
        (("table", "q", "byte"), -1, "thing.table.q.byte is -1, not an integer from 0 to 255"),
        (("table", "x\n" * 100), 0, None),
        (("share",), True, "thing.share is true, not a number from 0 to 10"),
        (("share",), 10.5, "thing.share is 10.5, not a number from 0 to 10"),
        (("share",), float("inf"), "thing.share is Infinity, not a number from 0 to 10"),
        (("free",), 5, "thing.free is 5, not an object of at most 4096 fields"),
        (("flag",), 1, "thing.flag is 1, not true or false"),
        (("plain",), -1, "thing.plain is -1, not an integer from 0 to 2^64-1"),
        (("plain",), 1 << 64, None),
        (("k" * 10_000,), 5, None),
    ],
)
def test_what_does_not_fit_is_named(path: tuple[Any, ...], new: Any, says: str | None) -> None:
    with pytest.raises(ProtocolError) as caught:
        structure("thing", changed(path, new), Outer)
    told = str(caught.value)
    assert told.startswith("thing")
    assert len(told) < 700
    assert told.isprintable()
    if says is not None:
        assert told == says


@pytest.mark.parametrize("value", [None, 5, [], "name", [GOOD]])
def test_what_is_no_object_at_all(value: Any) -> None:
    with pytest.raises(ProtocolError, match=r"^thing is .*, not an object$"):
        structure("thing", value, Outer)


def test_what_a_class_says_of_itself_stays_its_own() -> None:
    with pytest.raises(ConfigError, match="odd = 2: even; give an odd one"):
        structure("thing", GOOD | {"odd": 2}, Outer)


def test_a_long_array_costs_no_more_than_its_first_mistake() -> None:
    looked_at = []

    class Watched(list[Any]):
        def __iter__(self) -> Any:
            for each in list.__iter__(self):
                looked_at.append(each)
                yield each

    with pytest.raises(ProtocolError, match=r"inner\[0\]"):
        structure("thing", GOOD | {"inner": Watched([None] * 4096)}, Outer)
    assert len(looked_at) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "byte", "blob"]), inner),
    max_leaves=12,
)


@given(st.sampled_from(list(GOOD)), JSON)
def test_fuzzed_values_give_the_class_or_a_protocol_error(field: str, value: Any) -> None:
    try:
        made = structure("thing", GOOD | {field: value}, Outer)
    except (ProtocolError, ConfigError) as error:
        assert len(str(error)) < 700  # noqa: PT017 - there may be none
    else:
        assert structure("thing", json.loads(json.dumps(unstructure(made))), Outer) == made
