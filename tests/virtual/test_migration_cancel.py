"""Cancellation at every await of a migration, on either side, in virtual time."""

from __future__ import annotations

import trio
import trio.testing

from trivmm.migration.progress import Phase
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.world import World, late_once


async def test_a_cancellation_in_the_last_moment_before_commit_is_heard(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever cancels while the phase is not COMMIT was told that it can be: no COMMIT goes out after that."""
    world = World.make()
    release = world.source.release_locks

    async def released_and_cancelled(at_most_s: float) -> None:
        await release(at_most_s)
        scope.cancel()

    world.source.release_locks = released_and_cancelled  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.receive, nursery)
        with trio.CancelScope() as scope:
            await world.send()
    world.check()
    assert world.sent is None
    assert world.seen[-1].phase is Phase.CANCELLED
    assert Phase.COMMIT not in [each.phase for each in world.seen]
    assert world.source.running
    world.close()


async def test_the_source_cancelled_at_every_await(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[str] = []

    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.receive, nursery)
            await walk.run(world.send)
        world.check()
        if walk.cancelled:
            assert world.source.running
        outcomes.append(type(world.sent).__name__)
        world.close()

    assert await cancel_walk(world_of) > 20
    assert {"NoneType", "MigrationReport"} == set(outcomes)


async def test_the_destination_cancelled_at_every_await(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: list[str] = []

    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.send)
            async with trio.open_nursery() as lingering:
                await walk.run(lambda: world.receive(lingering))
        world.net.close()
        if world.sent is not None:
            world.check()
        outcomes.append(type(world.sent).__name__)
        world.close()

    assert await cancel_walk(world_of) > 10
    assert {"MigrationReport"} < set(outcomes)


async def test_a_cancelled_undo_still_ends(autojump_clock: trio.testing.MockClock) -> None:
    async def world_of(walk: Walk[None]) -> None:
        world = World.make()
        late_once(world)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.receive, nursery)
            await walk.run(world.send)
        world.check()
        world.close()

    assert await cancel_walk(world_of) > 30
