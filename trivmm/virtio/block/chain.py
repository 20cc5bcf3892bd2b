"""The files behind a qcow2 image: which it may name, and opening them.

An image names the file that is read where it has nothing itself, and that file may be an image that names another. Who
hands over such an image decides with it what a guest can read of this host. So:

- No file behind an image is opened whose own format was guessed: a guest that writes a qcow2 header into its raw disk,
  which is taken for what it looks like the next time, gains nothing but its own bytes.
- They lie beneath the image's own folder, unless ``backing_files=on`` says that they may lie anywhere; the kernel sees
  to it, with symbolic links and all (``openat2`` with ``RESOLVE_BENEATH``).
- Each says the format of the next one, raw or qcow2: a guess could be forged by a guest that once wrote into it.
- There are at most :data:`DEPTH`, all different.

They are opened for reading, and locked so: several VMs may have one in common, and nobody who locks writes to it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, Final

import attrs

from trivmm._native import ffi, lib
from trivmm.config import DiskConfig
from trivmm.errors import ConfigError, NotSupported, reason_of
from trivmm.virtio.block.file import ImageFile

__all__ = ["Link", "Place", "open_chain", "probe", "wrong"]

DEPTH: Final = 10  # Cloud Hypervisor's limit
ANYWHERE: Final = "/"


@attrs.frozen
class Header:
    """What a qcow2 header says. ``size`` of the disk and ``cluster``: bytes. ``backing``: name and format, empty where
    not said."""

    size: int
    cluster: int
    backing: tuple[bytes, bytes]


@attrs.define(eq=False)
class Link:
    """``header`` None: a raw file."""

    file: ImageFile
    header: Header | None


@attrs.frozen
class Place:
    """``folder`` is where the files behind an image may lie. None: nowhere, its format was guessed."""

    folder: str | None

    @classmethod
    def of(cls, config: DiskConfig) -> Place:
        if config.image_type != "Qcow2":
            return cls(None)
        return cls(
            ANYWHERE if config.backing_files else os.path.realpath(os.path.dirname(os.path.abspath(config.path)))
        )


class _BehindFile(ImageFile):
    """``inside`` is its path from ``folder_fd`` on, which is open while this is made."""

    def __init__(self, path: str, folder_fd: int, inside: str, place: Place) -> None:
        self._inside, self._folder_fd, self._place = inside, folder_fd, place
        super().__init__(path, readonly=True, lock=False)

    def _open(self, more: int = 0) -> int:
        if self._place.folder == ANYWHERE:
            return super()._open(more)
        fd = int(lib.tv_open_beneath(self._folder_fd, os.fsencode(self._inside)))
        if fd >= 0:
            return fd
        number = ffi.errno
        if number == errno.EXDEV:
            where = f"lies outside {self._place.folder}"
            raise ConfigError(
                "disks.path", self.path, f"this backing file {where}", "give backing_files=on if you trust the image"
            )
        if number in (errno.ENOSYS, errno.EPERM):
            remedy = "convert the image (qemu-img convert -O qcow2 OLD NEW): it has none then"
            raise NotSupported("disks.path", self.path, "this host has no openat2 to open backing files with", remedy)
        why = reason_of(OSError(number, os.strerror(number)))
        raise ConfigError("disks.path", self.path, f"this backing file can't be opened ({why})", "put it in its place")


def wrong(file: ImageFile, error: Any) -> ConfigError:
    """What ``struct tv_qcow2_error`` says of it."""

    def text(field: Any) -> str:
        return bytes(ffi.buffer(field)).partition(b"\0")[0].decode(errors="replace")

    kind = NotSupported if b"not supported yet" in bytes(ffi.buffer(error.problem)) else ConfigError
    problem = f"qcow2: {text(error.field)} is {text(error.value)}: {text(error.problem)}"
    return kind("disks.path", file.path, problem, text(error.remedy))


def probe(file: ImageFile) -> Header:
    """Its header, checked. :raises ConfigError: it is none."""
    header, error = ffi.new("struct tv_qcow2_header *"), ffi.new("struct tv_qcow2_error *")
    if lib.tv_qcow2_probe(file.fd, header, error):
        raise wrong(file, error)
    return Header(
        header.size, 1 << header.cluster_bits, (ffi.string(header.backing_name), ffi.string(header.backing_format))
    )


def open_chain(file: ImageFile, place: Place, *, lock: bool) -> tuple[Link, ...]:
    """``file``, a qcow2 image, and what is behind it. If this raises, ``file`` is all that is open.

    :raises ConfigError: naming the file at fault."""
    links = [Link(file, probe(file))]
    folder_fd = -1
    try:
        where = os.path.realpath(os.path.dirname(os.path.abspath(file.path)))
        while (header := links[-1].header) is not None and header.backing[0]:
            name, said = (os.fsdecode(each) for each in header.backing)
            last = links[-1].file
            if place.folder is None:
                problem = "has a backing file, which is not opened for an image whose format was guessed"
                raise ConfigError("disks.path", last.path, problem, "give image_type=qcow2 if you trust the image")
            if folder_fd < 0:
                folder_fd = os.open(place.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _check_format(last, said)
            if len(links) > DEPTH:
                remedy = "merge some of them (qemu-img rebase, qemu-img commit)"
                raise ConfigError("disks.path", file.path, f"more than {DEPTH} backing files behind it", remedy)
            path = os.path.join(where, name.removeprefix("file:"))
            behind = _BehindFile(path, folder_fd, _inside(path, place.folder, last), place)
            links.append(Link(behind, None))
            _check_new(links)
            if lock:
                behind.take_lock()
            links[-1].header = probe(behind) if said == "qcow2" else None
            where = os.path.dirname(path)
    except BaseException:
        for link in links[1:]:
            link.file.close()
        raise
    finally:
        if folder_fd >= 0:
            os.close(folder_fd)
    return tuple(links)


def _check_format(file: ImageFile, said: str) -> None:
    if not said:
        remedy = "say it (qemu-img rebase -u -F raw|qcow2 -b BACKING IMAGE)"
        raise ConfigError("disks.path", file.path, "does not say which format its backing file has", remedy)
    if said not in ("raw", "qcow2"):
        remedy = "convert it (qemu-img convert -O qcow2 OLD NEW)"
        problem = f"its backing file's format is {said!r:.40}, and only raw and qcow2 are supported yet"
        raise NotSupported("disks.path", file.path, problem, remedy)


def _inside(path: str, folder: str, file: ImageFile) -> str:
    """``path`` from ``folder`` on, as it is spelled: what its ".." and links lead to is the kernel's to say."""
    prefix = folder.rstrip("/") + "/"
    if not path.startswith(prefix):
        raise ConfigError(
            "disks.path", file.path, f"its backing file {path!r:.120} lies outside {folder}", "give backing_files=on"
        )
    return path.removeprefix(prefix).lstrip("/") or "."


def _check_new(links: list[Link]) -> None:
    """:raises ConfigError: the last one is one of the others."""
    abouts = [os.fstat(link.file.fd) for link in links]
    last = abouts[-1]
    for each, link in zip(abouts[:-1], links, strict=False):
        if (each.st_dev, each.st_ino) == (last.st_dev, last.st_ino) and not stat.S_ISBLK(each.st_mode):
            problem = "names itself as its backing file" if link is links[-2] else "is its own backing file, by detours"
            raise ConfigError("disks.path", link.file.path, problem, "give it the right one (qemu-img rebase -u -b …)")
