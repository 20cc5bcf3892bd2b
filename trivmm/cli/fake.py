"""``trivmm fake``: the whole API without a guest, failing on cue; for tests of what is built around a VMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from trivmm.cli.options import parse_deadlines, parse_socket
from trivmm.cli.parser import Parser, UsageError
from trivmm.cli.run import RunOptions, serve
from trivmm.syntax import parse_integer

__all__ = ["fake"]

MAX_RATE: Final = 100_000  # pages a second: what a Python script of exits can write, about

ABOUT: Final = """\
The whole API on scripted vCPUs: no guest, no /dev/kvm, no kernel file. Migrations between two of them are real.

faults:
  VERB=error[:TEXT]              the verb fails         VERB=delay:2s   it takes so long
  pause=timeout                  after its deadline, the VM runs on
  send-migration=PHASE:KIND      PHASE setup, precopy, switchover, commit; KIND lost, stall:SECONDS,
                                 refused (setup, commit), in-doubt, deaf:SECONDS (commit)
  …,times=N                      only N times
GET and PUT /api/v1/fake.faults read and replace the list while it runs; a stall ends with that."""


def fake(arguments: Sequence[str]) -> int:
    """Serves until it is told to end. Gives the exit code of ``trivmm run``."""
    parser = Parser("trivmm fake", ABOUT)
    parser.add_argument("--api-socket", metavar="path=FILE", help="serve the HTTP API on this unix socket")
    parser.add_argument(
        "--fail", metavar="FAULT", action="extend", nargs="+", default=[], help="what shall fail; may be repeated"
    )
    parser.add_argument("--rate", metavar="PAGES", default="200", help="pages that the guest writes a second (200)")
    parser.add_argument("--event-monitor", metavar="path=FILE|fd=N", help="write what happens there, as JSON")
    parser.add_argument("--deadlines", metavar="NAME=SECONDS[,…]", nargs="+", action="extend", default=[])
    parser.add_argument("--stay-after-migration", action="store_true", help="keep serving after the VM migrated away")
    parser.add_argument("--log-file", metavar="FILE", help="where the log goes (stderr)")
    parser.add_argument("-v", action="count", default=0, dest="verbose", help="log more")
    given = parser.parse(arguments)
    if given.api_socket is None:
        raise UsageError("--api-socket: missing; give path=FILE")
    rate = parse_integer("--rate", given.rate)
    if rate > MAX_RATE:
        raise UsageError(f"--rate {rate}: too many pages a second; give at most {MAX_RATE}")

    from trivmm.testing.fake import VERBS, fake_hypervisor
    from trivmm.testing.faults import Faults, parse_fault

    options = RunOptions(
        config=None,
        api_socket=parse_socket(given.api_socket),
        hypervisor="scripted",
        deadlines=parse_deadlines(given.deadlines),
        stay_after_migration=given.stay_after_migration,
        stay_after_shutdown=True,
        log_file=given.log_file,
        verbose=given.verbose,
        event_monitor=given.event_monitor,
    )
    return serve(options, Faults([parse_fault(each, VERBS) for each in given.fail]), fake_hypervisor(rate))
