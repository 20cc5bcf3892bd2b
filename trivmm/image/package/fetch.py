"""Where packages come from: files, URLs, and a distribution's own ``apt-get download``, which checks signatures.

What was fetched stays in a cache, under the name that its distribution gave it, and is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from trivmm.errors import ConfigError, TrivmmError, reason_of
from trivmm.image.output import replacing
from trivmm.image.package.deb import FIELD

if TYPE_CHECKING:
    import httpx

__all__ = ["BUSYBOX", "KERNEL", "FetchError", "cache_folder", "fetch_by_apt", "find_package"]

KERNEL: Final = "linux-image-cloud-amd64"  # depends on the kernel of the day
BUSYBOX: Final = "busybox-static"
MAX_PACKAGE: Final = 512 << 20  # bytes of a .deb: a distribution's largest kernel has a third of it
MAX_HOPS: Final = 10
MAX_SILENCE_S: Final = 30.0  # a server that says nothing for so long is given up, whatever is left of the limit
CHECKSUM: Final = "sha256="


class FetchError(TrivmmError):
    """It did not come: no network, no such package, no apt."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/trivmm``, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "trivmm"


def find_package(given: str, cache: Path, limit_s: float) -> Path:
    """A file's path as it is; a URL's file, fetched at most once. ``https://…``, or with the content's own sum,
    ``http://…#sha256=HEX``. :raises ConfigError: / :raises FetchError:"""
    if "://" not in given:
        return Path(given)
    try:
        url = urlsplit(given)
    except ValueError:
        raise ConfigError(FIELD, given, "not a URL", "give https://…/NAME.deb, or a file") from None
    name = url.path.rpartition("/")[2]
    wanted = url.fragment.removeprefix(CHECKSUM).lower() if url.fragment.startswith(CHECKSUM) else ""
    if url.scheme not in ("https", "http") or not name.endswith(".deb") or len(name) > 200:
        raise ConfigError(FIELD, given, "not the URL of a .deb", "give https://…/NAME.deb, or a file")
    if wanted and (len(wanted) != 64 or set(wanted) - set("0123456789abcdef")):
        raise ConfigError(FIELD, given, "not a SHA-256 sum", "give 64 hexadecimal digits after #sha256=")
    if url.scheme == "http" and not wanted:
        raise ConfigError(FIELD, given, "anybody on the way can change it", "give https://, or #sha256=SUM after it")
    origin = hashlib.sha256(given.encode(errors="replace")).hexdigest()[:16]
    place = _made(cache / origin) / name
    if not place.exists():
        with replacing(FIELD, place) as partial:
            _download(given.partition("#")[0], partial, wanted, limit_s)
    return place


def _download(url: str, to: Path, wanted: str, limit_s: float) -> None:
    import httpx

    ends = time.monotonic() + limit_s
    digest, size = hashlib.sha256(), 0
    try:
        with httpx.Client(timeout=min(limit_s, MAX_SILENCE_S)) as client, ExitStack() as stack:
            answer = _follow(client, stack, url, secure=not wanted)
            with to.open("wb") as file:
                for piece in answer.iter_raw():
                    size += len(piece)
                    if size > MAX_PACKAGE:
                        raise FetchError(f"{url}: larger than a package may be ({MAX_PACKAGE >> 20} MiB)")
                    if time.monotonic() > ends:
                        raise FetchError(f"{url}: deadline fetch ({limit_s:g} s) expired after {size} bytes")
                    digest.update(piece)
                    file.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{url}: {str(error).partition(chr(10))[0] or type(error).__name__}") from error
    if wanted and digest.hexdigest() != wanted:
        raise FetchError(f"{url}: its SHA-256 sum is {digest.hexdigest()}, not the one that was given")


def _follow(client: httpx.Client, stack: ExitStack, url: str, *, secure: bool) -> httpx.Response:
    """What ``url`` leads to, its body not read yet, nor that of any answer on the way: a server could say there
    whatever it likes. ``secure``: nobody on the way can answer for it. :raises FetchError:"""
    request = client.build_request("GET", url)
    for _ in range(MAX_HOPS):
        if secure and request.url.scheme != "https":
            raise FetchError(f"{url}: it leads to {request.url}, where anybody on the way can change it")
        answer = client.send(request, stream=True)
        stack.callback(answer.close)
        if answer.next_request is None:
            answer.raise_for_status()
            return answer
        request = answer.next_request
    raise FetchError(f"{url}: it leads on and on; {MAX_HOPS} addresses were asked")


def fetch_by_apt(package: str, cache: Path, limit_s: float) -> Path:
    """The newest that apt knows, from the cache if it is there; ``KERNEL`` stands for what it depends on.

    :raises FetchError: in apt's words."""
    if package == KERNEL:
        depends = _apt(["apt-cache", "depends", KERNEL], None, limit_s).splitlines()
        names = [line.split()[-1] for line in depends if line.strip().startswith("Depends: linux-image-")]
        if not names:
            raise FetchError(f"apt knows no {KERNEL}: run apt-get update as root, or give a kernel's .deb")
        package = names[0]
    printed = _apt(["apt-get", "download", "--print-uris", package], None, limit_s).split()
    name = next((word for word in printed if word.endswith(".deb")), "")  # 'URL' NAME SIZE SUM
    if not name or "/" in name:
        raise FetchError(f"apt does not say where {package} is: run apt-get update as root, or give its .deb")
    place = _made(cache) / name
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            _apt(["apt-get", "download", package], Path(folder), limit_s)
            came = Path(folder) / name
            if not came.is_file():
                raise FetchError(f"apt-get download {package} did not bring {name}")
            came.replace(place)
    return place


def _apt(command: Sequence[str], folder: Path | None, limit_s: float) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{' '.join(command)}: deadline fetch ({limit_s:g} s) expired") from error
    except OSError as error:
        remedy = "give the .deb files: this is no Debian"
        raise FetchError(f"{command[0]}: {reason_of(error)}; {remedy}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise FetchError(f"{' '.join(command)}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--cache", str(folder), reason_of(error), "give a folder that can be written") from error
    return folder
