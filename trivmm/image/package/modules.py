"""Which modules a guest gets, in which order they are loaded, and the tables by which ``modprobe`` finds them. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping

import attrs

from trivmm.errors import ConfigError
from trivmm.image.package.modinfo import Module, canonical
from trivmm.image.package.packed import Damaged

__all__ = ["Modules"]


@attrs.frozen
class Modules:
    """All that a kernel has: what can be loaded, by name, and the names of what is built in."""

    loadable: Mapping[str, Module]
    builtin: frozenset[str]

    def find(self, names: Iterable[str]) -> list[str]:
        """Those of them that can be loaded. :raises ConfigError: one that this kernel does not have at all."""
        found = []
        for name in map(canonical, names):
            if name in self.loadable:
                found.append(name)
            elif name not in self.builtin:
                near = difflib.get_close_matches(name, self.loadable, n=1)
                remedy = f"did you mean {near[0]}?" if near else "give a name as modprobe takes it"
                raise ConfigError("--module", name, "this kernel has no such module", remedy)
        return found

    def some(self, names: Iterable[str]) -> list[str]:
        """Those of them that can be loaded; a kernel may have some built in, and others not at all."""
        return [name for name in map(canonical, names) if name in self.loadable]

    def in_order(self, names: Iterable[str]) -> list[Module]:
        """These and all that they need, each after what it needs. :raises Damaged: that is not there, or a circle."""
        done: dict[str, Module] = {}
        for name in names:
            self._take(name, done)
        return list(done.values())

    def _take(self, name: str, done: dict[str, Module]) -> None:
        """Depth first, without recursion: a stranger's package says how deep it goes."""
        path = {name: self._wants(name)} if name not in done else {}
        while path:
            current = next(reversed(path))
            wanted, is_needed = next(path[current], ("", False))
            if not wanted:
                done[current] = self.loadable[current]
                del path[current]
            elif wanted in path and is_needed:
                raise Damaged(f"module {wanted[:80]} needs itself")
            elif wanted not in path and wanted not in done:
                path[wanted] = self._wants(wanted)

    def _wants(self, name: str) -> Iterator[tuple[str, bool]]:
        """(what is to be loaded before it, whether it can't do without)."""
        module = self.loadable[name]
        for needed in module.needs:
            if needed in self.loadable:
                yield needed, True
            elif needed not in self.builtin:
                raise Damaged(f"module {name[:80]} needs {needed[:80]}, which is not there")
        for wish in module.wishes:
            named = canonical(wish)
            yield from (
                (each.name, False) for each in self.loadable.values() if named == each.name or wish in each.aliases
            )

    def dep(self, taken: Iterable[Module]) -> str:
        """``modules.dep``: a module's path, and those of all that is loaded before it, the last one first."""
        lines = []
        for module in sorted(taken, key=lambda each: each.name):
            before = self.in_order([module.name])[-2::-1]
            lines.append(f"{module.path}:{''.join(f' {each.path}' for each in before)}\n")
        return "".join(lines)

    @staticmethod
    def alias(taken: Iterable[Module]) -> str:
        """``modules.alias``, by which a device or the kernel's own wish (``fs-iso9660``) finds its module."""
        ordered = sorted(taken, key=lambda module: module.name)
        return "".join(f"alias {alias} {module.name}\n" for module in ordered for alias in module.aliases)
