"""Bytes that stand for choices, for property tests.

Hypothesis draws and shrinks them as one value; a strategy for each choice is ten times slower. ``st.binary(...)`` and
``Tape(data)`` in the test is all there is to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Tape"]

T = TypeVar("T")


class Tape:
    """Past its end every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)

    def below(self, limit: int) -> int:
        """0 .. ``limit`` - 1; a limit of more than 256 takes as many bytes as it needs."""
        length = max(1, ((limit - 1).bit_length() + 7) // 8)
        piece = self._data[self._at : self._at + length]
        self._at += length
        return int.from_bytes(piece, "little") % limit

    def of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def mostly(self, good: T, others: Sequence[T]) -> T:
        """Fifteen times in sixteen ``good``: with one thing wrong a program gets further than with all of them."""
        return self.of(others) if self.below(16) == 15 else good
