"""``python -m trivmm.testing.torture``: its options, its run, its exit code."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

import attrs
import trio

from trivmm.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, say_error
from trivmm.cli.options import parse_deadlines
from trivmm.cli.parser import Parser, UsageError
from trivmm.deadlines import TABLE, Deadlines
from trivmm.errors import ConfigError, HypervisorError, TrivmmError
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.syntax import parse_integer
from trivmm.testing.torture.judge import judge
from trivmm.testing.torture.plan import KINDS, QUICK, Kind, draw, parse_kinds, parse_points
from trivmm.testing.torture.report import Result, Results
from trivmm.testing.torture.stage import open_stage
from trivmm.testing.torture.trial import run_trial

__all__ = ["Options", "main", "parse", "torture"]

HYPERVISORS: Final = ("auto", "kvm", "soft", "scripted")
MAX_TRIALS: Final = 1_000_000

ABOUT: Final = """\
Moves a guest between real VMM processes, hurts them and the link on the way, and says what became of the guest.

Exit code 1: a promise of docs/migration.md was broken. A trial depends on the seed and its number alone:
--seed S --first N --trials 1, with the same kinds and points, is that trial again.

kinds:
"""


@attrs.frozen
class Options:
    """``first``: the first trial's number. ``time_s``: no new trial after that long. ``keep_going``: after a broken
    promise, too."""

    trials: int = 100
    seed: int = 0
    first: int = 0
    hypervisor: str = "auto"
    kinds: tuple[Kind, ...] = tuple(KINDS.values())
    deadlines: Deadlines = QUICK
    time_s: float | None = None
    keep_going: bool = False
    as_json: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """:raises UsageError: / :raises ConfigError: one line each."""
    listed = "\n".join(f"  {kind.name:18} {kind.about}" for kind in KINDS.values())
    parser = Parser("python -m trivmm.testing.torture", ABOUT + listed)
    parser.add_argument("--trials", default="100", metavar="N", help="how many (100)")
    parser.add_argument("--seed", metavar="S", help="a number; the same one draws the same trials (a new one)")
    parser.add_argument("--first", default="0", metavar="N", help="the first trial's number (0)")
    parser.add_argument("--hypervisor", default="auto", metavar="|".join(HYPERVISORS), help="what the guest runs on")
    parser.add_argument("--kinds", metavar="KIND[,…]", help="only these")
    parser.add_argument("--points", metavar="MESSAGE[,…]", help="only at these, such as READY,COMMIT,RUNNING")
    quick = ",".join(f"{row}={getattr(QUICK, row):g}" for row in TABLE if getattr(QUICK, row) != TABLE[row].default_s)
    parser.add_argument(
        "--deadlines", metavar="NAME=SECONDS[,…]", nargs="+", action="extend", default=[], help=f"besides {quick}"
    )
    parser.add_argument("--time", metavar="SECONDS", help="begin no trial after so long")
    parser.add_argument("--keep-going", action="store_true", help="go on after a broken promise")
    parser.add_argument("--json", action="store_true", help="the result as JSON; a line per trial goes to stderr")
    given = parser.parse(arguments)
    kinds = parse_kinds(given.kinds)
    if given.hypervisor not in HYPERVISORS:
        raise ConfigError("--hypervisor", given.hypervisor, "unknown", f"give {', '.join(HYPERVISORS)}")
    trials, time_s = parse_integer("--trials", given.trials), None
    if not 1 <= trials <= MAX_TRIALS:
        raise ConfigError("--trials", trials, "out of range", f"give 1 to {MAX_TRIALS}")
    if given.time is not None and (time_s := float(parse_integer("--time", given.time))) < 1:
        raise ConfigError("--time", given.time, "not a time", "give seconds, at least 1")
    return Options(
        trials=trials,
        seed=secrets.randbelow(1 << 31) if given.seed is None else parse_integer("--seed", given.seed),
        first=parse_integer("--first", given.first),
        hypervisor=given.hypervisor,
        kinds=kinds if given.points is None else parse_points(given.points, kinds),
        deadlines=parse_deadlines([quick, *given.deadlines]),
        time_s=time_s,
        keep_going=given.keep_going,
        as_json=given.json,
    )


async def torture(options: Options, folder: Path, results: Results) -> None:
    """Fills ``results`` as it goes. :raises TrivmmError: trials can't be had here."""
    hypervisor = options.hypervisor
    if hypervisor != "scripted":
        chosen = choose_hypervisor(hypervisor)
        hypervisor = chosen.name
        chosen.close()
    told = sys.stderr if options.as_json else sys.stdout
    began = trio.current_time()
    async with open_stage(folder, hypervisor, options.deadlines) as stage:
        for number in range(options.first, options.first + options.trials):
            start = trio.current_time()
            if options.time_s is not None and start - began >= options.time_s:
                return
            plan = draw(options.seed, number, options.kinds, options.deadlines)
            seen = await run_trial(stage, plan)
            result = Result(plan, seen, judge(plan, seen, options.deadlines), trio.current_time() - start)
            results.results.append(result)
            _tell(result.line(), told)
            if not result.judgement.ok:
                await stage.clear()
                if not options.keep_going:
                    return


def _tell(text: str, stream: TextIO) -> None:
    """A reader that went away ends nothing: the exit code is still wanted."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


async def _until_told(options: Options, folder: Path, results: Results) -> TrivmmError | int | None:
    """What ended it early: an error, a signal."""
    told: TrivmmError | int | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def on_signal() -> None:
                nonlocal told
                async for number in signals:
                    told = number
                    nursery.cancel_scope.cancel()
                    return

            nursery.start_soon(on_signal)
            try:
                await torture(options, folder, results)
            except TrivmmError as error:
                told = error
            nursery.cancel_scope.cancel()
    return told


def main(arguments: Sequence[str]) -> int:
    """Gives the exit code: 0 when every promise was kept, 1 when one was broken."""
    try:
        options = parse(arguments)
        results = Results()
        with tempfile.TemporaryDirectory(prefix="trivmm-torture-") as folder:
            told = trio.run(_until_told, options, Path(folder), results)
    except (UsageError, ConfigError) as error:
        say_error(error)
        return EXIT_USAGE
    if isinstance(told, ConfigError | HypervisorError):  # there is no such thing here: no trial was begun
        say_error(told)
        return EXIT_USAGE
    if options.as_json:
        _tell(json.dumps({"seed": options.seed, **results.json()}, indent=2), sys.stdout)
    else:
        _tell(f"\nseed {options.seed}, {len(results.results)} trials\n{results.table()}", sys.stdout)
    if isinstance(told, TrivmmError):
        say_error(told)
        return EXIT_FAILED
    return EXIT_FAILED if not results.ok else 0 if told is None else EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
