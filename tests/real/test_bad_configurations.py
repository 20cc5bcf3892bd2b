"""What a configuration asks for and cannot have, said on the command line and over the API: one line that names it, and
nothing was started, made or left locked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from trivmm.cli.options import parse_vm
from trivmm.cli.parser import run_parser
from trivmm.config import DiskConfig
from trivmm.guest import probe_path
from trivmm.testing.control import command_environment
from trivmm.virtio.block.formats import open_image

LIMIT_S = 60
TRIVMM = [sys.executable, "-m", "trivmm"]
LONG = "s" * 120  # a unix socket's path has room for 107

# what it is: (options, how the one line begins)
MISTAKES: dict[str, tuple[list[str], str]] = {
    "two disks of one id": (["--disk", "path=a.img,id=x", "path=b.img,id=x"], 'id = "x": two devices have this id'),
    "a disk and the rng of one id": (["--disk", "path=a.img,id=x", "--rng", "src=/dev/urandom,id=x"], 'id = "x": two'),
    "an id of the VMM's own": (["--disk", "path=a.img,id=__rng"], 'disks.id = "__rng": '),
    "one image twice": (["--disk", "path=a.img", "path=a.img"], 'disks[1].path = "a.img": '),
    "a disk that another VM has": (["--disk", "path=locked.img"], 'disks.path = "locked.img": '),
    "a serial socket of too long a path": (["--serial", f"socket={LONG}"], f'serial.socket = "{LONG}": '),
    "a console socket of too long a path": (["--console", f"socket={LONG}"], f'console.socket = "{LONG}": '),
    "a serial socket where something else is": (["--serial", "socket=a.img"], 'serial.socket = "a.img": '),
    "a serial file in no folder": (["--serial", "file=no/where"], 'serial.file = "no/where": '),
    "one socket for both lines": (["--serial", "socket=s", "--console", "socket=s"], 'console.socket = "s": '),
    "a queue that can't be": (["--disk", "path=a.img,queue_size=3"], "disks.queue_size = 3: "),
    "no source of entropy": (["--rng", "src=."], 'rng.src = ".": '),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name in ("a.img", "b.img", "locked.img"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    image = open_image(DiskConfig(str(tmp_path / "locked.img")), lock=True)
    yield tmp_path
    image.close()


def left_as_it_was(folder: Path, also: set[str]) -> None:
    assert set(os.listdir(folder)) == {"a.img", "b.img", "locked.img"} | also
    for name in ("a.img", "b.img"):
        open_image(DiskConfig(str(folder / name)), lock=True).close()  # nobody has its lock


@pytest.mark.soft
@pytest.mark.parametrize("name", MISTAKES)
def test_on_the_command_line(folder: Path, name: str) -> None:
    pytest.importorskip("unicorn")
    words, said = MISTAKES[name]
    done = subprocess.run(
        [*TRIVMM, "--kernel", str(probe_path()), "--hypervisor", "soft", *words],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.stderr.startswith(f"error: {said}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 500
    assert (done.returncode, done.stdout) == (2, "")
    left_as_it_was(folder, set())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A VMM that serves, and whoever asks it."""
    pytest.importorskip("unicorn")
    socket = tmp_path_factory.mktemp("vmm") / "a.sock"
    process = subprocess.Popen(
        [*TRIVMM, "--api-socket", f"path={socket}", "--hypervisor", "soft"],
        env=command_environment(),
        stdin=subprocess.DEVNULL,
    )
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://v/api/v1/", timeout=60
    ) as client:
        try:
            until = time.monotonic() + LIMIT_S
            while not socket.exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            yield client
        finally:
            process.kill()
            process.wait(timeout=LIMIT_S)


def absolute(words: list[str], folder: Path) -> list[str]:
    """The same options, with paths that another process finds too."""
    made = []
    for word in words:
        keys = [key.partition("=") for key in word.split(",")]
        made.append(
            ",".join(
                f"{key}={folder}/{value}"
                if key in ("path", "socket", "file", "src") and value[:1] not in "/."
                else whole
                for whole, (key, _, value) in zip(word.split(","), keys, strict=True)
            )
        )
    return made


@pytest.mark.soft
@pytest.mark.parametrize("name", MISTAKES)
def test_over_the_api(folder: Path, served: httpx.Client, name: str) -> None:
    words, said = MISTAKES[name]
    there = ["--kernel", str(probe_path()), *absolute(words, folder)]
    body: dict[str, Any] = parse_vm(run_parser().parse(there))
    answer = served.put("vm.create", json=body)
    if answer.is_success:
        answer = served.put("vm.boot")
    assert answer.status_code in (400, 500)
    text = answer.text
    field = said.partition(" = ")[0].rpartition(".")[2]
    assert field in text, text
    assert "Traceback" not in text
    assert len(text) < 2000
    state = served.get("vm.info")
    if state.is_success:
        assert state.json()["state"] == "Created"
        assert served.put("vm.delete").is_success
    left_as_it_was(folder, set())
