"""The lease under virtual time: who is refused, who waits, and for how long."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trivmm.deadlines import Deadlines
from trivmm.errors import DeadlineError, VmMigrating
from trivmm.nursery.ownership import MIGRATION, Ownership

LIMITS = Deadlines(lease=1, migration=2)


async def hold(owner: Ownership, operation: str, seconds: float, *, task_status: trio.TaskStatus[None]) -> None:
    async with owner.lease(operation):
        task_status.started()
        await trio.sleep(seconds)


@pytest.mark.parametrize("operation", [MIGRATION, "boot"])
async def test_the_control_loop_outwaits_whoever_owns_the_vm(
    autojump_clock: trio.testing.MockClock, operation: str
) -> None:
    """A migration may outlive the ``migration`` deadline: its ``timeout_s`` is its own, and *ignore* knows no end. The
    control loop must still be there afterwards: its end would be the VM's."""
    owner = Ownership(LIMITS)
    async with trio.open_nursery() as nursery:
        await nursery.start(hold, owner, operation, 50)
        async with owner.lease("guest request", wait_for_migration=True):
            assert owner.holder == "guest request"


async def test_everybody_else_is_refused_at_once_or_waits_for_the_lease_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    owner = Ownership(LIMITS)
    async with owner.lease(MIGRATION):
        with pytest.raises(VmMigrating):
            async with owner.lease("pause"):
                pass
    async with owner.lease("boot"):
        with pytest.raises(DeadlineError, match="pause waits for boot"):
            async with owner.lease("pause"):
                pass
    async with owner.lease("pause"):
        pass
