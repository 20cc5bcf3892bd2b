"""How the contract's tables spell what does not exist here yet. Pure."""

from __future__ import annotations

import attrs

__all__ = ["NotYet", "NotYetObject"]


@attrs.frozen
class NotYet:
    """A key that does not exist here, when its default alone doesn't say it all.

    :ivar default: what it means when it is left out.
    :ivar also: other values that ask for nothing more, or for a hint that may be ignored.
    :ivar said: whether vm.info says the default, as Cloud Hypervisor's does."""

    default: object
    also: tuple[object, ...] = ()
    said: bool = True


@attrs.frozen
class NotYetObject:
    """An object that does not exist here, with keys of its own in a table of their own: accepted while each of them
    holds its default. ``said`` as in :class:`NotYet`."""

    schema: str
    said: bool = True
