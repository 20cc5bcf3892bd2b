"""How long a guest has not said that it lives, in the time in which it could have. Pure: the caller has the clock.

The watch runs while the guest does, and stands still while that is paused, in a switchover, or on its way to another
host.
"""

from __future__ import annotations

import attrs

__all__ = ["Stopwatch"]


@attrs.define
class Stopwatch:
    """``armed`` by the first ping; times are seconds of one clock."""

    armed: bool = False
    _idle: float = 0.0  # before ``_since``
    _since: float | None = None  # the guest runs, and nothing came since then

    @property
    def running(self) -> bool:
        return self._since is not None

    def start(self, now: float) -> None:
        """The guest runs. Idempotent."""
        if self._since is None:
            self._since = now

    def stop(self, now: float) -> None:
        """It stands still. Idempotent."""
        self._idle, self._since = self.idle(now), None

    def ping(self, at: float) -> None:
        """One came ``at`` that time, which may be a while ago; the guest may stand still since."""
        self.armed, self._idle = True, 0.0
        if self._since is not None:
            self._since = max(self._since, at)

    def idle(self, now: float) -> float:
        """Seconds that the guest has run without a ping."""
        return self._idle + (0.0 if self._since is None else max(0.0, now - self._since))

    def load(self, *, armed: bool, idle: float) -> None:
        """What another one had come to; the guest stands still."""
        self.armed, self._idle, self._since = armed, idle, None

    def disarm(self, now: float) -> None:
        """Its driver is gone."""
        self.armed, self._idle = False, 0.0
        self._since = None if self._since is None else now
