"""``trivmm fake``: the API over a socket, failing on cue in every phase; seen by the standard library and by curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trivmm.errors import ConfigError
from trivmm.testing.fake import VERBS
from trivmm.testing.faults import parse_fault
from trivmm.testing.plugin import FakeVmm
from trivmm.testing.processes import FAKE_VM, booted, outcome, phase, receiving, state, until

LIMIT_S = 30
Start = Callable[..., FakeVmm]


def moved(source: FakeVmm, target: FakeVmm, path: Path) -> tuple[dict[str, Any], int | None]:
    """A migration from one to the other: the source's last progress, and what receive-migration answered."""
    with receiving(target, path) as there:
        assert source.call("PUT", "vm.send-migration", {"destination_url": there.url, "downtime_ms": 2000})[0] == 204
        progress = outcome(source)
    return progress, there.status


def test_a_life_without_faults(fake_vmm: Start, tmp_path: Path) -> None:
    source, target = fake_vmm(), fake_vmm()
    assert source.call("GET", "vmm.ping")[1]["fake"] is True
    booted(source)
    assert source.call("PUT", "vm.pause") == (204, None)
    assert source.call("PUT", "vm.resume") == (204, None)
    progress, received = moved(source, target, tmp_path / "m.sock")
    assert (list(progress["state"]), received) == (["Finished"], 204)
    assert target.call("GET", "vm.info")[1]["state"] == "Running"
    assert source.process.wait(LIMIT_S) == 0  # as a VMM does whose VM has gone


@pytest.mark.parametrize(
    ("fault", "reason", "state"),
    [
        ("setup:refused", "refused, as --fail asked", "Running"),
        ("setup:lost", "lost, as --fail asked", "Running"),
        ("precopy:lost", "lost, as --fail asked", "Running"),
        ("switchover:lost", "lost, as --fail asked", "Running"),
        ("commit:refused", "refused, as --fail asked", "Running"),
        ("commit:in-doubt", "no verdict within 1 s", "Paused"),
    ],
)
def test_a_migration_fails_in_the_phase_that_was_asked_for(
    fake_vmm: Start, tmp_path: Path, fault: str, reason: str, state: str
) -> None:
    source = booted(fake_vmm(f"send-migration={fault},times=1", options=["--deadlines", "commit=1"]))
    progress, received = moved(source, fake_vmm(), tmp_path / "m.sock")
    assert reason in progress["state"]["Failed"]["error_msg"]
    assert received == (204 if "in-doubt" in fault else 500)
    assert source.call("GET", "vm.info")[1]["state"] == state
    if state == "Running":  # once was asked for: the next one arrives
        progress, received = moved(source, fake_vmm(), tmp_path / "n.sock")
        assert (list(progress["state"]), received) == (["Finished"], 204)


def test_a_stalled_migration_stands_still_and_can_be_cancelled(fake_vmm: Start, tmp_path: Path) -> None:
    source = booted(fake_vmm("send-migration=stall:60s"))
    with receiving(fake_vmm(), tmp_path / "m.sock") as there:
        assert source.call("PUT", "vm.send-migration", {"destination_url": there.url}) == (204, None)
        until(lambda: phase(source) == "PRECOPY", "it does not begin")
        assert source.call("PUT", "vm.pause")[0] == 500  # the migration owns it
        assert source.call("PUT", "vm.cancel-migration") == (204, None)
        assert list(outcome(source)["state"]) == ["Cancelled"]
    assert state(source) == "Running"


def test_verbs_fail_on_cue_and_the_list_can_change(fake_vmm: Start) -> None:
    fake = fake_vmm("boot=error:no such disk,times=1", "info=delay:10ms", "pause=timeout")
    assert fake.call("PUT", "vm.create", FAKE_VM) == (204, None)
    status, said = fake.call("PUT", "vm.boot")
    assert (status, said) == (500, ["Error from API", "The VM could not boot", "no such disk"])
    assert fake.call("PUT", "vm.boot") == (204, None)
    status, said = fake.call("PUT", "vm.pause")
    assert (status, said[:2]) == (500, ["Error from API", "The VM could not be paused"])
    assert said[2].startswith("deadline pause (1 s) expired: ")
    assert fake.call("GET", "vm.info")[1]["state"] == "Running"
    assert fake.call("GET", "vmm.ping")[1]["fails"] == ["info=delay:0.01s", "pause=timeout"]
    fake.fail()
    assert fake.call("PUT", "vm.pause") == (204, None)
    with pytest.raises(ValueError, match="unknown verb"):
        fake.fail("nothing=error")
    assert fake.call("GET", "fake.faults") == (200, [])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_a_fault(fake_vmm: Start) -> None:
    fake = booted(fake_vmm("resume=error:stuck"))
    command = ["curl", "-s", "--max-time", "20", "--unix-socket", str(fake.socket), "-X", "PUT", "-w", "\n%{http_code}"]
    done = subprocess.run(
        [*command, "http://localhost/api/v1/vm.resume"], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    body, _, code = done.stdout.rpartition("\n")
    assert (json.loads(body), code) == (["Error from API", "The VM could not resume", "stuck"], "500")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pause", "unknown verb 'pause'"),
        ("resume=timeout", "unknown kind 'timeout' for resume; give error, delay"),
        ("send-migration=precopy:refused", "unknown kind 'refused' in phase precopy; give lost, stall"),
        ("send-migration=postcopy:lost", "unknown kind 'postcopy' for send-migration"),
        ("boot=delay:soon", "'soon' is not a time"),
        ("boot=delay:0s", "'0s' is not a time"),
        ("boot=error,times=0", "unknown option 'times=0'"),
        ("boot=error,often", "unknown option 'often'"),
    ],
)
def test_a_fault_that_makes_no_sense_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fault(text, VERBS)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["pause=timeout", "boot=error:no disk,times=3", "send-migration=precopy:stall:30s", "info=delay:0.5s"]
)
def test_a_fault_is_told_as_it_was_written(text: str) -> None:
    assert str(parse_fault(text, VERBS)) == text
