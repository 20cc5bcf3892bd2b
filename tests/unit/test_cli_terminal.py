"""The escape keys, however what is typed is cut up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm.cli.terminal import Escape


@pytest.mark.parametrize(
    ("typed", "keys", "leaves"),
    [
        (b"", b"", False),
        (b"plain \x03\x1b[A", b"plain \x03\x1b[A", False),
        (b"\x01x", b"", True),
        (b"\x01X", b"", True),
        (b"ls\r\x01xrm -rf\r", b"ls\r", True),
        (b"\x01\x01", b"\x01", False),
        (b"\x01\x01x", b"\x01x", False),
        (b"\x01\x01\x01x", b"\x01", True),
        (b"\x01b", b"\x01b", False),
        (b"a\x01", b"a", False),
        (b"x", b"x", False),
    ],
)
def test_keys(typed: bytes, keys: bytes, leaves: bool) -> None:
    assert Escape().take(typed) == (keys, leaves)
    escape, got = Escape(), b""
    for at in range(len(typed)):
        piece, left = escape.take(typed[at : at + 1])
        got += piece
        if left:
            assert leaves
            break
    else:
        assert not leaves
    assert got == keys


@given(st.binary().filter(lambda typed: b"\x01" not in typed))
def test_what_has_no_escape_key_is_the_guests(typed: bytes) -> None:
    assert Escape().take(typed) == (typed, False)


@given(st.binary())
def test_every_byte_can_be_typed(wanted: bytes) -> None:
    assert Escape().take(wanted.replace(b"\x01", b"\x01\x01")) == (wanted, False)
