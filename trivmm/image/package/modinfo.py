"""What a kernel module says of itself: the ``.modinfo`` section of its ELF (``key=value`` strings, each with its zero).

A package has no ``modules.dep``: depmod makes it where the kernel is installed, from exactly this. Every offset is
checked: the file is a stranger's.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from trivmm.image.package.packed import Damaged

__all__ = ["Module", "canonical", "read_module"]

ELF_64_LE: Final = b"\x7fELF\x02\x01\x01"
SECTION: Final = struct.Struct("<IIQQQQIIQQ")
MAX_SECTIONS: Final = 4096
MAX_INFO: Final = 1 << 20  # bytes: aliases of a module for a thousand devices have a hundredth of it


@attrs.frozen
class Module:
    """``path`` in the package, without what it is packed by; names in the spelling of :func:`canonical`. ``wishes``:
    what should be loaded before it, if it is there; a module's name or an alias."""

    path: str
    needs: tuple[str, ...]
    wishes: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def told(self) -> int:
        """Characters that are kept of it."""
        return sum(len(text) for texts in (self.needs, self.wishes, self.aliases) for text in texts)

    @property
    def name(self) -> str:
        return canonical(self.path.rpartition("/")[2].removesuffix(".ko"))


def canonical(name: str) -> str:
    """``virtio-rng`` and ``virtio_rng`` are the same module."""
    return name.replace("-", "_")


def read_module(path: str, data: bytes) -> Module:
    """:raises Damaged: no module."""
    found: dict[str, list[str]] = {}
    for raw in _modinfo(data).split(b"\0"):
        key, _, value = raw.partition(b"=")
        try:
            found.setdefault(key.decode(), []).append(value.decode())
        except UnicodeDecodeError:
            continue  # an author's name in Latin-1
    needs = tuple(canonical(name) for text in found.get("depends", ()) for name in text.split(",") if name)
    wishes = [word for text in found.get("softdep", ()) for word in _before(text)]
    return Module(path, needs, tuple(wishes), tuple(text for text in found.get("alias", ()) if _plain(text)))


def _plain(alias: str) -> bool:
    return bool(alias) and alias.isascii() and alias.isprintable() and " " not in alias


def _before(softdep: str) -> list[str]:
    """``pre: a b post: c``: a and b."""
    taken, names = False, []
    for word in softdep.split():
        if word.endswith(":"):
            taken = word == "pre:"
        elif taken:
            names.append(word)
    return names


def _modinfo(data: bytes) -> bytes:
    try:
        (offset,), (size, count, names) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HHH", data, 58)
        if not data.startswith(ELF_64_LE) or size != SECTION.size or not names < count <= MAX_SECTIONS:
            raise Damaged("not a module for this kind of CPU")
        sections = [SECTION.unpack_from(data, offset + number * size) for number in range(count)]
    except (struct.error, OverflowError) as error:  # an offset beyond what a file may have
        raise Damaged("a module that ends too early") from error
    strings = _content(data, sections[names])
    for section in sections:
        if strings[section[0] :].startswith(b".modinfo\0"):
            return _content(data, section)
    raise Damaged("a module that says nothing of itself")


def _content(data: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    if size > MAX_INFO or offset + size > len(data):
        raise Damaged("a module with a section outside of it")
    return data[offset : offset + size]
