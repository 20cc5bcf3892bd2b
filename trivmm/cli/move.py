"""``trivmm remote send-migration``: begin a migration, watch it to its end, tell how it ended.

Light like the rest of ``remote``: the standard library only. On a terminal one line is drawn over and over; elsewhere
each change of phase or round is a line of JSON. Ctrl-C asks for a rollback and goes on watching, since only the end of
the migration says which side runs the VM.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import attrs

from trivmm.cli import EXIT_FAILED, EXIT_INTERRUPTED, say_error
from trivmm.control.apierror import ApiError, ApiUnreachable, MigrationFailed

__all__ = ["watch_move"]

POLL_S: Final = 0.1
JSON_EVERY_S: Final = 1.0  # a line at least this often while nothing else changes
BAR: Final = 24

Call = Callable[[str, str], Any]
"""(method, route) → the answer's JSON or None."""


@attrs.define(eq=False)
class _Interrupt:
    """Whether Ctrl-C was pressed, without an exception in the middle of a request."""

    pressed: bool = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.pressed = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def watch_move(begin: Callable[[], Any], call: Call, *, draw: bool, limit_s: float) -> int:
    """``begin`` asks for the migration; gives the exit code: 0 moved, 1 failed (the reason on stderr), 130 cancelled.

    :raises ApiError: it was not accepted. :raises ApiUnreachable: nobody answers, or no longer."""
    interrupt = _Interrupt()
    view = _Line() if draw else _JsonLines()
    with interrupt.watched():
        begin()
        try:
            last = _follow(call, view, interrupt, time.monotonic() + limit_s)
        finally:
            view.end()
    state, details = next(iter(last["state"].items()))
    if state == "Finished":
        if draw:
            print(f"moved: {last['round']} rounds in {last['elapsed_s']:.2f} s, downtime {last['downtime_ms']:g} ms")
        return 0
    say_error(MigrationFailed(state, details.get("error_msg", ""), last))
    return EXIT_INTERRUPTED if interrupt.pressed and state == "Cancelled" else EXIT_FAILED


def _follow(call: Call, view: _Line | _JsonLines, interrupt: _Interrupt, until: float) -> dict[str, Any]:
    """Ask until there is a verdict; gives the last progress."""
    cancelled, seen = False, "before its first answer"
    while time.monotonic() < until:
        if interrupt.pressed and not cancelled:
            cancelled = True
            try:
                call("PUT", "vm.cancel-migration")
            except ApiError as error:  # too late, or over already: the progress will tell
                view.note(str(error))
        try:
            progress: dict[str, Any] | None = call("GET", "vm.migration-progress")
        except ApiUnreachable as error:
            raise ApiUnreachable(error.path, f"gone {seen}: look for the VM at the destination") from error
        if progress is not None:
            view.show(progress)
            seen = f"in phase {progress['phase']}"
            if "Ongoing" not in progress["state"]:
                return progress
        time.sleep(POLL_S)  # bounded by ``until``
    raise TimeoutError(f"no verdict {seen}; it goes on: ask with migration-progress")


class _Line:
    """One line of a terminal, drawn over and over."""

    def __init__(self) -> None:
        self._drawn = False

    def show(self, progress: dict[str, Any]) -> None:
        memory = progress["memory_transmission_info"]
        left, total = memory["memory_bytes_remaining_iteration"], max(memory["memory_bytes_total"], 1)
        full = round(BAR * (1 - min(left, total) / total))
        parts = [
            f"{progress['phase'].lower():<10} round {progress['round']:<3}",
            f"[{'#' * full}{'.' * (BAR - full)}]",
            f"{left / (1 << 20):.0f} MiB left",
            f"{progress['rate'] / (1 << 20):.0f} MiB/s",
            f"{progress['activations']} activations",
        ]
        if progress["downtime_estimated_ms"]:
            parts.append(f"downtime {progress['downtime_estimated_ms']} ms of {progress['downtime_configured_ms']}")
        sys.stdout.write("\r\033[K" + "  ".join(parts))
        sys.stdout.flush()
        self._drawn = True

    def note(self, text: str) -> None:
        self.end()
        print(text)

    def end(self) -> None:
        if self._drawn:
            print()
            self._drawn = False


class _JsonLines:
    def __init__(self) -> None:
        self._last: tuple[object, ...] = ()
        self._at = 0.0

    def show(self, progress: dict[str, Any]) -> None:
        now = time.monotonic()
        change = (progress["phase"], progress["round"], progress["attempts"])
        if change != self._last or now - self._at >= JSON_EVERY_S:
            self._last, self._at = change, now
            print(json.dumps(progress), flush=True)

    def note(self, text: str) -> None:
        print(json.dumps({"note": text}), flush=True)

    def end(self) -> None:
        return None
