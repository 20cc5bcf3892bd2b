"""The destination's side: :func:`open_receiver` listens, :meth:`Receiver.receive` takes one machine in.

A receiver is a door (``door``) and, behind it, the intake of the one session that was let in (``intake``). What it
decided is its owner's to remember (``verdicts``). After a migration the door may stay open, to answer a source whose
link died or went silent:

- where the machine runs, in ``nursery``, the machine's own: as long as that machine is there;
- where it does not, in the owner's nursery, for twice as long as a source asks (``commit``, and a last look).

The machine that the factory built belongs to whoever passed the factory: when ``receive`` raises, they destroy it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import MigrationError
from trivmm.migration.destination.door import Door
from trivmm.migration.destination.intake import Intake
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.link.transports import Listener, listen, parse_url
from trivmm.migration.port import DestinationFactory, DestinationMachine
from trivmm.migration.progress import MigrationProgress, MigrationReport, Tracker
from trivmm.migration.wire.messages import prepare_messages

__all__ = ["Receiver", "open_receiver"]


@asynccontextmanager
async def open_receiver(
    url: str, deadlines: Deadlines, nursery: trio.Nursery, verdicts: Verdicts | None = None
) -> AsyncIterator[Receiver]:
    """Listen at ``url``. ``nursery`` should live as long as the machine that comes, and ``verdicts`` as long as its
    owner receives; None: as long as that nursery. Cancelling either's nursery is safe for everybody but a source in
    doubt.

    :raises ConfigError: (``receiver_url``) when the address is no good, or in use, if only by another owner.
    """
    address = parse_url(url, "receiver_url")
    known = verdicts or Verdicts(nursery)
    known.take_over(str(address))
    listener = await listen(address, deadlines)
    receiver = Receiver(listener, deadlines, nursery, known)
    try:
        yield receiver
    finally:
        receiver.close()


@attrs.define(eq=False)
class Receiver:
    """One listener, one migration."""

    listener: Listener
    deadlines: Deadlines
    nursery: trio.Nursery
    verdicts: Verdicts = attrs.field(default=attrs.Factory(lambda self: Verdicts(self.nursery), takes_self=True))
    refuse: Callable[[], str | None] = attrs.field(default=lambda: None, init=False)
    """Asked in the moment in which COMMIT is read: why it is refused; None: it is not."""
    _door: Door = attrs.field(
        default=attrs.Factory(lambda self: Door(self.listener, self.deadlines, self.verdicts), takes_self=True),
        init=False,
    )
    _used: bool = attrs.field(default=False, init=False)

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self.listener.url

    def close(self) -> None:
        """Stop listening, unless questions are still answered: they close the listener at their end."""
        self._door.close()

    async def receive(
        self,
        factory: DestinationFactory,
        progress: Callable[[MigrationProgress], None] | None = None,
    ) -> tuple[DestinationMachine, MigrationReport]:
        """Wait for a source, build its machine, take its pages and state, and run it. Call once.

        :raises DeadlineError: nobody came (accept), or the source went silent (handshake, stall, commit).
        :raises ConfigError: this host can't build the machine; the source was told.
        :raises ProtocolError: or :raises MigrationError: the source talked nonsense, died or gave up.
        :raises CommitRefused: the locks could not be had, or ``refuse`` said so: the source was told and runs.
        :raises MigrationInDoubt: the start outlived the ``commit`` deadline.
        """
        if self._used:
            raise MigrationError(f"{self.url}: this receiver was used already; open another")
        self._used = True
        prepare_messages()
        tracker = Tracker()
        if progress is not None:
            tracker.callback = progress
        result: DestinationMachine | Exception | None = None
        self.verdicts.nursery.start_soon(self._door.keep_open)
        # The guard is shielded at COMMIT, together with everything inside: from there a verdict is certain.
        with trio.CancelScope() as guard:
            try:
                arrival = await self._door.arrival()
                intake = Intake(arrival, self._door, self.nursery, self.refuse, tracker, self.deadlines)
                result = await intake.run(factory, guard)
            except Exception as error:
                result = error
            finally:
                self._door.shut()
        if result is None:
            # Cancelled, and the guard's shield made its end absorb that: out here the cancellation shows again.
            await trio.lowlevel.checkpoint()
            raise MigrationError("discarded")
        if isinstance(result, Exception):
            raise result
        return result, tracker.report()
