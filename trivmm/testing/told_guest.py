"""A guest whose vCPUs do what a test tells them, one thing after the other, and its side of PCI hotplug.

::

    guest = ToldGuest()
    ScriptedHypervisor(guest.cpu(0), guest.cpu(1), needs_payload=False)
    assert await guest.does(hotplug_read(PCIU)) == 1 << 3
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import attrs
import trio

from trivmm.memory import layout
from trivmm.testing.scripted import Compute, MmioRead, MmioWrite, Script, ScriptedVcpu

__all__ = ["B0EJ", "PCID", "PCIU", "ToldGuest", "eject", "ged_events", "hotplug_read"]

Steps = Generator[Any, Any, Any]
PCIU, PCID, B0EJ = 0, 4, 8  # offsets of the hotplug controller's registers
IDLE_S: Final = 0.001


@attrs.define(eq=False)
class _Job:
    steps: Steps
    done: trio.Event = attrs.field(factory=trio.Event)
    result: Any = None


@attrs.define(eq=False)
class ToldGuest:
    """As many vCPUs as :meth:`cpu` was called for. What was told before a reboot or a move, and not begun, is done
    after it."""

    _jobs: dict[int, list[_Job]] = attrs.field(factory=dict)

    def cpu(self, index: int) -> Script:
        jobs = self._jobs.setdefault(index, [])

        def script(cpu: ScriptedVcpu) -> Steps:
            while True:
                if not jobs:
                    yield Compute(IDLE_S)
                    continue
                job = jobs.pop(0)
                job.result = yield from job.steps
                job.done.set()

        return script

    def begin(self, steps: Steps, cpu: int = 0) -> _Job:
        """Without waiting for it: see ``done`` and ``result``."""
        job = _Job(steps)
        self._jobs[cpu].append(job)
        return job

    async def does(self, steps: Steps, cpu: int = 0) -> Any:
        """What the steps return. Bounded by the caller."""
        job = self.begin(steps, cpu)
        await job.done.wait()
        return job.result


def hotplug_read(register: int, size: int = 4) -> Steps:
    return int.from_bytes((yield MmioRead(layout.PCI_HOTPLUG_START + register, size)), "little")


def eject(slots: int) -> Steps:
    """A bit each."""
    yield MmioWrite(layout.PCI_HOTPLUG_START + B0EJ, slots.to_bytes(4, "little"))


def ged_events() -> Steps:
    return int.from_bytes((yield MmioRead(layout.GED_START, 1)), "little")
