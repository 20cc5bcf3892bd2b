"""The command line in processes of its own: one line for each mistake, its exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import trivmm as trivmm_package
from trivmm.hypervisor.select import SOFT_REQUIREMENT
from trivmm.testing.control import ch_remote, command_environment

LIMIT_S = 60
TRIVMM = [sys.executable, "-m", "trivmm"]


def trivmm(*arguments: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIVMM, *arguments],
        cwd=folder,
        env=command_environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@contextmanager
def serving(folder: Path, *arguments: str, command: Sequence[str] = TRIVMM) -> Iterator[subprocess.Popen[str]]:
    """A VMM that serves on a.sock in ``folder``; ended by the test, or else killed."""
    process = subprocess.Popen(
        [*command, "--api-socket", "path=a.sock", *arguments],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_it_serves(folder / "a.sock", process)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def wait_until_it_serves(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        try:
            ch_remote(str(path), "GET", "vmm.ping")
            return
        except OSError:
            time.sleep(0.05)  # it is starting; nothing tells us when but the socket itself
    raise AssertionError("it does not serve")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernl", "x"], "--kernl: unknown option; did you mean --kernel?"),
        (["run", "--kernel"], "argument --kernel: expected one argument"),
        (["frobnicate"], "frobnicate: unknown command"),
        (["run"], "nothing to do"),
        (["--fs", "tag=t,socket=s"], "--fs: not supported yet"),
        (["--firmware=x", "--kernel=k"], 'payload.firmware = "x": there is a kernel too; give one of them'),
        (["--memory", "size=1G"], "--memory: there is no --kernel and no --firmware"),
        (["--kernel", "k", "--memory", "size=0"], "memory.size = 0: no memory; give a size such as 512M"),
        (["--kernel", "k", "--memory", "size=1"], "memory.size = 1: not a multiple"),
        (["--kernel", "k", "--cpus", "boot=0"], "cpus.boot_vcpus = 0: out of range"),
        (["--kernel", "k", "--cpus", "boot=999"], "cpus.boot_vcpus = 999: out of range"),
        (["--kernel", "k", "--cpus", "boot"], '--cpus boot = "": no value'),
        (["--kernel", "k", "--console", "ptty"], '--console = "ptty": no such mode'),
        (["--kernel", "k", "--seccomp", "true"], '--seccomp = "true": there is no seccomp filter yet'),
        (["--kernel", "k", "--deadlines", "paus=1"], '--deadlines paus = "1": unknown key; did you mean pause?'),
        (["--kernel", "k", "--log-file", "no/where"], '--log-file = "no/where": No such file or directory'),
        (["--api-socket", "x.sock", "--log-file", ""], '--log-file = "": No such file or directory'),
        (["--api-socket", "path="], '--api-socket = "path=": no path'),
        (["--api-socket", "pth=a.sock"], '--api-socket pth = "a.sock": unknown key; did you mean path?'),
        (["--api-socket", "no/where/a.sock", "--hypervisor", "soft"], '--api-socket = "no/where/a.sock": cannot make'),
        (["--api-socket", "fd=x"], '--api-socket fd = "x": not a number'),
        (["--api-socket", "fd=0", "--hypervisor", "soft"], '--api-socket = "fd=0": the descriptor is a pipe; pass a'),
        (["remote", "--api-socket", "fd=3", "ping"], '--api-socket = "fd=3": a server is asked by its path'),
        (["--api-socket", "a.sock", "--hypervisor", "xen"], '--hypervisor = "xen": unknown hypervisor'),
        (["remote", "ping"], "--api-socket: missing"),
        (["remote", "--api-socket", "x", "pong"], "pong: unknown verb; did you mean ping?"),
        (["remote", "--api-socket", "x", "snapshot"], "snapshot: not supported yet"),
        (["remote", "--api-socket", "x", "resize"], "resize: give --cpus, --memory or --balloon"),
        (["remote", "--api-socket", "x", "pause", "--cpus", "2"], "pause: --cpus, --memory and --balloon belong to"),
        (["--api-socket", "a.sock", "--event-monitor", "out"], '--event-monitor out = "": unknown key'),
        (["--api-socket", "a.sock", "--event-monitor", "fd=77"], "--event-monitor fd = 77: not open"),
        (
            ["--api-socket", "a.sock", "--event-monitor", "path=no/where/x"],
            '--event-monitor path = "no/where/x": cannot',
        ),
        (["remote", "--api-socket", "x", "pause", "--force"], "pause: --force belongs to resolve-migration"),
        (["remote", "--api-socket", "x", "pause", "now"], "pause now: the verb takes no argument"),
        (["remote", "--api-socket", "x", "send-migration"], "send-migration: give destination_url="),
        (["remote", "--api-socket", "x", "add-disk"], "add-disk: give path=FILE"),
        (["remote", "--api-socket", "x", "add-disk", "readonly=on"], 'add-disk = "readonly=on": no path'),
        (["remote", "--api-socket", "x", "add-disk", "path=d,pth=e"], 'add-disk pth = "e": unknown key; did you mean'),
        (["remote", "--api-socket", "x", "remove-device"], "remove-device: give the ID of a device"),
        (["remote", "--api-socket", "x", "add-vdpa", "path=/d"], "add-vdpa: not supported yet"),
        (["remote", "--api-socket", "x", "create", "nofile"], "create nofile: No such file or directory"),
        (["doctor", "--jsn"], "--jsn: unknown option; did you mean --json?"),
        (["demo", "--moves", "many"], "argument --moves: invalid int value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = trivmm(*arguments, folder=tmp_path)
    assert done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert os.listdir(tmp_path) == []


def test_a_log_that_nobody_reads_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = trivmm("--api-socket", "x.sock", "--log-file", "fifo", folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith('error: --log-file = "fifo": No such device'), done.stderr
    assert os.listdir(tmp_path) == ["fifo"]


@pytest.mark.soft
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel", "missing"], 'payload.kernel = "missing": '),
        (["--kernel", "text"], 'payload.kernel = "text": not an ELF'),
        (["--kernel", "."], 'payload.kernel = ".": '),
        (["--kernel", "text", "--disk", "path=gone"], 'disks.path = "gone": '),
        (["--kernel", "text", "--disk", "path=."], 'disks.path = ".": '),
        (["--kernel", "text", "--memory", "size=512T"], "memory.size = "),
    ],
)
def test_a_mistake_found_at_boot_is_the_same(tmp_path: Path, arguments: list[str], said: str) -> None:
    pytest.importorskip("unicorn")
    (tmp_path / "text").write_text("not a kernel, though long enough to look at: " * 10)
    done = trivmm(*arguments, "--api-socket", "path=a.sock", "--hypervisor", "soft", folder=tmp_path)
    assert done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert os.listdir(tmp_path) == ["text"]


def test_help_and_version(tmp_path: Path) -> None:
    for arguments in ([], ["--help"], ["remote", "--help"], ["doctor", "--help"], ["demo", "--help"], ["--version"]):
        done = trivmm(*arguments, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "trivmm" in done.stdout


def test_a_tree_that_was_never_built_says_so_in_one_line(tmp_path: Path) -> None:
    package = Path(trivmm_package.__file__).parent
    shutil.copytree(package, tmp_path / "trivmm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ended = subprocess.run(
        [*TRIVMM, "--kernel", "x"],
        env={**command_environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}: not built here; `pip install")
    assert ended.stderr.count("\n") == 1


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


HEAVY = {"trio", "httpx", "h11", "cattrs", "rich", "zstandard", "unicorn", "asyncio"}


@pytest.mark.parametrize(
    ("statement", "also"),
    [
        ("import trivmm", {"attrs", "trivmm._native", "argparse"}),
        ("main([])", {"trivmm._native"}),
        ("main(['--help'])", {"trivmm._native"}),
        ("main(['--version'])", {"trivmm._native"}),
        ("main(['--kernl', 'x'])", {"trivmm._native"}),
        ("main(['remote', '--help'])", {"trivmm._native"}),
        ("main(['remote', '--api-socket', 'x', 'ping'])", {"trivmm._native"}),
        ("main(['demo', '--help'])", {"trivmm._native"}),
        ("main(['doctor'])", set[str]()),
    ],
)
def test_light_commands_are_light(tmp_path: Path, statement: str, also: set[str]) -> None:
    """What draws, serves or computes is imported by who does it."""
    wanted = "" if statement.startswith("import") else "from trivmm.cli import main\n"
    code = (
        f"import sys, contextlib\n{wanted}with contextlib.suppress(SystemExit): {statement}\nprint('\\n', *sys.modules)"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "trivmm" in loaded
    assert not (HEAVY | also) & loaded


def test_doctor_draws_a_table_also_into_a_pipe(tmp_path: Path) -> None:
    done = trivmm("doctor", folder=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["what", "there", "what", "for", "remedy"]
    assert any(line.startswith("unicorn (soft CPU)") for line in lines)
    assert lines[-1].startswith("guests ")
    assert (done.returncode == 0) == ("can't" not in lines[-1])


def test_doctor(tmp_path: Path) -> None:
    done = trivmm("doctor", "--json", folder=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["runs"] else 1)
    for row in report["rows"]:
        assert row["present"] or row["remedy"], row


def test_without_unicorn_the_remedy_is_a_command_for_this_python(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m pip install {SOFT_REQUIREMENT}"
    hidden = "import sys; sys.modules['unicorn'] = None; from trivmm.cli import main; sys.exit(main({}))"
    done = python(hidden.format(["doctor", "--json"]), tmp_path)
    report = json.loads(done.stdout)
    assert not report["soft"]
    assert [row["remedy"] for row in report["rows"] if row["what"].startswith("unicorn")] == [command]
    done = python(hidden.format(["--api-socket", "a.sock", "--hypervisor", "soft"]), tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.rstrip().endswith(f"; {command}")


@pytest.mark.soft
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_signals_end_a_server_and_leave_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    pytest.importorskip("unicorn")
    with serving(tmp_path, "--hypervisor", "soft") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, err) == (code, "", "")
    assert os.listdir(tmp_path) == []


WEDGED = """
import sys, time
from contextlib import asynccontextmanager

