"""``python -m trivmm.testing.torture`` on scripted vCPUs: a short part of it, of the kinds whose promises hold."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from trivmm.migration.wire.frame import MessageType
from trivmm.testing.control import command_environment
from trivmm.testing.scripted import Compute, ScriptedHypervisor
from trivmm.testing.torture import scripted
from trivmm.testing.torture.hosts import Host, guest_config
from trivmm.testing.torture.judge import Observation, Sent, Verdict, judge
from trivmm.testing.torture.plan import KINDS, QUICK, Plan, Point
from trivmm.testing.torture.stage import Stage, open_stage
from trivmm.testing.torture.trial import run_trial

LIMIT_S = 120
COMMAND = [sys.executable, "-P", "-m", "trivmm.testing.torture", "--hypervisor", "scripted"]
KINDS_TRIED = (
    "kill-destination", "stop-source", "stop-destination", "term-source", "term-destination", "cancel-destination",
    "silent", "close", "drop", "resume",
)  # fmt: skip
POINTS = "SETUP,PAGES,ROUND_END,STATE,READY,COMMIT,RUNNING"


def test_a_short_torture_breaks_no_promise() -> None:
    """Each kind once; the seed is one that has as many before COMMIT as about it, and a guest that need not be booted
    anew for each."""
    trials = len(KINDS_TRIED)
    words = ["--trials", str(trials), "--seed", "3430", "--kinds", ",".join(KINDS_TRIED), "--points", POINTS, "--json"]
    words += ["--deadlines", "commit=1.5"]
    done = subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=LIMIT_S, env=command_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kinds"]["all"]["trials"] == trials
    assert told["kinds"]["all"]["harmed"] >= trials - 1  # what comes after RUNNING may come after the verdict
    assert told["kinds"]["all"]["two copies"] == 0
    assert [trial["trial"] for trial in told["trials"]] == list(range(trials))
    assert {trial["kind"] for trial in told["trials"]} == set(KINDS_TRIED)


def plan(kind: str, message: MessageType, *, before: bool = True) -> Plan:
    return Plan(0, KINDS[kind], "unix", False, Point(message, 1, before))


async def test_what_was_really_seen_is_judged_by_what_was_really_done(tmp_path: Path) -> None:
    """A guest that goes with its killed source breaks no promise; one that goes when nobody was killed does."""
    killed = plan("kill-source", MessageType.PAGES)
    with trio.fail_after(LIMIT_S):
        async with open_stage(tmp_path, "scripted", QUICK) as stage:
            seen = await run_trial(stage, killed)
    assert (seen.harmed, seen.committed, seen.sent) == (True, False, Sent.UNKNOWN)
    assert judge(killed, seen, QUICK).verdict is Verdict.LOST
    assert judge(killed, seen, QUICK).ok
    nobody_killed = judge(plan("close", MessageType.PAGES), seen, QUICK)
    assert [each.partition(" (")[0] for each in nobody_killed.broken] == ["lost"]


async def test_a_second_copy_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody boots the guest once more, and the source is asked as if that were its copy."""
    plain, said, copy = Stage.prepare, Host.said, Host.copy

    async def prepare(stage: Stage, disk: bool) -> tuple[Host, Host]:
        source, target = await plain(stage, disk)
        twin = await stage.start()
        await twin.client.create(guest_config(stage.folder, "scripted", disk))
        await twin.client.boot()
        monkeypatch.setattr(Host, "said", lambda self: said(self) + (said(twin) if self is source else 0))
        monkeypatch.setattr(Host, "copy", lambda self: copy(twin if self is source else self))
        return source, target

    monkeypatch.setattr(Stage, "prepare", prepare)
    with trio.fail_after(LIMIT_S):
        async with open_stage(tmp_path, "scripted", QUICK) as stage:
            seen: Observation = await run_trial(stage, plan("move", MessageType.SETUP))
    found = judge(plan("move", MessageType.SETUP), seen, QUICK)
    assert found.verdict is Verdict.TWO_COPIES
    assert "two copies ran" in found.broken


def test_a_signal_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    environment = {**command_environment(), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*COMMAND, "--kinds", "move"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert "move" in process.stdout.readline()  # processes there, a trial done
        (folder,) = tmp_path.iterdir()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert "one copy" in said
    assert not folder.exists()
    assert not [path for path in Path("/proc").glob("[0-9]*/cwd") if _points_into(path, folder)]


def _points_into(link: Path, folder: Path) -> bool:
    try:
        return str(link.readlink()).startswith(str(folder))
    except OSError:
        return False


def test_the_scripted_guest_finds_what_is_wrong_with_its_memory() -> None:
    vm = ScriptedHypervisor(scripted.checking_guest(), needs_payload=False).open_vm()
    memory = bytearray(16 << 20)
    from trivmm._native import ffi

    vm.add_memory(0, 0, len(memory), int(ffi.cast("uintptr_t", ffi.from_buffer(memory))))
    cpu = vm.create_vcpu(0)
    assert isinstance(cpu, scripted.ScriptedVcpu)
    steps = scripted.checking_guest()(cpu)

    def tick() -> None:
        while not isinstance(next(steps), Compute):
            pass

    for _ in range(40):
        tick()
    assert cpu.registers["checked"] > scripted.PAGES
    assert cpu.registers["errors"] == 0
    lost, stale = 100, 200
    for page, generation in ((lost, 0), (stale, cpu.registers["made"][stale] - 1)):
        vm.store(
            (scripted.FIRST_PAGE + page) * scripted.PAGE_BYTES, scripted.STAMP.pack(page * bool(generation), generation)
        )
    for _ in range(40):
        tick()
    assert cpu.registers["errors"] in (1, 2)  # the guest writes some pages before it looks at them
