"""Moves between two processes with a fault around COMMIT: how many end in doubt, and whether one copy runs.

    python benchmarks/doubt.py [TRIALS [SEED]]

The source is stopped (SIGSTOP), a middle box closes or silences the link, at COMMIT or RUNNING, with or without the
frame; now and then nobody can be reached afterwards, or the destination is stopped, which is what doubt is for. Then
the doubt is resolved by asking again. Prints a table; exits 1 when a trial that could be asked about ended in doubt,
when two copies or none ran, or when asking again did not settle it. The guests are `trivmm fake`'s and have no disk.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trivmm.migration.wire.frame import MessageType
from trivmm.testing.middlebox import MiddleBox, Strike, middle_box
from trivmm.testing.plugin import FakeVmm, open_fake_vmm

COMMIT_S = 1.0
OPTIONS = ["--deadlines", f"commit={COMMIT_S},resolve=2", "--stay-after-migration"]
LIMIT_S = 60.0
VM = {"payload": {"kernel": "none is looked for"}, "memory": {"size": 32 << 20}}
KINDS = ("source stopped", "silent link", "closing box", "stopped and silent", "stopped and closing")
UNREACHABLE = ("unreachable", "destination stopped")


def stop(fake: FakeVmm, seconds: float) -> Callable[[], None]:
    def work() -> None:
        os.kill(fake.process.pid, signal.SIGSTOP)
        threading.Timer(seconds, os.kill, (fake.process.pid, signal.SIGCONT)).start()

    return work


def running(fake: FakeVmm) -> bool:
    status, info = fake.call("GET", "vm.info")
    return status == 200 and info["state"] == "Running"


def wait(true: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < until, otherwise
        time.sleep(0.01)


def strike(kind: str, chance: random.Random, source: FakeVmm, target: FakeVmm, box: MiddleBox) -> Strike:
    at = chance.choice((MessageType.COMMIT, MessageType.RUNNING))
    forward = chance.random() < 0.5
    seconds = chance.uniform(0.2, 2.5) * COMMIT_S

    def cut() -> None:
        box.down = True

    match kind:
        case "source stopped":
            return Strike(at, "pass", forward=True, first=stop(source, seconds))
        case "silent link":
            return Strike(at, "silence", forward)
        case "closing box":
            return Strike(at, "close", forward)
        case "stopped and silent":
            return Strike(at, "silence", forward, first=stop(source, seconds))
        case "stopped and closing":
            return Strike(at, "close", forward, first=stop(source, seconds))
        case "unreachable":
            return Strike(at, "close", first=cut)
    return Strike(MessageType.COMMIT, "pass", forward=True, first=stop(target, 2.5 * COMMIT_S))


def move(source: FakeVmm, target: FakeVmm, box: MiddleBox) -> dict[str, Any]:
    url = {"receiver_url": f"unix:{box.target}"}
    receiving = threading.Thread(target=target.call, args=("PUT", "vm.receive-migration", url))
    receiving.start()
    wait(Path(box.target).exists, "the destination does not listen")
    request = {"destination_url": box.url, "downtime_ms": 10_000}
    status, said = source.call("PUT", "vm.send-migration", request)
    assert status == 204, said
    progress: dict[str, Any] = {"state": {"Ongoing": {}}}

    def ended() -> bool:
        progress.update(source.call("GET", "vm.migration-progress")[1])
        return "Ongoing" not in progress["state"]

    wait(ended, "no verdict")
    receiving.join(LIMIT_S)
    return progress


def trial(kind: str, chance: random.Random, source: FakeVmm, target: FakeVmm, folder: str) -> str:
    """``moved``, ``stayed``, or ``in doubt: `` and what asking again found; ``broken: …``."""
    with middle_box(f"{folder}/box.sock", f"{folder}/there.sock") as box:
        box.strike = strike(kind, chance, source, target, box)
        progress = move(source, target, box)
        phase = progress["phase"]
        ended = "moved" if phase == "DONE" else "stayed"
        if phase == "IN_DOUBT":
            if running(source):
                return "broken: in doubt and running"
            box.down = False
            found = source.call("PUT", "vm.resolve-migration")[1]
            ended = f"in doubt: {found['verdict']}"
            if found["verdict"] == "refused":
                source.call("PUT", "vm.resume")
        if ended in ("moved", "in doubt: running"):
            wait(lambda: source.call("GET", "vm.info")[0] == 404, "the source keeps its VM")
            wait(lambda: not Path(box.target).exists(), "the destination does not leave the address")
    copies = running(source) + running(target)
    return ended if copies == 1 else f"broken: {copies} copies ({ended})"


def main(trials: int, seed: int) -> int:
    chance, table = random.Random(seed), collections.Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        here, there = (stack.enter_context(open_fake_vmm(Path(folder), name, options=OPTIONS)) for name in "ab")
        for route, body in (("vm.create", VM), ("vm.boot", None)):
            assert here.call("PUT", route, body)[0] == 204
        for number in range(trials):
            kind = chance.choice(UNREACHABLE) if number % 10 == 9 else KINDS[number % len(KINDS)]
            ended = trial(kind, chance, here, there, folder)
            table[kind, ended] += 1
            if ended.startswith("broken"):
                print(f"trial {number}: {kind}: {ended}", flush=True)
                break
            if running(there):
                here, there = there, here
    bad = 0
    for (kind, ended), count in sorted(table.items()):
        doubt = ended.startswith("in doubt")
        wrong = ended.startswith("broken") or (
            doubt and (kind in KINDS or ended.split()[-1] not in ("running", "refused"))
        )
        bad += count if wrong else 0
        print(f"{kind:22}{ended:24}{count:5}{'   WRONG' if wrong else ''}")
    print(f"{sum(table.values())} trials, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
