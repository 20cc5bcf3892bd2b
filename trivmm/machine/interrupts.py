"""A machine's interrupts: connected to its vCPUs by the kernel, or taken away from them.

On or off is a target, as with activations and the dirty log. A thread makes the kernel agree; a call that the kernel
holds up, and that nobody can wait for any longer, ends with what is wanted by then.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from trivmm.nursery.kernel import KernelCalls

__all__ = ["Interrupts"]


@attrs.define(eq=False)
class Interrupts:
    """``wanted`` is said in the trio thread. ``on`` and ``off`` wait for the kernel; one that raises half way is made
    again, or the other is, and takes it from there."""

    calls: KernelCalls
    on: Callable[[], None]
    off: Callable[[], None]
    wanted: bool = False
    _connected: bool | None = attrs.field(default=False, init=False)  # the thread's; None: half way

    @property
    def connected(self) -> bool:
        """Whether they are now. In the kernel calls' thread."""
        return self._connected is True

    def agree(self) -> None:
        """In the kernel calls' thread."""
        while self._connected is not self.wanted:
            wanted, self._connected = self.wanted, None
            (self.on if wanted else self.off)()
            self._connected = wanted

    async def attach(self) -> None:
        """:raises DeadlineError: (kernel) they are not connected, or will be by themselves."""
        self.wanted = True
        if self.calls.busy or not self._connected:
            await self.calls.call("connecting the interrupts", self.agree)

    async def detach(self, at_most_s: float) -> None:
        """:raises DeadlineError: (kernel) they are not disconnected."""
        self.wanted = False
        await self.calls.call("taking the interrupts away", self.agree, at_most_s=at_most_s)
