"""What a machine wants of the kernel, and what it has: interrupts connected, dirty log on.

Both are targets, as with activations. A thread makes the kernel agree; a call that the kernel holds up, and that nobody
can wait for any longer, ends with what is wanted by then.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from trivmm.nursery.kernel import KernelCalls

__all__ = ["KernelSide", "Wish"]


@attrs.define(eq=False)
class Wish:
    """``wanted`` is the owner's, set in the trio thread; ``done`` the fact, changed in the kernel calls' thread: None
    when a change failed half way. ``on`` and ``off`` take it from there, too."""

    on: Callable[[], None]
    off: Callable[[], None]
    wanted: bool = False
    done: bool | None = False

    def agree(self) -> bool:
        """One step, in the thread; True when there was something to do."""
        wanted = self.wanted
        if wanted == self.done:
            return False
        self.done = None
        (self.on if wanted else self.off)()
        self.done = wanted
        return True


@attrs.define(eq=False)
class KernelSide:
    """One machine's wishes, with the VM's kernel calls."""

    calls: KernelCalls
    interrupts: Wish
    dirty_log: Wish

    def agree(self) -> None:
        """In the kernel calls' thread. Interrupts first, since the guest waits for them."""
        while self.interrupts.agree() or self.dirty_log.agree():
            pass

    async def settle(self, what: str, wish: Wish, at_most_s: float | None = None) -> None:
        """Wait until ``wish`` is as it is wanted, and nothing is under way. :raises DeadlineError: ``kernel``."""
        if self.calls.busy or wish.done != wish.wanted:
            await self.calls.call(what, self.agree, at_most_s=at_most_s)
