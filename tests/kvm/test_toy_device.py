"""A new device is one folder and one line: with them it is an option, a schema, in vm.info, is active, and moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from trivmm.guest import ProbeReport, parse_report, probe_cmdline, probe_path

ONE_LINE = "import trivmm.virtio.kinds as k; from trivmm.testing.toy.kind import TOY; k.KINDS.append(TOY)"
PROGRAM = f"{ONE_LINE}; import sys; from trivmm.__main__ import start; sys.exit(start())"
TOY_ID = 0x1040 + 63
LIMIT_S = 120


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=60, check=False)


def test_it_is_an_option_with_help() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--toy src=FILE[,id=…]" in done.stdout
    assert "a toy, for tests" in done.stdout
    assert "--toy" not in subprocess.run(
        [sys.executable, "-m", "trivmm", "--help"], capture_output=True, text=True, timeout=60, check=False
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--toy", "colour=red"], "--toy colour"),
        (["--toy", "src=/nowhere"], 'toys.src = "/nowhere": cannot open it'),
        (["--toy", "pci_segment=1"], "toys[0].pci_segment = 1: not supported yet"),
        (["--toy", "id=__x"], "toys.id"),
        (["--toy", "id=a", "--toy", "id=a"], 'id = "a": two devices have this id'),
    ],
)
@pytest.mark.kvm
def test_its_mistakes_are_one_line(words: list[str], said: str) -> None:
    done = run("--kernel", str(probe_path()), "--serial", "null", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_its_schema_and_its_place_in_a_saved_configuration() -> None:
    """In a process of its own: tables are made when they are imported, after the one line."""
    source = f"""
{ONE_LINE}
import json
from trivmm import DiskConfig, PayloadConfig, VmConfig
from trivmm.control.contract import markdown_not_yet
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError
from trivmm.state.setup import config_from_setup, config_to_setup
from trivmm.testing.toy.config import ToyConfig
from trivmm.virtio.kinds import sections
config = load_config({{"payload": {{"kernel": "k"}}, "toys": [{{"src": "a"}}, {{"id": "b"}}]}})
assert config.virtio == (ToyConfig("a"), ToyConfig(id="b")), config
dumped = dump_config(config)
assert [toy["src"] for toy in dumped["toys"]] == ["a", "/dev/urandom"]
assert load_config(dumped) == config
assert "| ToyConfig | `pci_segment`, `iommu` |" in markdown_not_yet()
try:
    load_config({{"toys": [{{}}, {{"id": 3}}]}})
except ConfigError as error:
    assert str(error).startswith("toys[1].id = 3"), error
else:
    raise AssertionError("it takes a number for an id")
there = json.loads(json.dumps(config_to_setup(config, sections())))
assert config_from_setup(there, sections()) == config
print("as it should be")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "as it should be\n", done.stderr


def program(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def ask(path: Path, verb: str, body: Any = None, method: str | None = None) -> Any:
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://localhost/api/v1/", timeout=60) as client:
        answer = client.request(method or ("GET" if body is None else "PUT"), verb, json=body)
    answer.raise_for_status()
    return answer.json() if answer.content else None


async def until(true: Any) -> Any:
    with trio.fail_after(LIMIT_S):
        while True:
            try:
                found = await trio.to_thread.run_sync(true)
            except httpx.TransportError:
                found = None
            if found:
                return found
            await trio.sleep(0.05)


@pytest.mark.kvm
async def test_the_probe_guest_activates_it_and_it_moves(tmp_path: Path) -> None:
    serial, there, here = tmp_path / "serial.txt", tmp_path / "b.sock", tmp_path / "a.sock"
    cmdline = probe_cmdline(cpus=1, mem=16, rate=300, report=100, cycle="rng", rng_id=TOY_ID)
    source = command(
        *("--api-socket", f"path={here}", "--kernel", str(probe_path()), "--cmdline", cmdline),
        *("--memory", "size=64M", "--serial", f"file={serial}", "--toy", "id=dice"),
    )
    target = command("--api-socket", f"path={there}")

    def report() -> ProbeReport:
        return parse_report(serial.read_text(errors="replace") if serial.exists() else "")

    def goes_on(since: ProbeReport) -> bool:
        now = report()
        return now.rng_act > since.rng_act + 2 and now.rng_ios > since.rng_ios

    with program(source) as a, program(target) as b:
        try:
            await until(lambda: report().rng_ios > 2)
            info = await until(lambda: ask(here, "vm.info"))
            assert [toy["id"] for toy in info["config"]["toys"]] == ["dice"]
            assert info["device_tree"]["dice"]["parent"] == "_virtio-pci-dice"
            await until(lambda: ask(there, "vmm.ping"))
            url = f"unix:{tmp_path}/move.sock"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    trio.to_thread.run_sync, lambda: ask(there, "vm.receive-migration", {"receiver_url": url})
                )
                await until((tmp_path / "move.sock").exists)
                ask(here, "vm.send-migration", {"destination_url": url})
            before = report()
            await until(lambda: goes_on(before))
            moved = ask(there, "vm.info")
            assert moved["config"] == json.loads(json.dumps(info["config"]))
            counters = ask(there, "vm.counters")["dice"]
            assert counters["activations"] > 0
            after = report()
            assert after.errors == 0
            assert not after.problems
        finally:
            a.kill()
            b.kill()
