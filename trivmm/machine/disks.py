"""A machine's disks where they wait for their storage: flushed, locked and unlocked in threads, under ``storage``.

Whoever runs a VM has the locks of its images. Before it gives them up everything that the guest wrote is on the storage
and nothing of it is cached here; after somebody has taken them, nothing is believed that was cached before. So it is
one page cache at a time that has to do with an image, as it is one host: what one of them wrote the next one reads, and
no late write-back of the one undoes what the other wrote.

Part of a :class:`~trivmm.machine.machine.Machine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from trivmm.errors import DeadlineError, TrivmmError
from trivmm.nursery.kernel import KernelCalls
from trivmm.virtio.port import Storage

__all__ = ["Disks"]


@attrs.frozen(eq=False)
class Disks:
    """``storages()`` are those that there are. ``calls`` makes one call at a time, in the order in which they were
    asked for."""

    storages: Callable[[], Sequence[Storage]]
    calls: KernelCalls

    async def _each(
        self,
        what: str,
        work: Callable[[Storage], None],
        at_most_s: float,
        late: Callable[[None], None] | None = None,
    ) -> None:
        storages = self.storages()

        def all_of_them() -> None:
            for storage in storages:
                work(storage)

        if storages:  # else not even a thread
            await self.calls.call(what, all_of_them, at_most_s=at_most_s, late=late)

    async def flush(self, at_most_s: float) -> None:
        """While the guest runs, or for the last time.

        :raises DeadlineError: (storage) not within that time; it goes on by itself.
        :raises MigrationError: an image lost what was written."""
        await self._each("flushing the disks", lambda storage: storage.flush(), at_most_s)

    async def try_flush(self, at_most_s: float) -> bool:
        """The same; False while it goes on by itself.

        :raises DeadlineError: (storage) it has been going on for longer than that."""
        if not self.calls.busy:
            try:
                await self.flush(at_most_s)
            except DeadlineError:
                pass
            else:
                return True
        if stuck := self.calls.stuck:
            raise DeadlineError(self.calls.deadline, self.calls.limit_s, "; ".join(stuck))
        return False

    async def refresh(self, at_most_s: float) -> None:
        """Believe nothing that was cached. :raises TrivmmError: an image is not what it was, or can't be looked at."""
        await self._each("looking at the disks afresh", lambda storage: storage.refresh(), at_most_s)

    async def lock(self, at_most_s: float) -> None:
        """Take every lock, which may be there already, then believe nothing that was cached before: all or none.

        :raises ConfigError: another process has one, or an image is not what it was.
        :raises DeadlineError: (storage)."""
        try:
            await self._each(
                "locking the disks", lambda storage: storage.take_lock(), at_most_s, lambda _: self.give_up()
            )
            await self.refresh(at_most_s)
        except TrivmmError:
            self.give_up()
            raise

    async def unlock(self, at_most_s: float) -> None:
        """:raises DeadlineError: (storage)."""
        await self._each("unlocking the disks", lambda storage: storage.release_lock(), at_most_s)

    def give_up(self) -> None:
        """The locks, here and now: in an emergency, and where nobody can wait. Any thread."""
        for storage in self.storages():
            storage.release_lock()
