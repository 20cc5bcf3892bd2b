"""COMMIT and its verdict with a middle box in the way: in doubt only when the destination can't be reached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest
import trio

from trivmm.deadlines import Deadlines
from trivmm.errors import CommitRefused, ConfigError, MigrationInDoubt
from trivmm.migration.destination.receiver import open_receiver
from trivmm.migration.destination.verdicts import Verdicts
from trivmm.migration.options import SendOptions
from trivmm.migration.progress import MigrationReport
from trivmm.migration.source.sender import send, socket_dialer
from trivmm.migration.source.verdict import Finding, ask
from trivmm.migration.wire.frame import MessageType
from trivmm.migration.wire.messages import Fate
from trivmm.testing.middlebox import MiddleBox, Strike, middle_box
from trivmm.testing.migration import DiskLock, FakeDestination, FakeSource

LIMIT_S = 60
LIMITS = Deadlines(commit=4.0, downtime=10.0, resolve=1.0)
PATIENT = SendOptions(downtime_ms=10_000, timeout_s=60)


@attrs.define(eq=False)
class Road:
    """A source, a middle box, and a receiver in a nursery that outlives the migration, as a VMM's does."""

    folder: Path
    source: FakeSource
    destination: FakeDestination
    box: MiddleBox
    limits: Deadlines = LIMITS
    verdicts: Verdicts | None = None
    sent: MigrationReport | Exception | None = None
    taken: MigrationReport | Exception | None = None

    @property
    def url(self) -> str:
        return f"unix:{self.folder}/there.sock"

    async def receive(self, nursery: trio.Nursery) -> None:
        async with open_receiver(self.url, self.limits, nursery, self.verdicts) as receiver:
            try:
                _, self.taken = await receiver.receive(self.destination.factory)
            except Exception as error:
                self.taken = error

    async def send(self) -> None:
        self.source.deadlines = self.limits
        try:
            self.sent = await send(self.source, socket_dialer(self.box.url, self.limits), PATIENT)
        except Exception as error:
            self.sent = error
        assert not (self.source.running and self.destination.running), "two copies run"

    async def listening(self) -> None:
        while not Path(self.url.removeprefix("unix:")).exists():  # noqa: ASYNC110 - made by another task
            await trio.sleep(0.01)

    async def ask(self) -> Finding:
        assert isinstance(self.sent, MigrationInDoubt)
        assert self.sent.session is not None
        return await ask(socket_dialer(self.box.url, self.limits), self.sent.session, self.limits)


@pytest.fixture
def road(tmp_path: Path) -> Iterator[Road]:
    lock = DiskLock()
    with ExitStack() as stack:
        source, destination = FakeSource(lock, LIMITS), FakeDestination(lock, LIMITS)
        stack.callback(source.close)
        stack.callback(destination.close)
        box = stack.enter_context(middle_box(f"{tmp_path}/box.sock", f"{tmp_path}/there.sock"))
        yield Road(tmp_path, source, destination, box)


@pytest.mark.parametrize("how", ["close", "silence"])
@pytest.mark.parametrize("at", [MessageType.COMMIT, MessageType.RUNNING], ids=["COMMIT", "RUNNING"])
@pytest.mark.parametrize("forward", [False, True], ids=["lost", "arrives"])
async def test_a_link_that_ends_at_commit_is_asked_about(road: Road, at: MessageType, how: str, forward: bool) -> None:
    road.box.strike = Strike(at, how, forward)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(road.receive, nursery)
            await road.listening()
            await road.send()
        # It ends by itself: the destination heard that its verdict was heard, and left the address. Where DONE was lost
        # on a link that had carried RUNNING, that was said on another one.
    assert road.box.struck.is_set()
    if at is MessageType.COMMIT and not forward:
        assert isinstance(road.sent, CommitRefused)
        assert road.source.running
        assert isinstance(road.taken, Exception)
    elif how == "close" and at is MessageType.COMMIT:  # whether COMMIT was read before the end of the link is chance
        assert isinstance(road.sent, CommitRefused | MigrationReport)
        assert road.source.running is not road.destination.running
    else:
        assert isinstance(road.sent, MigrationReport)
        assert road.destination.running
    assert not Path(road.url.removeprefix("unix:")).exists()


async def test_a_commit_that_comes_after_the_question_never_counts(road: Road) -> None:
    """The source listens on the old link all the while, and its COMMIT arrives in the end."""
    asked = threading.Event()
    road.box.strike = Strike(MessageType.COMMIT, "pass", forward=True, first=lambda: asked.wait(LIMIT_S) and None)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(road.receive, nursery)
            await road.listening()
            await road.send()
            asked.set()
            await trio.to_thread.run_sync(road.box.struck.wait, LIMIT_S)
    assert isinstance(road.sent, CommitRefused)
    assert road.source.running
    assert not road.destination.running
    assert "asked before COMMIT came" in str(road.taken)


