"""The options of ``trivmm demo``; the demo itself is ``trivmm.cli.demo``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from trivmm.cli.parser import Parser

__all__ = ["demo"]


def spare_cpus() -> int:
    """The guest's vCPUs never rest: leave a core for moving it, so that the rates compare like with like."""
    return max(1, min(2, len(os.sched_getaffinity(0)) - 1))


def demo(arguments: Sequence[str]) -> int:
    """Gives the exit code: 0 when every move completed and the guest lost nothing."""
    parser = Parser("trivmm demo", "A guest under load moves live between two processes while it cycles its devices.")
    parser.add_argument("--moves", type=int, default=6, metavar="N", help="migrations (6)")
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="the guest's RAM (256M)")
    parser.add_argument(
        "--cpus", type=int, default=spare_cpus(), metavar="N", help="vCPUs (2, or what leaves a core; soft runs 1)"
    )
    parser.add_argument("--rate", type=int, default=500, metavar="PAGES", help="pages dirtied a second (500)")
    parser.add_argument("--downtime-ms", type=int, default=300, metavar="MS", help="the limit (300)")
    parser.add_argument("--hypervisor", default="auto", metavar="auto|kvm|soft")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    given = parser.parse(arguments)

    import trio

    from trivmm.cli.demo import DemoOptions, run_demo
    from trivmm.signals import Told

    options = DemoOptions(
        moves=given.moves,
        memory=given.memory,
        cpus=given.cpus,
        rate=given.rate,
        downtime_ms=given.downtime_ms,
        hypervisor=given.hypervisor,
        as_json=given.json,
    )
    with Told() as told:
        return trio.run(run_demo, options, told)
