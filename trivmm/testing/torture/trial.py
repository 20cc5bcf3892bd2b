"""One trial: a migration through the box, the harm, and the look at what is left."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from functools import partial
from typing import Final

import attrs
import trio

from trivmm.errors import TrivmmError
from trivmm.guest import ProbeReport
from trivmm.migration.link.transports import parse_url
from trivmm.migration.wire.frame import MessageType
from trivmm.testing.torture.box import Box, Fate, open_box
from trivmm.testing.torture.hosts import ASK_LIMIT_S, Host, files_in, until
from trivmm.testing.torture.judge import SLACK_S, Copy, Observation, Sent
from trivmm.testing.torture.plan import Act, Plan, Side
from trivmm.testing.torture.stage import LISTEN_LIMIT_S, Stage, listens, send

__all__ = ["run_trial"]

POLL_S: Final = 0.02
VERDICT_LIMIT_S: Final = 60.0  # then there is none, which breaks every deadline of the judge
CANCEL_LIMIT_S: Final = 2.0
SPEAK_LIMIT_S: Final = 5.0  # a guest that runs speaks every 50 ms
QUIET_S: Final = 0.3  # how long one that must not run is listened to
CHECK_LIMIT_S: Final = 15.0  # until it has looked at all its pages again


async def run_trial(stage: Stage, plan: Plan) -> Observation:
    """Leaves ``stage`` ready for the next one. :raises HostError: there is no guest to begin with."""
    source, target = await stage.prepare(plan.disk)
    target.forget_serial()
    return await _Trial(stage, plan, source, target).run()


@attrs.define(eq=False)
class _Trial:
    stage: Stage
    plan: Plan
    source: Host
    target: Host
    _files_before: set[str] = attrs.field(factory=set)
    _nursery: trio.Nursery | None = None
    _box: Box | None = None
    _acted: bool = False
    _over: bool = False  # there is a verdict: nobody is harmed any more
    _clock: float = 0.0  # from when on the verdict is due
    _committed_before: bool = False
    _cancel_accepted: bool = False
    _overlap: bool = False
    _busy: int = 0  # stops and cuts that still last
    _received: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> Observation:
        self._files_before = files_in(self.stage.folder)
        inner, outer = self.stage.url(self.plan.transport), self.stage.url(self.plan.transport)
        front, behind = parse_url(outer, "destination_url"), parse_url(inner, "receiver_url")
        async with trio.open_nursery() as nursery, open_box(front, behind, self._hook) as box:
            self._nursery, self._box = nursery, box
            nursery.start_soon(self._receive, inner)
            await until(lambda: listens(inner), LISTEN_LIMIT_S)
            nursery.start_soon(self._listen_to_both)
            sent, verdict_s = await self._move(outer)
            self._over = True
            committed = MessageType.COMMIT in box.passed
            left_over = await self._calm_down(inner)
            copies = await self._look()
            resumed, two = None, False
            if sent is Sent.IN_DOUBT:
                resumed, two, copies = await self._resolve(copies)
            errors, problems = await self._guest_says(copies)
            nursery.cancel_scope.cancel()
        left_over += await self._left_over(inner, sent, copies)
        seen = Observation(
            source=copies[0],
            destination=copies[1],
            sent=sent,
            harmed=self._acted,
            committed=committed,
            committed_before=self._committed_before,
            overlap=self._overlap,
            verdict_s=verdict_s,
            cancel_accepted=self._cancel_accepted,
            resumed=resumed,
            two_after_resume=two,
            guest_errors=errors,
            guest_problems=problems,
            left_over=tuple(left_over),
        )
        return await self._afterwards(seen, copies)

    # --- the migration -----------------------------------------------------------------------------------------

    async def _receive(self, url: str) -> None:
        with contextlib.suppress(TrivmmError):  # how it ended is seen by what is left
            await self.target.client.receive_migration(url)
        self._received.set()

    async def _move(self, url: str) -> tuple[Sent, float | None]:
        """(how it ended, seconds from when the verdict was due)."""
        before, refused = await self._session(), False
        began = self._clock = trio.current_time()
        if not self.plan.point.message and self.plan.kind.act is not Act.NOTHING:
            assert self._nursery is not None
            self._nursery.start_soon(self._at_an_instant)
        with trio.move_on_after(VERDICT_LIMIT_S):
            try:
                await send(self.source, url)
            except TrivmmError:
                refused = self.source.alive and not self._acted
            sent = Sent.FAILED if refused else await self._verdict(before)
            now = trio.current_time()
            if not self._acted:
                self.stage.note_move(now - began)
            committed = self._box.seen.get(MessageType.COMMIT, 0.0) if self._box else 0.0
            return sent, now - max(self._clock, committed)
        return Sent.NEVER, None

    async def _session(self) -> str:
        """Of the migration that the source knew before this one."""
        progress = None
        with trio.move_on_after(ASK_LIMIT_S), contextlib.suppress(TrivmmError):
            progress = await self.source.client.migration_progress()
        return "" if progress is None else str(progress["session"])

    async def _verdict(self, before: str) -> Sent:
        """Polls. Bounded by the caller."""
        while self.source.alive:
            if not self.source.stopped:
                with trio.move_on_after(ASK_LIMIT_S):
                    try:
                        progress = await self.source.client.migration_progress()
                    except TrivmmError:  # on its way out
                        progress = None
                    if progress is not None and progress["session"] != before:
                        ended = _ENDS.get(progress["phase"])
                        if ended is not None:
                            return ended
            await trio.sleep(POLL_S)
        return self._last_told()

    def _last_told(self) -> Sent:
        """By the events of a process that has gone."""
        for event in reversed(self.source.events()):
            match event["event"]:
                case "migration-finished":
                    return Sent.FINISHED
                case "migration-failed":
                    return Sent(event["properties"]["outcome"])
                case "migration-started":
                    break
        return Sent.UNKNOWN

    async def _listen_to_both(self) -> None:
        """Ends with the trial. A guest that spoke at the destination never speaks at the source again."""
        there = self.target.said()
        here = self.source.said()
        while True:
            # The source first: what it says before the destination's first word is older than that.
            now_here, now_there = self.source.said(), self.target.said()
            if there and now_here > here:
                self._overlap = True
            here, there = now_here, now_there
            await trio.sleep(POLL_S)

    # --- the harm ----------------------------------------------------------------------------------------------

    async def _at_an_instant(self) -> None:
        await trio.sleep(self.plan.point.share * self.stage.move_s)
        await self._act()

    async def _hook(self, message: MessageType, nth: int, before: bool) -> Fate:
        point = self.plan.point
        if self.plan.kind.act is Act.NOTHING or (message, nth, before) != (point.message, point.nth, point.before):
            return Fate()
        return await self._act()

    async def _act(self) -> Fate:
        if self._acted or self._over:
            return Fate()
        box, plan = self._box, self.plan
        assert box is not None
        assert self._nursery is not None
        self._acted = True
        self._clock = trio.current_time()
        self._committed_before = MessageType.COMMIT in box.passed
        victim = self.source if plan.kind.side is Side.SOURCE else self.target
        match plan.kind.act:
            case Act.KILL:
                victim.signal(signal.SIGKILL)
                await victim.ended(ASK_LIMIT_S)
            case Act.TERM:
                victim.signal(signal.SIGTERM)
                await trio.sleep(plan.lead_s)
            case Act.STOP:
                victim.signal(signal.SIGSTOP)
                self._nursery.start_soon(self._end_of_stop, victim)
            case Act.CANCEL:
                await self._cancel(victim)
            case Act.CLOSE:
                await box.close_link()
            case Act.RESET:
                await box.reset_link()
            case Act.SILENT:
                box.silence()
            case Act.CUT:
                box.cut()
                self._nursery.start_soon(self._end_of_cut)
            case Act.DELAY:
                return Fate(delay_s=plan.seconds)
            case Act.DROP:
                return Fate(lost=True)
            case Act.REPEAT:
                return Fate(again=plan.lag)
        return Fate()

    async def _end_of_stop(self, victim: Host) -> None:
        self._busy += 1
        await trio.sleep(self.plan.seconds)
        victim.signal(signal.SIGCONT)
        if victim is self.source:
            self._clock = trio.current_time()
        self._busy -= 1

    async def _end_of_cut(self) -> None:
        assert self._box is not None
        self._busy += 1
        await trio.sleep(self.plan.seconds)
        self._box.heal()
        self._busy -= 1

    async def _cancel(self, victim: Host) -> None:
        assert self._box is not None
        committed = victim is self.source and MessageType.COMMIT in self._box.seen
        with trio.move_on_after(CANCEL_LIMIT_S):
            try:
                await victim.client.cancel_migration()
            except TrivmmError:
                return  # it says that there is nothing to cancel, or that it is too late
            self._cancel_accepted = committed

    # --- what is left ------------------------------------------------------------------------------------------

    async def _calm_down(self, url: str) -> list[str]:
        """Nobody is stopped or cut off any more, who shall end has ended, and the destination has its own verdict."""
        left: list[str] = []
        await until(lambda: self._busy == 0, self.plan.seconds + SLACK_S)
        limits, kind = self.stage.limits, self.plan.kind
        if self._acted and kind.act is Act.TERM:
            victim = self.source if kind.side is Side.SOURCE else self.target
            if not await victim.ended(limits.shutdown_grace + limits.commit + SLACK_S):
                left.append(f"the {kind.side.value if kind.side else ''} process, which was told to end")
        assert self._box is not None
        if MessageType.SETUP not in self._box.passed and self.target.alive:  # it still waits for a source, rightly
            with trio.move_on_after(CANCEL_LIMIT_S):
                with contextlib.suppress(TrivmmError):
                    await self.target.client.cancel_migration()
        with trio.move_on_after(max(limits.stall, limits.commit) + limits.rollback + SLACK_S) as scope:
            await self._received.wait()
        if scope.cancelled_caught:
            left.append("the destination still receives")
        return left

    async def _look(self) -> tuple[Copy, Copy]:
        """Both sides' states, and whether the guest speaks there."""
        hosts = self.source, self.target
        before = [host.said() for host in hosts]
        copies = [await host.copy() for host in hosts]
        with trio.move_on_after(SPEAK_LIMIT_S):
            # Asked again and again: a source tells its verdict before its VM, which stands still, is ended.
            while _is_mute(hosts, copies, before):
                await trio.sleep(POLL_S)
                copies = [await host.copy() for host in hosts]
        before = [host.said() for host in hosts]
        with trio.move_on_after(SPEAK_LIMIT_S):
            await trio.sleep(QUIET_S)
            while _is_mute(hosts, copies, before):  # noqa: ASYNC110 - another process's doing
                await trio.sleep(POLL_S)
        spoke = [host.said() > said for host, said in zip(hosts, before, strict=True)]
        first, second = (attrs.evolve(copy, speaks=heard) for copy, heard in zip(copies, spoke, strict=True))
        return first, second

    async def _resolve(self, copies: tuple[Copy, Copy]) -> tuple[str, bool, tuple[Copy, Copy]]:
        """As an operator would, who first tries the wrong thing: (what resume came to, both ran, how it is now)."""
        try:
            with trio.fail_after(ASK_LIMIT_S + self.stage.limits.resolve):
                await self.source.client.resume()
            answer = "resumed"
        except (TrivmmError, trio.TooSlowError) as error:
            answer = str(error)
        after = await self._look()
        if not after[0].runs and not self.target.alive:  # only an operator can know that
            with trio.move_on_after(ASK_LIMIT_S + self.stage.limits.resolve), contextlib.suppress(TrivmmError):
                await self.source.client.resolve_migration(force=True)
                await self.source.client.resume()
                answer += "; resumed by force"
            after = await self._look()
        two = after[0].runs and after[1].runs
        if after[1].runs and after[0].state is not None and not two:
            with trio.move_on_after(ASK_LIMIT_S):
                with contextlib.suppress(TrivmmError):
                    await self.source.client.delete()
        return answer, two, after

    async def _guest_says(self, copies: tuple[Copy, Copy]) -> tuple[int, tuple[str, ...]]:
        """(errors, problems), once the copy that runs has looked at all its pages again. Of two nobody knows."""
        if copies[0].runs and copies[1].runs:
            return 0, ()
        for host, copy in zip((self.source, self.target), copies, strict=True):
            if not copy.runs:
                continue
            await until(partial(_has_reported, host), SPEAK_LIMIT_S)
            if not await until(partial(_has_looked, host, host.report()), CHECK_LIMIT_S):
                return 0, ("it did not look at all its pages in time",) if host.alive else ()
            latest = host.report()
            if latest.errors:
                return latest.errors, latest.problems
        return 0, ()

    async def _left_over(self, url: str, sent: Sent, copies: tuple[Copy, Copy]) -> list[str]:
        limits, left = self.stage.limits, []
        assert self._box is not None
        # A destination that runs a VM whose source was not heard any more answers for ever, any other one for a while.
        answers = copies[1].runs and MessageType.DONE not in self._box.passed
        if not answers and not await until(
            lambda: not self.target.alive or not listens(url), 2 * (limits.commit + 1) + SLACK_S
        ):
            left.append(f"a listener at {url}")
        ended = self.plan.kind.act in (Act.KILL, Act.TERM) and self._acted
        for host, copy, side in zip((self.source, self.target), copies, Side, strict=True):
            hurt = ended and self.plan.kind.side is side
            if not host.alive and not hurt:
                left.append(f"nothing of the {side.value}, which ended by itself{host.end()}: {host.last_words()}")
            gone = hurt and self.plan.kind.act is Act.TERM and not host.alive
            left += [f"{each} of the {side.value}" for each in host.strangers(gone)]
            if not host.alive or copy.runs or (side is Side.SOURCE and sent is Sent.IN_DOUBT):
                continue
            if not await host.is_empty(limits.shutdown_grace + SLACK_S):
                left.append(f"a VM in the {side.value}, {(await host.copy()).state}")
            elif not await until(partial(_has_no_vm, host), limits.free + SLACK_S):
                found = ", ".join(sorted(set(host.vm_descriptors())))
                left.append(f"descriptors of a VM in the {side.value}, which has none: {found}")
        if not (ended and self.plan.kind.act is Act.KILL):  # a killed one can't tidy up; the next one at its path does
            listener = url.rpartition("/")[2]
            mine = {listener, f"{listener}.lock"} if answers else set()
            left += sorted(files_in(self.stage.folder) - self._files_before - mine)
        return left

    async def _afterwards(self, seen: Observation, copies: tuple[Copy, Copy]) -> Observation:
        """The stage for the next trial, and a plain move, where there is a guest that was hurt."""
        owner = self.target if copies[1].runs else self.source if copies[0].runs else None
        if seen.overlap or seen.two_after_resume or (copies[0].runs and copies[1].runs) or seen.guest_errors:
            owner = None
        if owner is None:
            await self.stage.drop(self.source, self.target)
            self.stage.source = self.stage.idle = None
            return seen
        await self.stage.settle(owner, self.source, self.target)
        if not self._acted and seen.sent is Sent.FINISHED:
            return seen
        try:
            await self.stage.plain_move()
        except TrivmmError as error:
            await self.stage.clear()
            return attrs.evolve(seen, next_move=str(error))
        return seen


def _is_mute(hosts: Sequence[Host], copies: Sequence[Copy], before: Sequence[int]) -> bool:
    """Whether a copy that is said to run has written nothing since then."""
    return any(
        copy.state == "Running" and host.said() == said for host, copy, said in zip(hosts, copies, before, strict=True)
    )


def _has_reported(host: Host) -> bool:
    return host.report().reports > 0


def _has_looked(host: Host, first: ProbeReport) -> bool:
    """At all its pages since ``first``, or it has found something."""
    latest = host.report()
    return latest.errors > 0 or (first.reports > 0 and latest.checked >= first.checked + latest.pages)


def _has_no_vm(host: Host) -> bool:
    return not host.vm_descriptors()


_ENDS: Final = {
    "DONE": Sent.FINISHED,
    "FAILED": Sent.FAILED,
    "CANCELLED": Sent.CANCELLED,
    "IN_DOUBT": Sent.IN_DOUBT,
}
