"""``trivmm image`` and ``--cloud-init`` as a user types them, on packages that are made here."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import lzma
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from trivmm.cli import main
from trivmm.cli.run import parse_run
from trivmm.errors import ConfigError
from trivmm.image import userland
from trivmm.image.package import fetch
from trivmm.image.package.fetch import FetchError, fetch_by_apt, find_package
from trivmm.image.tree import Entry
from trivmm.image.userland import find_kernel, make_tree
from trivmm.testing import debs

LIMIT_S = 20.0


def tree_of(*packages: Path, modules: tuple[str, ...] = ()) -> dict[str, Entry]:
    kernel, busybox = find_kernel(packages)
    return {entry.path: entry for entry in make_tree(kernel, busybox, modules)}


def test_the_userland_has_what_a_guest_needs(tmp_path: Path) -> None:
    found = tree_of(debs.kernel_deb(tmp_path), debs.busybox_deb(tmp_path))
    home = f"lib/modules/{debs.VERSION}"
    assert found["etc/modules"].data.decode().splitlines() == [
        "kernel/virtio.ko",
        "kernel/virtio_ring.ko",
        "kernel/virtio_pci.ko",
        "kernel/crc32c-intel.ko",
        "kernel/virtio-rng.ko",
    ]
    assert found[f"{home}/kernel/virtio_ring.ko"].data == debs.module("depends=virtio")  # unpacked
    assert f"{home}/kernel/unused.ko" not in found
    assert f"{home}/kernel/isofs.ko" in found  # there for who mounts one, not loaded
    assert "alias fs-iso9660 isofs\n" in found[f"{home}/modules.alias"].data.decode()
    dep = found[f"{home}/modules.dep"].data.decode()
    assert "kernel/virtio_pci.ko: kernel/virtio_ring.ko kernel/virtio.ko\n" in dep
    assert found["init"].mode & 0o111
    assert found["etc/shadow"].mode & 0o077 == 0
    more = tree_of(debs.kernel_deb(tmp_path), debs.busybox_deb(tmp_path), modules=("unused", "button"))
    assert more["etc/modules"].data.endswith(b"kernel/unused.ko\n")


def test_a_kernel_may_come_in_two_packages(tmp_path: Path) -> None:
    image = {path: data for path, data in debs.KERNEL_FILES.items() if path.startswith("boot/")}
    modules = {f"usr/{path}": data for path, data in debs.KERNEL_FILES.items() if not path.startswith("boot/")}
    parts = [debs.deb(tmp_path / "a.deb", debs.tar(image)), debs.deb(tmp_path / "b.deb", debs.tar(modules), ".zst")]
    assert tree_of(*parts, debs.busybox_deb(tmp_path)) == tree_of(debs.kernel_deb(tmp_path), debs.busybox_deb(tmp_path))


def test_packages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    kernel, busybox = debs.kernel_deb(tmp_path), debs.busybox_deb(tmp_path)
    with pytest.raises(ConfigError, match="there is no busybox in them"):
        tree_of(kernel)
    with pytest.raises(ConfigError, match="there is no kernel in them"):
        tree_of(busybox)
    with pytest.raises(ConfigError, match="more than one busybox"):
        tree_of(kernel, busybox, busybox)
    dynamic = debs.deb(tmp_path / "dynamic.deb", debs.tar({"usr/bin/busybox": debs.program(1, 3)}))
    with pytest.raises(ConfigError, match="not a static program"):
        tree_of(kernel, dynamic)
    other = debs.deb(tmp_path / "other.deb", debs.tar({"lib/modules/5.0/kernel/x.ko": debs.module()}))
    with pytest.raises(ConfigError, match=f"not a module of kernel {debs.VERSION}"):
        tree_of(kernel, busybox, other)
    with pytest.raises(ConfigError, match="virtio needs gone, which is not there"):
        tree_of(debs.kernel_deb(tmp_path, virtio=debs.module("depends=gone")), busybox)
    with pytest.raises(ConfigError, match=r"virtio\.ko: not a module"):
        tree_of(debs.kernel_deb(tmp_path, virtio=b"\x7fELF" + bytes(100)), busybox)
    files = debs.KERNEL_FILES | {f"{debs.HOME}/virtio_ring.ko.xz": b"odd"}
    with pytest.raises(ConfigError, match=r"virtio_ring\.ko\.xz: can't be unpacked"):
        tree_of(debs.deb(tmp_path / "odd.deb", debs.tar(files)), busybox)


def made_by(folder: Path, *options: str) -> dict[str, bytes]:
    packages = (str(debs.kernel_deb(folder)), str(debs.busybox_deb(folder)))
    assert main(["image", *packages, "--into", str(folder / "made"), *options]) == 0
    return {path.name: path.read_bytes() for path in (folder / "made").iterdir()}


def test_the_command_makes_the_same_bytes_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, extra = tmp_path / "run", tmp_path / "motd"
    script.write_text("#!/bin/sh\n")
    extra.write_text("hello\n")
    options = ("--run", str(script), "--add", f"{extra}:/etc/motd", "--module", "unused")
    made = made_by(tmp_path, *options)
    assert set(made) == {"vmlinuz", "initramfs"}
    assert made["vmlinuz"] == b"the kernel"
    for part in (b"hello\n", b"etc/run\0", b"unused.ko\0"):
        assert part in made["initramfs"]
    extra.touch()
    assert made_by(tmp_path, *options) == made
    assert gzip.decompress(made_by(tmp_path, *options, "--gzip")["initramfs"]) == made["initramfs"]
    assert f"Linux {debs.VERSION}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "no packages"),
        (("--fetch",), "nowhere to make it"),
        (("/none.deb",), 'package = "/none.deb": No such file'),
        (("/proc/self/mem",), "package"),
        (("http://host/x.deb",), "anybody on the way can change it"),
        (("https://host/x.zip",), "not the URL of a .deb"),
        (("http://[x/a.deb",), "not a URL"),
        (("ftp://host/x.deb",), "not the URL of a .deb"),
        (("https://host/x.deb#sha256=12",), "not a SHA-256 sum"),
        (("--fetch", "--deadlines", "fetch=0"), "deadlines.fetch"),
        (("--fetc",), "did you mean --fetch?"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], why: str
) -> None:
    into = () if why == "nowhere to make it" else ("--into", str(tmp_path / "made"))
    assert main(["image", *options, *into, "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not (tmp_path / "made").exists()


# --- fetching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """Gives the URL of a package with that content; there is nothing else on it."""
    served: dict[str, bytes] = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = served.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    def serve(data: bytes) -> str:
        served["/pool/x.deb"] = data
        return f"http://127.0.0.1:{listener.server_port}/pool/x.deb"

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    yield serve
    listener.shutdown()
    thread.join()
    listener.server_close()


def _left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file()]


def test_a_url_is_fetched_once_and_checked(
    tmp_path: Path, server: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    url = f"{server(b'good')}#sha256={hashlib.sha256(b'good').hexdigest()}"
    assert find_package(url, cache, LIMIT_S).read_bytes() == b"good"
    server(b"changed")
    assert find_package(url, cache, LIMIT_S).read_bytes() == b"good"
    wrong = f"{server(b'bad')}#sha256={'0' * 64}"
    with pytest.raises(FetchError, match="its SHA-256 sum is"):
        find_package(wrong, cache, LIMIT_S)
    with pytest.raises(FetchError, match="404"):
        find_package(wrong.replace("/pool/", "/other/"), cache, LIMIT_S)
    with pytest.raises(FetchError, match="deadline fetch"):
        _late(wrong, cache, monkeypatch)
    monkeypatch.setattr(fetch, "MAX_PACKAGE", 2)
    with pytest.raises(FetchError, match="larger than a package may be"):
        find_package(wrong, cache, LIMIT_S)
    assert _left_in(cache) == ["x.deb"]


def _late(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is past the deadline at the first piece."""
    with monkeypatch.context() as patch:
        ticks = iter((0.0, LIMIT_S + 1))
        patch.setattr(fetch.time, "monotonic", lambda: next(ticks, LIMIT_S + 1))
        find_package(url, cache, LIMIT_S)


