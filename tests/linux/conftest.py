"""A distribution's kernel, as a stranger gets it: fetched by apt, a bzImage, with an initramfs around init.c."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

PACKAGE = "linux-image-cloud-amd64"
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "gcc", "xz")
LIMIT_S = 600
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio-rng",
    "button",
    "evdev",
    "virtio_console",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_balloon",
    "libnvdimm",
    "nd_btt",
    "nd_pmem",
    "nd_virtio",
    "virtio_pmem",
    "pvpanic",
    "pvpanic-pci",
)


def run(*command: str, folder: Path, data: bytes | None = None) -> bytes:
    done = subprocess.run(command, cwd=folder, input=data, capture_output=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def fetch_kernel(folder: Path) -> Path:
    """The unpacked package. Skips where there is no apt, or nowhere to fetch from."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} to fetch and unpack a kernel")
    try:
        depends = run("apt-cache", "depends", PACKAGE, folder=folder).decode()
        package = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line)
    except (OSError, StopIteration) as error:
        pytest.skip(f"cannot fetch {PACKAGE}: {error}")
    return fetch(folder, package)


def fetch(folder: Path, package: str) -> Path:
    """An unpacked package; skips as above."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"needs apt-get and dpkg-deb to fetch {package}")
    try:
        run("apt-get", "download", package, folder=folder)
    except OSError as error:
        pytest.skip(f"cannot fetch {package}: {error}")
    run("dpkg-deb", "-x", next(folder.glob("*.deb")).name, "root", folder=folder)
    return folder / "root"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Fetches one by its name."""
    return lambda name: fetch(tmp_path_factory.mktemp(name), name)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(f"{number:08x}".encode() for number in numbers) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def make_initramfs(root: Path, init: Path, into: Path) -> None:
    """A newc archive: Linux's Documentation/driver-api/early-userspace/buffer-format.rst."""
    parts = [_entry(name, 0o40755) for name in ("dev", "modules")]
    parts += [_entry("dev/console", 0o20600, device=(5, 1)), _entry("init", 0o100755, init.read_bytes())]
    for name in MODULES:
        for file in root.glob(f"**/{name}.ko*"):
            raw = file.read_bytes()
            data = run("xz", "-dc", folder=root, data=raw) if file.suffix == ".xz" else raw
            parts.append(_entry(f"modules/{name}.ko", 0o100644, data))
    into.write_bytes(b"".join(parts) + _entry("TRAILER!!!", 0))


@attrs.frozen
class Linux:
    """``files``: a tree of them, of the package's own."""

    kernel: Path
    initramfs: Path
    files: Path


@pytest.fixture(scope="session")
def linux_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_kernel(tmp_path_factory.mktemp("linux"))


def _linux(root: Path, folder: Path, init: str) -> Linux:
    """With an init of this folder's."""
    files = next(root.glob("lib/modules/*/kernel/crypto"))
    found = Linux(next(root.glob("boot/vmlinuz-*")), folder / "initramfs", files)
    run("gcc", "-O1", "-static", "-o", str(folder / "init"), str(Path(__file__).with_name(init)), folder=folder)
    make_initramfs(root, folder / "init", found.initramfs)
    return found


def _fixture(init: str) -> Any:
    @pytest.fixture(scope="session")
    def linux_with_init(linux_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Linux:
        return _linux(linux_root, tmp_path_factory.mktemp(init.removesuffix(".c")), init)

    return linux_with_init


linux = _fixture("init.c")
linux_vsock = _fixture("vsock_init.c")
linux_disk = _fixture("init_disk.c")
linux_devices = _fixture("devices.c")
linux_events = _fixture("events.c")
linux_platform = _fixture("platform.c")
