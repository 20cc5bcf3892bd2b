"""The one VM's place, and what becomes of a task that works on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

import attrs
import trio

from trivmm.incoming import Incoming
from trivmm.vm import Vm

__all__ = ["Result", "Slot"]

T = TypeVar("T")


@attrs.define(eq=False)
class Result(Generic[T]):
    """What a task of the Vmm nursery came to, for whoever waits: a value or an error, once."""

    _value: T | None = None
    _error: BaseException | None = None
    _known: trio.Event = attrs.field(factory=trio.Event)

    def set(self, value: T) -> None:
        self._value = value
        self._known.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._known.set()

    @property
    def known(self) -> bool:
        return self._known.is_set()

    async def get(self) -> T:
        """Bounded by the operation whose outcome it is."""
        await self._known.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


@attrs.define(eq=False)
class Slot:
    """The one VM's place: taken while it is being made, received, used and closed."""

    what: str
    vm: Vm | None = None
    moved: bool = False  # the VM is another process's now, or was overwritten: it is not deleted
    aside: Slot | None = None  # of a VM that is not booted, and gives way to the one that comes if one does
    descriptors: list[int] = attrs.field(factory=list)  # that API clients passed for devices of its
    incoming: Incoming | None = None
    url: str = ""  # of the migration that brings it, or takes it away
    cancelled: bool = False
    cancel: Callable[[], None] | None = None
    arrival: Result[Vm] | None = None
    close: trio.Event = attrs.field(factory=trio.Event)
    gone: trio.Event = attrs.field(factory=trio.Event)
    booted: trio.Event = attrs.field(factory=trio.Event)

    def close_descriptors(self) -> None:
        """The VM is gone. Idempotent."""
        fds, self.descriptors = self.descriptors, []
        for fd in fds:
            os.close(fd)
