"""A newc archive, which Linux unpacks as its initramfs. Pure.

Source: its Documentation/driver-api/early-userspace/buffer-format.rst. Not packed: the kernel reads it where the VMM
has put it, and unpacking is dear on a CPU that is emulated.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from typing import Final

from trivmm.image.tree import Entry

__all__ = ["cpio"]

END: Final = "TRAILER!!!"


def cpio(entries: Iterable[Entry], time: int) -> Iterator[bytes]:
    """The archive, piece by piece. ``time``: of every entry, in seconds since 1970."""
    for number, entry in enumerate(entries, 1):
        yield from _member(entry, number, time)
    yield from _member(Entry(END, 0), 0, 0)


def _member(entry: Entry, number: int, time: int) -> Iterator[bytes]:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, time, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    yield head + bytes(-len(head) % 4)
    yield entry.data + bytes(-len(entry.data) % 4)
