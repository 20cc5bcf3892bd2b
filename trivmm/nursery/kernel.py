"""Calls that wait for the kernel, off the trio thread: one VM's, one at a time, each under one deadline.

Under ``kernel``: changing memory slots, doorbells, interrupt routes or irqfds, and making a VM, wait until no vCPU
reads the old ones (an SRCU grace period): microseconds, or seconds where vCPUs wait for a CPU. Under ``storage``, apart
from these and so in nobody's way: what waits for the storage behind a disk. Meanwhile the API must answer, handshakes
must be met and signals heard.

A thread in the kernel can't be ended. So a call is never abandoned because its caller was cancelled, only at the end of
its deadline; it then goes on by itself, later ones wait for it, and past that it is in :attr:`KernelCalls.stuck` by
name until it is back. Owned by a VM, from ``open_vm`` to the end of that block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import attrs
import trio

from trivmm.deadlines import Deadlines

__all__ = ["KernelCalls"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
PENDING: Final[Any] = object()


@attrs.define(eq=False)
class _Call:
    """One call in its thread. ``work`` runs with the VM's lock held; what comes after the caller went is ``late``'s."""

    what: str
    work: Callable[[], Any]
    late: Callable[[Any], None] | None
    limit_s: float
    began: float = attrs.field(factory=time.monotonic)
    given_up: bool = False
    result: Any = PENDING
    error: BaseException | None = None
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    def run(self) -> None:
        try:
            result = self.work()
        except Exception as error:
            with self.lock:
                if not self.given_up:
                    self.error = error
                    return
            self._say("failed", f": {error}")
            return
        with self.lock:
            if not self.given_up:
                self.result = result
                return
        self._say("came back")
        if self.late is not None:
            self.late(result)

    def _say(self, how: str, why: str = "") -> None:
        took_s = time.monotonic() - self.began
        level = logging.WARNING if took_s >= self.limit_s else logging.INFO  # it was named as stuck, or only late
        logger.log(level, "%s: %s after %.1f s%s", self.what, how, took_s, why)

    def give_up(self) -> bool:
        """False when it ended in this very moment: there is an outcome after all."""
        with self.lock:
            self.given_up = self.result is PENDING and self.error is None
            return self.given_up

    def outcome(self) -> Any:
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self.result
        finally:
            del error  # its traceback has this frame: a ring of references would keep what the work was about


@attrs.define(eq=False)
class KernelCalls:
    """``threaded`` False makes every call where it stands: under virtual time, whose clock would jump meanwhile.
    ``deadline`` is the name of the one that bounds each call."""

    deadlines: Deadlines
    threaded: bool
    deadline: str = "kernel"
    _one_at_a_time: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _calls: list[_Call] = attrs.field(factory=list, init=False)

    @property
    def busy(self) -> bool:
        """Whether a thread is at work, its caller still there or not."""
        return bool(self._calls)

    @property
    def limit_s(self) -> float:
        return self.deadlines.limit_s(self.deadline)

    @property
    def stuck(self) -> tuple[str, ...]:
        """Calls that have outlived their deadline. May be read in any thread."""
        now, limit_s = time.monotonic(), self.limit_s
        return tuple(
            f"{call.what}: in the {self.deadline} for {now - call.began:.1f} s"
            for call in list(self._calls)
            if call.given_up and now - call.began >= limit_s
        )

    async def call(
        self,
        what: str,
        work: Callable[[], T],
        *,
        at_most_s: float | None = None,
        late: Callable[[T], None] | None = None,
    ) -> T:
        """The result of ``work()``, made in a thread; a cancellation waits for it and shows at the caller's next await.

        ``late`` gets, in that thread, a result that nobody waits for any more. What ``work`` raises is raised here.

        :raises DeadlineError: by its name, or after ``at_most_s``: the call has not returned. It, or its turn, is still
            to come."""
        if not self.threaded:
            return work()
        call = _Call(what, work, late, self.limit_s)
        try:
            with self.deadlines.enter(self.deadline, lambda: self._diagnose(call), at_most_s=at_most_s, shield=True):
                # A limiter of its own: nobody else's threads in its way. The lock keeps the order, also of late ones.
                await trio.to_thread.run_sync(
                    self._run, call, limiter=trio.CapacityLimiter(1), thread_name=what[:15], abandon_on_cancel=True
                )
        except BaseException:  # noqa: ASYNC103 - a call that came back in this very moment counts as come back
            if call.give_up():
                raise
        return cast("T", call.outcome())

    def _run(self, call: _Call) -> None:
        self._calls.append(call)
        try:
            with self._one_at_a_time:
                call.run()
        finally:
            self._calls.remove(call)

    def _diagnose(self, call: _Call) -> str:
        before = [each.what for each in list(self._calls) if each is not call]
        waits = f", after {', '.join(before)}" if before else ""
        return f"{call.what}{waits}: the {self.deadline} has not returned"

    async def settled(self, *, at_most_s: float | None = None) -> None:
        """Wait until no thread is at work, bounded as any call. :raises DeadlineError: naming what is stuck."""
        if self._calls:
            await self.call("ending", lambda: None, at_most_s=at_most_s)