def _fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch, download: str) -> None:
    tools = folder / "tools"
    tools.mkdir()
    scripts = {
        "apt-cache": 'echo linux-image-cloud-amd64; echo "  Depends: linux-image-6.1-cloud"',
        "apt-get": f"""[ "$2" = --print-uris ] && {{ echo "'http://x/$3.deb' $3_1%3a2.deb 12 SHA256:0"; exit; }}
{download}""",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")


def test_apt_is_asked_for_the_kernel_of_the_day_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_apt(tmp_path, monkeypatch, 'echo "$2" > "$2_1%3a2.deb"')
    cache = tmp_path / "cache"
    place = fetch_by_apt(fetch.KERNEL, cache, LIMIT_S)
    assert place == cache / "linux-image-6.1-cloud_1%3a2.deb"
    assert place.read_text() == "linux-image-6.1-cloud\n"
    place.write_text("kept")
    assert fetch_by_apt(fetch.KERNEL, cache, LIMIT_S).read_text() == "kept"
    assert _left_in(cache) == [place.name]


@pytest.mark.parametrize(
    ("download", "why"),
    [
        ("echo 'E: no network' >&2; exit 100", "E: no network"),
        ("true", "did not bring"),
        ('echo half > "$2_1%3a2.deb"; exit 1', "exit code 1"),
    ],
)
def test_what_apt_says_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: str, why: str
) -> None:
    _fake_apt(tmp_path, monkeypatch, download)
    with pytest.raises(FetchError, match=why):
        fetch_by_apt(fetch.BUSYBOX, tmp_path / "cache", LIMIT_S)
    assert _left_in(tmp_path / "cache") == []


