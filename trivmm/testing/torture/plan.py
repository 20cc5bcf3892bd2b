"""What a trial does: the kinds of harm, where on the road they happen, and the draw from seed and number. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from random import Random
from typing import Final

import attrs

from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError
from trivmm.migration.wire.frame import MessageType

__all__ = ["KINDS", "QUICK", "Act", "Kind", "Plan", "Point", "Side", "draw", "parse_kinds", "parse_points"]

_T = MessageType

QUICK: Final = Deadlines(connect=3, handshake=5, stall=5, commit=3)  # in the defaults' order, so that a trial is short
INSTANT_SHARE: Final = 0.3  # of the trials that happen at a random instant and not at a message
LATEST: Final = 1.1  # a random instant lies within so many lengths of an undisturbed move
SHORT: Final = (0.1, 0.5)  # of the commit deadline: what is over so soon leaves time for the question and its answer
LONG: Final = (1.25, 1.8)
DISKLESS_SHARE: Final = 0.5  # of the guests that have no disk, hence no lock that could keep a second copy away
FRAME_REACH: Final = (4, 40)  # a scripted guest fills a handful of PAGES frames, the probe guest some thirty
MAX_LAG: Final = 40  # frames
NEVER: Final = 1 << 20  # frames: there are not so many, so that it comes again after the last pages
LEADS_S: Final = (0.002, 0.05)  # "before" means that the process could see the signal first, at once or at leisure
MAX_ROUND: Final = 3  # the guest is small: more rounds are rare


class Side(enum.Enum):
    SOURCE = "source"
    DESTINATION = "destination"


class Act(enum.Enum):
    """``CLOSE`` … ``REPEAT`` are the box's; ``CUT`` also keeps new connections away, until it heals."""

    NOTHING = "nothing"
    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    TERM = "SIGTERM"
    CANCEL = "cancel"
    CLOSE = "close"
    RESET = "reset"
    SILENT = "silent"
    CUT = "cut"
    DELAY = "delay"
    DROP = "drop"
    REPEAT = "repeat"


@attrs.frozen
class Kind:
    """``points``: the messages at which it may happen, none: at no message. ``instants``: at random instants too.
    ``about``: for the table of ``--help``. ``outlasts``: always longer than ``commit``, never shorter."""

    name: str
    act: Act
    about: str
    side: Side | None = None
    points: tuple[MessageType, ...] = ()
    instants: bool = True
    outlasts: bool = False
    resume: bool = False


ROAD: Final = (_T.SETUP, _T.PAGES, _T.ROUND_END, _T.STATE, _T.READY, _T.COMMIT, _T.RUNNING, _T.DONE)
FRAMES: Final = (_T.PAGES, _T.ZERO, *ROAD[2:])
_S, _D = Side.SOURCE, Side.DESTINATION

_KINDS: Final = (
    Kind("move", Act.NOTHING, "nothing happens to it", instants=False),
    Kind("kill-source", Act.KILL, "SIGKILL of the source", _S, ROAD),
    Kind("kill-destination", Act.KILL, "SIGKILL of the destination", _D, ROAD),
    Kind("stop-source", Act.STOP, "SIGSTOP of the source, shorter or longer than commit", _S, ROAD),
    Kind("stop-destination", Act.STOP, "SIGSTOP of the destination, shorter or longer than commit", _D, ROAD),
    Kind("term-source", Act.TERM, "SIGTERM of the source", _S, ROAD),
    Kind("term-destination", Act.TERM, "SIGTERM of the destination", _D, ROAD),
    Kind("cancel-source", Act.CANCEL, "vm.cancel-migration at the source", _S, ROAD),
    Kind("cancel-destination", Act.CANCEL, "vm.cancel-migration at the destination", _D, ROAD),
    Kind("close", Act.CLOSE, "a box in between closes the link in good order; new links are served", None, ROAD),
    Kind("reset", Act.RESET, "the link is reset; new ones are served", None, ROAD),
    Kind("silent", Act.SILENT, "the link goes silent and stays open; new ones are served", None, ROAD),
    Kind("cut", Act.CUT, "the link goes silent and new ones are closed, for a time", None, ROAD),
    Kind("delay", Act.DELAY, "one frame is held back for a time", None, FRAMES, instants=False),
    Kind("drop", Act.DROP, "one whole frame is lost", None, FRAMES, instants=False),
    Kind("repeat", Act.REPEAT, "one whole frame comes twice, at once or later", None, FRAMES, instants=False),
    Kind(
        "resume",
        Act.CUT,
        "in doubt, since the destination could not be asked; then the operator resumes the source",
        None,
        (_T.COMMIT, _T.RUNNING),
        instants=False,
        outlasts=True,
        resume=True,
    ),
)

KINDS: Final[dict[str, Kind]] = {kind.name: kind for kind in _KINDS}


