"""What a vCPU parks at until a device has followed its driver: an activation, or a reset."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Ticket"]


class Ticket:
    """What a vCPU waits for at the barrier: one generation of one device, settled once and for ever.

    The vCPU parks until ``settled``; a pause, kick or stop reaches it there at once (a checkpoint, not a wall).
    ``settle`` may be called by any thread, more than once; ``on_settled`` callbacks run in the settling thread.
    """

    __slots__ = ("_callbacks", "_lock", "device", "generation", "settled", "what")

    def __init__(self, device: str, generation: int, what: str) -> None:
        self.device = device
        self.generation = generation
        self.what = what  # "activation" or "reset"
        self.settled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def on_settled(self, callback: Callable[[], None]) -> None:
        """Call back once settled; at once when it already is. Callbacks never block and never raise."""
        with self._lock:
            if not self.settled:
                self._callbacks.append(callback)
                return
        callback()

    def settle(self) -> None:
        with self._lock:
            if self.settled:
                return
            self.settled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def __repr__(self) -> str:
        state = "settled" if self.settled else "open"
        return f"<Ticket {self.what} of {self.device} generation {self.generation}, {state}>"