def test_without_apt_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"give the \.deb files"):
        fetch_by_apt(fetch.BUSYBOX, tmp_path / "cache", LIMIT_S)


def test_an_apt_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_apt(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(FetchError, match=r"deadline fetch \(0\.5 s\) expired"):
        fetch_by_apt(fetch.BUSYBOX, tmp_path / "cache", 0.5)
    assert _left_in(tmp_path / "cache") == []


# --- the seed's option ----------------------------------------------------------------------------------------------


def test_a_seed_is_the_last_disk_and_is_there_once_the_options_are_right(tmp_path: Path) -> None:
    user, seed = tmp_path / "user-data", tmp_path / "seed"
    user.write_bytes(b"#cloud-config\n")
    option = f"user-data={user},path={seed}"
    with pytest.raises(ConfigError, match="memory"):
        parse_run(["--kernel", "k", "--cloud-init", option, "--memory", "size=3M"])
    assert not seed.exists()
    config = parse_run(["--kernel", "k", "--disk", f"path={user}", "--cloud-init", option]).config
    assert config is not None
    assert [disk.path for disk in config.disks] == [str(user), str(seed)]
    assert config.disks[1].readonly
    assert config.disks[1].image_type == "Raw"
    assert seed.exists()


def test_a_seed_wants_a_vm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cloud-init", "user-data=x", "--api-socket", "path=/none"]) == 2
    assert "--cloud-init: there is no --kernel" in capsys.readouterr().err


class Endless(httpx.SyncByteStream):
    """A body that never ends."""

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield bytes(1 << 20)


LEADS = {
    "https://plain/x.deb": "http://b/x.deb",
    "http://b/x.deb": "https://c/x.deb",
    "https://round/x.deb": "https://round/x.deb",
    "https://good/x.deb": "https://c/x.deb",
}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("https://plain/x.deb", r"it leads to http://b/x\.deb"),
        ("HTTPS://plain/x.deb", r"it leads to http://b/x\.deb"),
        ("https://round/x.deb", "on and on"),
    ],
)
def test_where_an_address_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, why: str) -> None:
    """Each is looked at before it is asked, and what comes with a redirection is not read."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        lead = LEADS.get(asked[-1])
        if lead:
            return httpx.Response(302, headers={"location": lead}, stream=Endless())
        return httpx.Response(200, stream=httpx.ByteStream(b"a package"))

    monkeypatch.setattr(httpx, "Client", functools.partial(httpx.Client, transport=httpx.MockTransport(answer)))
    with pytest.raises(FetchError, match=why):
        find_package(given, tmp_path / "cache", LIMIT_S)
    assert not [each for each in asked if each.startswith("http:")]
    assert find_package("https://good/x.deb", tmp_path / "cache", LIMIT_S).read_bytes() == b"a package"


def test_a_package_of_many_kernels_is_given_up_at_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    only = userland._only

    def noted(what: str, package: str, found: Sequence[bytes]) -> bytes:
        kept.append(len(found))
        return only(what, package, found)

    monkeypatch.setattr(userland, "_only", noted)
    kernels = {f"boot/vmlinuz-{number}": b"k" for number in range(20)}
    with pytest.raises(ConfigError, match="more than one kernel"):
        find_kernel([debs.deb(tmp_path / "k.deb", debs.tar(kernels))])
    assert kept == [1, 2]


@pytest.mark.parametrize(
    ("limit", "why"), [("MAX_TOLD", "say more than 0 MiB of themselves"), ("MAX_UNPACKED", "unpack to more than 0 MiB")]
)
def test_what_all_modules_say_and_unpack_to_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, why: str
) -> None:
    """Each alone is small."""
    content = lzma.compress(debs.module("alias=pci:v1", "alias=" + "a" * 400))
    modules = {f"{debs.HOME}/m{number}.ko.xz": content for number in range(20)}
    package = debs.deb(tmp_path / "m.deb", debs.tar(modules))
    monkeypatch.setattr(userland, limit, 4000)
    with pytest.raises(ConfigError, match=why):
        find_kernel([package])
