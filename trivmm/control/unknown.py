"""Keys in request bodies that stand in no table of the contract: ignored, as Cloud Hypervisor does, but not silently.

Clients are newer than servers, so such a key never fails a request. What nobody hears of can't be mended either, so
each kind (schema and key) is logged once and counted; ``vmm.ping`` tells the counts.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from typing import Final

import attrs

from trivmm.errors import shown

__all__ = ["Unknown", "UnknownKeys"]

logger = logging.getLogger(__name__)

MAX_KINDS: Final = 64  # remembered and logged; a client that makes keys up would fill memory and log
MAX_KEY: Final = 64  # characters of a key that are looked at; the contract's longest has under 30

Unknown = Callable[[str, str, Iterable[str]], None]
"""Called with the schema's name, the key, and the keys that the schema has."""


@attrs.define(eq=False)
class UnknownKeys:
    """A counter of kinds, for as long as its owner lives. An :data:`Unknown`."""

    _counts: dict[str, int] = attrs.field(factory=dict, init=False)
    _others: int = attrs.field(default=0, init=False)

    def __call__(self, schema: str, key: str, known: Iterable[str]) -> None:
        kind = f"{schema}.{shown(key[:MAX_KEY])[1:-1]}"
        if kind in self._counts:
            self._counts[kind] += 1
            return
        if len(self._counts) >= MAX_KINDS:
            if not self._others:
                logger.warning("more than %d kinds of unknown keys came; further ones are only counted", MAX_KINDS)
            self._others += 1
            return
        self._counts[kind] = 1
        near = difflib.get_close_matches(key[:MAX_KEY], list(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        logger.warning("unknown key %s in a request: ignored%s (further ones are counted in vmm.ping)", kind, hint)

    @property
    def counts(self) -> dict[str, int]:
        """By kind, such as ``DiskConfig.colour``; what came after ``MAX_KINDS`` kinds is summed as ``others``."""
        return {**self._counts, "others": self._others} if self._others else dict(self._counts)