async def test_a_destination_answers_as_long_as_its_machine_is_there(road: Road) -> None:
    """The source's operator comes back later than any deadline, here: when everything else has ended."""

    def cut() -> None:
        road.box.down = True

    road.limits = attrs.evolve(LIMITS, commit=0.4)
    road.box.strike = Strike(MessageType.RUNNING, "close", first=cut)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as machine:
            machine.start_soon(road.receive, machine)
            await road.listening()
            await road.send()
            assert isinstance(road.sent, MigrationInDoubt)
            assert (await road.ask()).fate is None
            await trio.sleep(2 * road.limits.commit)
            road.box.down = False
            assert (await road.ask()).fate is Fate.RUNNING
        # That was DONE: it has left the address by itself.
    assert not Path(road.url.removeprefix("unix:")).exists()


async def test_the_end_of_the_machine_ends_the_answers_and_removes_the_socket(road: Road) -> None:
    def cut() -> None:
        road.box.down = True

    road.limits = attrs.evolve(LIMITS, commit=0.4)
    road.box.strike = Strike(MessageType.RUNNING, "close", first=cut)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as machine:
            machine.start_soon(road.receive, machine)
            await road.listening()
            await road.send()
            assert Path(road.url.removeprefix("unix:")).exists()
            machine.cancel_scope.cancel()
        assert not Path(road.url.removeprefix("unix:")).exists()
        road.box.down = False
        assert (await road.ask()).fate is None


async def test_a_later_receiver_of_the_same_owner_answers_for_a_refusal_that_nobody_heard(road: Road) -> None:
    def cut() -> None:
        road.box.down = True

    road.limits = attrs.evolve(LIMITS, commit=0.4)
    road.destination.start_error = ConfigError("x", 1, "no", "none")
    road.box.strike = Strike(MessageType.REFUSED, "close", first=cut)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as owner:
            road.verdicts = Verdicts(owner)
            owner.start_soon(road.receive, owner)
            await road.listening()
            await road.send()
            while Path(road.url.removeprefix("unix:")).exists():  # noqa: ASYNC110 - after commit: nothing runs here
                await trio.sleep(0.01)
            road.box.down = False
            assert (await road.ask()).fate is None
            async with open_receiver(road.url, LIMITS, owner, road.verdicts) as later:
                owner.start_soon(later.receive, road.destination.factory)
                found = await road.ask()
                assert found.fate is Fate.REFUSED
                assert "x = 1: no" in found.reason
                while found.fate is Fate.REFUSED:  # DONE was said, and is on its way: then it is forgotten
                    found = await road.ask()
                assert found.fate is Fate.UNKNOWN
                owner.cancel_scope.cancel()


async def test_a_migration_that_is_given_up_when_it_was_ready_leaves_the_address_at_once(road: Road) -> None:
    """By ABORT, in either direction: not after ``commit``, which here is longer than the test may take."""
    road.limits = attrs.evolve(LIMITS, commit=10 * LIMIT_S)
    for side in ("source", "destination"):
        ready = trio.Event()
        release = road.source.release_locks

        async def at_ready(at_most_s: float, ready: trio.Event = ready) -> None:
            ready.set()
            await trio.sleep_forever()

        road.source.release_locks = at_ready  # type: ignore[method-assign]
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery, open_receiver(road.url, road.limits, nursery) as receiver:
                scopes = {"source": trio.CancelScope(), "destination": trio.CancelScope()}

                async def source(scopes: dict[str, trio.CancelScope] = scopes) -> None:
                    with scopes["source"]:
                        await road.send()

                async def destination(
                    scopes: dict[str, trio.CancelScope] = scopes, receive: object = receiver.receive
                ) -> None:
                    with scopes["destination"]:
                        try:
                            await receive(road.destination.factory)  # type: ignore[operator]
                        except Exception as error:
                            road.taken = error

                nursery.start_soon(destination)
                nursery.start_soon(source)
                await ready.wait()
                road.source.release_locks = release  # type: ignore[method-assign]
                scopes[side].cancel()
                if side == "destination":
                    await trio.sleep(0.1)
                    scopes["source"].cancel()
            assert road.source.running
            assert not road.destination.running
        assert not Path(road.url.removeprefix("unix:")).exists()
