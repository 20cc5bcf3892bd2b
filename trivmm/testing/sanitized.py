"""The Python tests of ``ffi/`` with the extension built under ASan and UBSan: ``trivmm.testing.fuzz --tests``.

The extension is built once for what it is made of and kept in the user's cache, beside links to the rest of the
package, which a Python with the sanitizers' libraries loaded first then imports. Leaks are not looked for: the
interpreter keeps what it likes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trivmm.errors import ConfigError

__all__ = ["TESTS", "build_extension", "run_tests"]

FLAGS: Final = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"
BUILD_LIMIT_S: Final = 600.0
RUN_LIMIT_S: Final = 3600.0
# Those in which C does the work: rings, workers, devices, lines, pages.
TESTS: Final = (
    "tests/unit/test_virtio_ring.py",
    "tests/unit/test_ring_model.py",
    "tests/real/test_queue_worker.py",
    "tests/real/test_every_device.py",
    "tests/real/test_virtio_devices.py",
    "tests/real/test_virtio_console.py",
    "tests/real/test_virtio_net.py",
    "tests/real/test_virtio_vsock.py",
    "tests/real/test_block_async.py",
    "tests/real/test_migration_pages_native.py",
)
# What setup.py does with the extension, and nothing else of it.
BUILD: Final = """\
import sys
sys.path.insert(0, "ffi")
import build_ffi
from setuptools import Distribution
from setuptools.command.build_ext import build_ext
extension = build_ffi.ffibuilder.distutils_extension(tmpdir=sys.argv[1])
extension.py_limited_api = True
command = build_ext(Distribution({"ext_modules": [extension], "name": "trivmm"}))
command.build_lib, command.build_temp = sys.argv[2], sys.argv[1]
command.ensure_finalized()
command.run()
"""


def build_extension(root: Path, cache: Path) -> Path:
    """Gives the folder that is to come first on Python's path. :raises ConfigError: it does not build."""
    digest = hashlib.sha256(FLAGS.encode() + sys.version.encode())
    for path in sorted((root / "ffi").glob("*.*")):
        digest.update(path.read_bytes())
    made = cache / f"extension-{digest.hexdigest()[:16]}"
    library = made / "trivmm"
    if not made.exists():
        for old in cache.glob("extension-*"):
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as folder:
            done = subprocess.run(
                [sys.executable, "-c", BUILD, f"{folder}/objects", f"{folder}/made"],
                cwd=root,
                env={**os.environ, "CFLAGS": FLAGS, "LDFLAGS": FLAGS},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_LIMIT_S,
            )
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "rror" in line), done.stderr[-200:])
                raise ConfigError("extension", "trivmm._native", f"does not build: {said}", "mend it")
            Path(folder, "made").rename(made)
    for entry in (root / "trivmm").iterdir():  # links, so that what is tested is what is there now
        link = library / entry.name
        if not entry.name.startswith("_native.") and not link.is_symlink():
            link.symlink_to(entry)
    return made


def run_tests(root: Path, cache: Path, compiler: Sequence[str], tests: Sequence[str] = TESTS) -> int:
    """pytest's exit code; what it says goes to stderr. :raises ConfigError: the extension does not build."""
    first = build_extension(root, cache)
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        asked = subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True, timeout=BUILD_LIMIT_S
        )
        libraries.append(asked.stdout.strip())
    environment = {
        **os.environ,
        "PYTHONPATH": str(first),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=environment, stdout=2, timeout=RUN_LIMIT_S).returncode
