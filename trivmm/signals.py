"""What SIGTERM, SIGINT and SIGHUP are to a process: a note that it shall end, read by whoever must know at once.

The first one counts. It is noted in the signal handler itself, so that what looks at :attr:`Told.number` knows of it
before trio's loop has come round: a destination must not accept a COMMIT that it reads in the same moment.

Before there is anything to end (Python is still importing) Ctrl-C leaves at once: see :func:`leave_at_interrupt`.
No module here is imported that is not loaded anyway: this is the first one that the command line imports.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType

    import trio

__all__ = ["ENDING", "Told", "ignore_signals", "interruptible", "leave_at_interrupt"]

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_INTERRUPTED = 130


class Told:
    """Handles the signals for the length of its block, in the main thread; afterwards they are as they were."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._before: list[object] = []
        self._wake: tuple[trio.lowlevel.TrioToken, trio.Event] | None = None

    @property
    def name(self) -> str | None:
        """Of the first signal that came, such as ``SIGTERM``; None so far."""
        return None if self.number is None else self.number.name

    async def wait(self) -> signal.Signals:
        """Until the first one comes: a process's life."""
        import trio

        event = trio.Event()
        self._wake = trio.lowlevel.current_trio_token(), event
        if self.number is None:
            await event.wait()
        assert self.number is not None
        return self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = signal.Signals(number)
        if self._wake is not None:
            token, event = self._wake
            try:  # noqa: SIM105 - contextlib is not loaded yet
                token.run_sync_soon(event.set)
            except RuntimeError:  # trio.RunFinishedError: that loop has ended, and with it what there was to end
                pass

    def __enter__(self) -> Told:
        self._before = [signal.signal(number, self._note) for number in ENDING]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in zip(ENDING, self._before, strict=True):
            signal.signal(number, before)  # type: ignore[arg-type]


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def leave_at_interrupt() -> None:
    """Ctrl-C ends this process at once, without a word: nothing was begun. A KeyboardInterrupt in the middle of an
    import would be a traceback at best, and a module half made at worst."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """From here Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_signals() -> None:
    """The exit code is known: nothing changes it while Python takes itself apart."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