import trio

import trivmm.vmm
from trivmm.cli import main

whole = trivmm.vmm.open_vmm


@asynccontextmanager
async def wedged(*arguments, **options):
    async with whole(*arguments, **options) as vmm:
        try:
            yield vmm
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(time.sleep, 300, thread_name="a wedged worker")


trivmm.vmm.open_vmm = wedged
sys.exit(main())
"""


@pytest.mark.soft
def test_a_thread_that_never_ends_does_not_keep_the_process(tmp_path: Path) -> None:
    pytest.importorskip("unicorn")
    options = ("--hypervisor", "soft", "--deadlines", "shutdown_grace=0.5")
    with serving(tmp_path, *options, command=[sys.executable, "-c", WEDGED]) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: deadline shutdown_grace (0.5 s) expired: still there: ")
    assert "a wedged worker" in err
    assert err.count("\n") == 1


@pytest.mark.soft
def test_remote_drives_a_server(tmp_path: Path) -> None:
    pytest.importorskip("unicorn")
    with serving(tmp_path, "--hypervisor", "soft") as process:

        def remote(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
            return trivmm("remote", "--api-socket", "a.sock", *arguments, folder=tmp_path, stdin=stdin)

        assert json.loads(remote("ping").stdout)["pid"] == process.pid
        second = trivmm("--api-socket", "path=a.sock", "--hypervisor", "soft", folder=tmp_path)
        assert second.returncode == 2
        assert "in use by another process" in second.stderr
        done = remote("info")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: Error from API: The VM info is not available: VM is not created")
        (tmp_path / "vm.json").write_text(json.dumps({"payload": {"kernel": "/nowhere/vmlinux"}}))
        assert remote("create", "vm.json").returncode == 0
        assert json.loads(remote("info").stdout)["state"] == "Created"
        for name in ("one", "two"):
            assert remote("add-disk", f"path={name}.img,id={name}").returncode == 0
        assert remote("remove-device", "one").returncode == 0
        assert [disk["id"] for disk in json.loads(remote("info").stdout)["config"]["disks"]] == ["two"]
        done = remote("remove-device", "one")
        assert done.returncode == 1
        assert 'no device with id "one"' in done.stderr
        assert remote("remove-device", "two").returncode == 0
        done = remote("boot")
        assert done.returncode == 1
        assert 'payload.kernel = "/nowhere/vmlinux": ' in done.stderr
        assert done.stderr.count("\n") == 1
        assert remote("delete").returncode == 0
        assert remote("create", stdin='{"payload":[]}').returncode == 1
        assert remote("create", stdin=json.dumps({"payload": {"kernel": "k"}})).returncode == 0
        assert "counters: the VM is Created" in remote("counters").stderr
        assert remote("shutdown-vmm").returncode == 0
        assert process.wait(timeout=LIMIT_S) == 0
    assert os.listdir(tmp_path) == ["vm.json"]
    done = remote("ping")
    assert done.returncode == 1
    assert "is a VMM serving there?" in done.stderr


def test_remote_does_not_wait_for_ever(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "a.sock"))
        silent.listen()
        done = trivmm("remote", "--api-socket", "a.sock", "--timeout", "0.2", "ping", folder=tmp_path)
    assert done.returncode == 1
    assert "no answer to vmm.ping within 0.2 s" in done.stderr