@attrs.frozen
class Point:
    """At the ``nth`` ``message`` (from 1), before or after it goes on; without one, after ``share`` of the time that
    an undisturbed move takes."""

    message: MessageType | None = None
    nth: int = 1
    before: bool = True
    share: float = 0.0

    def __str__(self) -> str:
        if self.message is None:
            return f"at {self.share:.2f} of a move"
        number = f" {self.nth}" if self.message is _T.ROUND_END or self.nth > 1 else ""
        return f"{'before' if self.before else 'after'} {self.message.name}{number}"


@attrs.frozen
class Plan:
    """``seconds``: how long a stop, a cut or a delay lasts; ``lag``: after how many others a frame comes again;
    ``lead_s``: how long a frame waits for the process to see a signal; ``disk``: the guest has one, whose lock only one
    side can have."""

    number: int
    kind: Kind
    transport: str
    disk: bool
    point: Point
    seconds: float = 0.0
    lag: int = 0
    lead_s: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.2f} s" if self.seconds else ""
        if self.kind.act is Act.REPEAT:
            lasts = " at the end" if self.lag == NEVER else f" after {self.lag} more"
        elif self.kind.act is Act.TERM and self.point.before and self.point.message is not None:
            lasts = f" by {self.lead_s * 1000:g} ms"
        disk = "a disk" if self.disk else "no disk"
        where = "" if self.kind.act is Act.NOTHING else f" {self.point}"
        return f"{self.kind.name}{where}{lasts} ({self.transport}, {disk})"


def draw(seed: int, number: int, kinds: Sequence[Kind], limits: Deadlines) -> Plan:
    """The plan of trial ``number`` (from 0): the kinds take turns, everything else is drawn."""
    turn, place = divmod(number, len(kinds))
    order = list(kinds)
    Random(f"{seed}/order/{turn}").shuffle(order)
    kind = order[place]
    random = Random(f"{seed}/{number}/{kind.name}")
    transport = random.choice(("unix", "tcp"))
    disk = not kind.resume and random.random() >= DISKLESS_SHARE
    point = _point(random, kind)
    seconds = 0.0
    if kind.act in (Act.STOP, Act.CUT, Act.DELAY):
        share = LONG if kind.outlasts or random.random() < 0.5 else SHORT
        seconds = limits.commit * random.uniform(*share)
    lag = random.choice((0, random.randint(1, MAX_LAG), NEVER, NEVER)) if kind.act is Act.REPEAT else 0
    lead_s = random.choice(LEADS_S) if kind.act is Act.TERM else 0.0
    return Plan(number, kind, transport, disk, point, seconds, lag, lead_s)


def _point(random: Random, kind: Kind) -> Point:
    if not kind.points or (kind.instants and random.random() < INSTANT_SHARE):
        return Point(share=random.uniform(0, LATEST))
    message = random.choice(kind.points)
    nth = 1
    if message is _T.ROUND_END:
        nth = random.randint(1, MAX_ROUND)
    elif message is _T.PAGES and kind.act in (Act.DELAY, Act.DROP, Act.REPEAT):  # which pages are in it is what matters
        nth = random.randint(1, random.choice(FRAME_REACH))
    before = kind.act in (Act.DELAY, Act.DROP, Act.REPEAT) or random.random() < 0.5
    if kind.resume:  # the destination has COMMIT, and the source no answer
        before = message is _T.RUNNING
    return Point(message, nth, before)


def parse_points(text: str, kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """The kinds as far as they happen at the messages of ``"COMMIT,RUNNING"``, and at those only; ``move`` stays.

    :raises ConfigError: names what is no message, or one at which none of the kinds happens."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in MessageType.__members__:
            raise ConfigError(
                "--points", name, "no such message", f"give some of {', '.join(each.name for each in ROAD)}"
            )
    wanted = [MessageType[name] for name in names]
    limited = [
        attrs.evolve(kind, points=points, instants=False)
        for kind in kinds
        if (points := tuple(each for each in kind.points if each in wanted)) or kind.act is Act.NOTHING
    ]
    if not any(kind.points for kind in limited):
        raise ConfigError("--points", text, "none of the kinds happens there", "give other kinds, or other messages")
    return tuple(limited)


def parse_kinds(text: str | None) -> tuple[Kind, ...]:
    """``"kill-source,cut"``; None or ``all``: all of them. :raises ConfigError: names the one that is not there."""
    if text is None or text == "all":
        return _KINDS
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in KINDS:
            raise ConfigError("--kinds", name, "no such kind", f"give some of {', '.join(KINDS)}")
    if not names:
        raise ConfigError("--kinds", text, "no kind", f"give some of {', '.join(KINDS)}")
    return tuple(KINDS[name] for name in dict.fromkeys(names))
