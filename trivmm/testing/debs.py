"""Packages made for tests, honest and otherwise: an ar of a tar, in it what a kernel's package has."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import zstandard

VERSION = "6.1.0-test"
HOME = f"lib/modules/{VERSION}/kernel"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def ar(*members: tuple[str, bytes]) -> bytes:
    made = b"!<arch>\n"
    for name, data in members:
        made += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return made


def tar(files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def deb(path: Path, data: bytes, suffix: str = "") -> Path:
    packed = PACKERS[suffix](data)
    path.write_bytes(ar(("debian-binary", b"2.0\n"), ("control.tar", b"odd"), (f"data.tar{suffix}", packed)))
    return path


def module(*info: str) -> bytes:
    """An ELF with a ``.modinfo``."""
    content = b"".join(text.encode() + b"\0" for text in info)
    names = b"\0.shstrtab\0.modinfo\0"
    at = 64 + 3 * 64
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 1)
    sections = ((0, 0, 0), (1, at, len(names)), (11, at + len(names), len(content)))
    for name, offset, size in sections:
        head += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)
    return head + names + content


def program(*kinds: int) -> bytes:
    """An ELF with program headers of these kinds: PT_INTERP is 3."""
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(kinds), 0, 0, 0
    )
    return head + b"".join(struct.pack("<IIQQQQQQ", kind, 0, 0, 0, 0, 0, 0, 0) for kind in kinds)


KERNEL_FILES = {
    f"boot/vmlinuz-{VERSION}": b"the kernel",
    f"boot/config-{VERSION}": b"not wanted",
    f"lib/modules/{VERSION}/modules.builtin": b"kernel/net/packet/af_packet.ko\nkernel/drivers/acpi/button.ko\n",
    f"{HOME}/virtio_pci.ko": module("depends=virtio,virtio_ring", "alias=pci:v00001AF4d*", "license=GPL"),
    f"{HOME}/virtio.ko": module("depends="),
    f"{HOME}/virtio_ring.ko.xz": lzma.compress(module("depends=virtio")),
    f"{HOME}/virtio-rng.ko.zst": PACKERS[".zst"](module("depends=virtio", "softdep=pre: crc32c post: later")),
    f"{HOME}/crc32c-intel.ko": module("alias=crc32c"),
    f"{HOME}/isofs.ko.gz": gzip.compress(module("alias=fs-iso9660", "alias=not plain")),
    f"{HOME}/unused.ko": module("depends=virtio"),
}


def kernel_deb(folder: Path, **changes: bytes | None) -> Path:
    """``changes``: by a path's end, other content, or None for none."""
    files = dict(KERNEL_FILES)
    for end, data in changes.items():
        path = next((path for path in files if path.endswith(f"/{end}.ko")), f"{HOME}/{end}.ko")
        files.pop(path, None)
        if data is not None:
            files[path] = data
    return deb(folder / "linux.deb", tar(files), ".xz")


def busybox_deb(folder: Path) -> Path:
    return deb(folder / "busybox.deb", tar({"bin/busybox": program(1), "usr/share/doc/x": b"text"}), ".gz")
