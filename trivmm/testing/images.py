"""A disk's image as its queue workers use it, for tests and benchmarks, and QEMU's tool that judges it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from trivmm._native import ffi
from trivmm.config import DiskConfig
from trivmm.virtio.block.formats import open_image

__all__ = ["ImageDriver", "check", "content", "create", "qemu_img", "why_no_qemu_img"]

LIMIT_S = 120


def why_no_qemu_img() -> str:
    """Empty where it is installed."""
    return "" if shutil.which("qemu-img") else "qemu-img is not installed (Debian: apt install qemu-utils)"


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """:raises AssertionError: with what it said, if it ends with another code than one of ``accept``."""
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, errors="replace")
    assert done.returncode in accept, f"{command}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


def create(path: Path, size: int, options: str = "", backing: tuple[Path, str] | None = None) -> Path:
    """A qcow2 image with qemu-img's ``-o`` options, over ``backing``: a file of its folder, and that one's format."""
    extra = [] if backing is None else ["-b", backing[0].name, "-F", backing[1]]
    chosen = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *chosen, *extra, path, str(size))
    return path


def check(path: Path) -> None:
    """:raises AssertionError: qemu-img finds something wrong with a qcow2 image."""
    assert "No errors were found" in qemu_img("check", path).stdout


def content(path: Path) -> bytes:
    """What QEMU reads of an image; leaves a copy beside it."""
    raw = path.with_suffix(".content")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


class ImageDriver:
    """Calls an image's operations as ``ffi/block.c`` does. Any thread, several at a time."""

    def __init__(self, path: Path | str, *, lock: bool = True, **config: Any) -> None:
        """:raises ConfigError: the image can't be opened."""
        self.image = open_image(DiskConfig(str(path), **config), lock=lock)

    def close(self) -> None:
        self.image.close()

    def __enter__(self) -> ImageDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        return self.image.capacity

    def _move(self, name: str, data: Any, at: int, *flags: int) -> None:
        native, done, size = self.image.native, 0, len(data)
        vector = ffi.new("struct iovec *")
        while done < size:
            vector.iov_base, vector.iov_len = data + done, size - done
            moved = getattr(native.ops, name)(native, vector, 1, at + done, *flags)
            if moved <= 0:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            done += moved

    def read(self, at: int, length: int) -> bytes:
        """:raises OSError:"""
        data = ffi.new("char[]", length)
        self._move("read", data, at, 0)
        return bytes(ffi.buffer(data))

    def write(self, at: int, content: bytes) -> None:
        """:raises OSError:"""
        data = ffi.new("char[]", len(content))
        ffi.buffer(data)[:] = content
        self._move("write", data, at)

    def _clear(self, name: str, at: int, length: int, *flags: int) -> None:
        native, done = self.image.native, 0
        while done < length:
            moved = getattr(native.ops, name)(native, at + done, length - done, *flags)
            if moved <= 0:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            done += moved

    def discard(self, at: int, length: int) -> None:
        """:raises OSError:"""
        self._clear("discard", at, length)

    def zero(self, at: int, length: int, *, unmap: bool) -> None:
        """:raises OSError:"""
        self._clear("write_zeroes", at, length, int(unmap))

    def flush(self) -> None:
        """:raises OSError:"""
        native = self.image.native
        if native.ops.flush(native):
            raise OSError(ffi.errno, os.strerror(ffi.errno))
