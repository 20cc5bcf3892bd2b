"""A guest's userland of two packages: a kernel's, for its modules, and a static busybox.

The initramfs is the whole system: ``/init`` (``files/init``) mounts, loads the drivers of every device that TriVMM has,
asks for an address on each network interface, and leaves a login prompt on the serial port and on virtio-console.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from trivmm.errors import ConfigError
from trivmm.image.package.deb import FIELD, MAX_FILE, MAX_UNPACKED, read_deb
from trivmm.image.package.modinfo import Module, canonical, read_module
from trivmm.image.package.modules import Modules
from trivmm.image.package.packed import Damaged, open_packed
from trivmm.image.tree import Tree

__all__ = ["Kernel", "find_kernel", "find_parts", "make_tree"]

# Loaded at boot, as far as this kernel has them as modules: a driver for each device, and what uses it.
DRIVERS: Final = (
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "nd_pmem",
    "virtio_pmem",
    "pvpanic_pci",
    "button",
    "evdev",
    "af_packet",
)
# There for whoever mounts something, by modprobe.
ON_DEMAND: Final = (
    "ext4",
    "isofs",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
    "nls_iso8859_1",
    "overlay",
    "loop",
    "squashfs",
)
FOLDERS: Final = ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "mnt", "root", "etc/acpi/PWRF")
SCRIPTS: Final = {
    "init": "init",
    "etc/start": "start",
    "etc/udhcpc": "udhcpc",
    "etc/acpi/PWRF/00000080": "powerbutton",
}
TEXTS: Final = ("passwd", "group", "hostname", "issue", "profile")
VMLINUZ: Final = "vmlinuz-"
MODULE_ENDS: Final = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
MAX_TOLD: Final = 16 << 20  # characters of names and aliases, of all modules: a distribution has a fifth
MAX_VERSION: Final = 64  # characters: Linux's own limit for what uname says
ELF_PROGRAM: Final = struct.Struct("<I")
PT_INTERP: Final = 3


@attrs.frozen
class Kernel:
    """``image``: its bzImage. ``builtin``: the text of ``modules.builtin``. ``sources``: where each loadable module is,
    by its path without what it is packed by: (package, path in it)."""

    version: str
    image: bytes = attrs.field(repr=False)
    modules: Modules = attrs.field(repr=False)
    builtin: str = attrs.field(repr=False)
    sources: dict[str, tuple[Path, str]] = attrs.field(repr=False)


def find_parts(package: Path) -> set[str]:
    """What an initramfs needs of it: ``kernel``, ``modules``, ``busybox``. :raises ConfigError: it is damaged."""
    return {part for path, _ in read_deb(package, lambda path: _part(path) is not None) if (part := _part(path))}


def _part(path: str) -> str | None:
    if path.startswith(f"boot/{VMLINUZ}"):
        return "kernel"
    if path in ("bin/busybox", "usr/bin/busybox"):
        return "busybox"
    return "modules" if path.removeprefix("usr/").startswith("lib/modules/") and path.endswith(MODULE_ENDS) else None


def find_kernel(packages: Iterable[Path]) -> tuple[Kernel, bytes]:
    """The kernel and the busybox in them. :raises ConfigError: there is not one of each, or a package lies."""
    images: dict[str, bytes] = {}
    busyboxes: list[bytes] = []
    loadable: dict[str, Module] = {}
    sources: dict[str, tuple[Path, str]] = {}
    builtin = ""
    told = unpacked = 0
    for package in packages:
        for path, data in read_deb(package, _is_wanted):
            try:
                match _part(path):
                    case "kernel":
                        images[path.rpartition(VMLINUZ)[2]] = data
                        _only("kernel", "linux-image-…", list(images.values()))  # before more of them fill the memory
                    case "busybox":
                        busyboxes.append(_static(data))
                        _only("busybox", "busybox-static", busyboxes)
                    case "modules":
                        plain, content = _unpacked(path.removeprefix("usr/"), data)
                        unpacked += len(content)
                        if unpacked > MAX_UNPACKED:
                            raise Damaged(f"its modules unpack to more than {MAX_UNPACKED >> 20} MiB")
                        module = read_module(plain, content)
                        told += module.told
                        if told > MAX_TOLD:
                            raise Damaged(f"its modules say more than {MAX_TOLD >> 20} MiB of themselves")
                        loadable[module.name] = module
                        sources[module.path] = package, path
                    case None:
                        builtin = data.decode(errors="replace")
            except Damaged as error:
                raise ConfigError(FIELD, str(package), f"{path}: {error}", "fetch it again") from error
    return _kernel(images, loadable, sources, builtin), _only("busybox", "busybox-static", busyboxes)


def _kernel(
    images: dict[str, bytes], loadable: dict[str, Module], sources: dict[str, tuple[Path, str]], builtin: str
) -> Kernel:
    image = _only("kernel", "linux-image-…", list(images.values()))
    version = next(iter(images))
    if not version.isprintable() or "/" in version or not 0 < len(version) <= MAX_VERSION:
        raise ConfigError(FIELD, version, "no version of a kernel", "give a distribution's package")
    home = f"lib/modules/{version}/"
    strange = next((path for path in sources if not path.startswith(home)), None)
    if strange is not None:
        raise ConfigError(FIELD, strange, f"not a module of kernel {version}", "give packages of one kernel")
    own = {name: attrs.evolve(module, path=module.path.removeprefix(home)) for name, module in loadable.items()}
    names = frozenset(canonical(PurePosixPath(line).stem) for line in builtin.splitlines() if line.endswith(".ko"))
    return Kernel(
        version,
        image,
        Modules(own, names),
        builtin,
        {path.removeprefix(home): source for path, source in sources.items()},
    )


def _only(what: str, package: str, found: Sequence[bytes]) -> bytes:
    if len(found) != 1:
        problem = f"there is no {what} in them" if not found else f"there is more than one {what} in them"
        raise ConfigError(FIELD, len(found), problem, f"give one package with it ({package}.deb), or --fetch alone")
    return found[0]


def _is_wanted(path: str) -> bool:
    return _part(path) is not None or (path.endswith("/modules.builtin") and "lib/modules/" in path)


def _unpacked(path: str, data: bytes) -> tuple[str, bytes]:
    """A module without what it is packed by. :raises Damaged:"""
    if path.endswith(".ko"):
        return path, data
    plain, _, suffix = path.rpartition(".")
    source = open_packed(_Bytes(data), f".{suffix}", MAX_FILE)
    parts = []
    while part := source.read(MAX_FILE):
        parts.append(part)
    return plain, b"".join(parts)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def read(self, size: int, /) -> bytes:
        piece, self._data = bytes(self._data[:size]), self._data[size:]
        return piece


def _static(data: bytes) -> bytes:
    """:raises Damaged: it wants a dynamic linker, and there will be none."""
    try:
        (start,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
        kinds = [ELF_PROGRAM.unpack_from(data, start + number * size)[0] for number in range(count)]
    except (struct.error, OverflowError) as error:  # an offset beyond what a file may have
        raise Damaged("not a program") from error
    if not data.startswith(b"\x7fELF\x02") or PT_INTERP in kinds:
        raise Damaged("not a static program for x86-64; busybox-static's is")
    return data


def make_tree(kernel: Kernel, busybox: bytes, modules: Sequence[str] = ()) -> Tree:
    """The system; ``modules`` are loaded at boot beside those of the devices. :raises ConfigError: there is none such,
    or the package's modules don't fit together."""
    tree = Tree()
    for folder in FOLDERS:
        tree.folder(folder)
    tree.folder("tmp", 0o1777)
    tree.character_device("dev/console", 5, 1)
    tree.file("bin/busybox", busybox, 0o755)
    tree.link("bin/sh", "busybox")
    ours = files("trivmm.image").joinpath("files")
    for path, name in SCRIPTS.items():
        tree.file(path, ours.joinpath(name).read_bytes(), 0o755)
    for name in TEXTS:
        tree.file(f"etc/{name}", ours.joinpath(name).read_bytes())
    tree.file("etc/shadow", ours.joinpath("shadow").read_bytes(), 0o600)
    home = f"lib/modules/{kernel.version}"
    try:
        loaded = kernel.modules.in_order([*kernel.modules.some(DRIVERS), *kernel.modules.find(modules)])
        names = [module.name for module in loaded]
        carried = kernel.modules.in_order([*names, *kernel.modules.some(ON_DEMAND)])
        tree.file(f"{home}/modules.dep", kernel.modules.dep(carried).encode())
    except Damaged as error:
        raise ConfigError(FIELD, kernel.version, str(error), "fetch it again") from error
    tree.file(f"{home}/modules.alias", kernel.modules.alias(carried).encode())
    tree.file(f"{home}/modules.builtin", kernel.builtin.encode())
    tree.file("etc/modules", "".join(f"{module.path}\n" for module in loaded).encode())
    _add_modules(tree, home, kernel, carried)
    return tree


def _add_modules(tree: Tree, home: str, kernel: Kernel, carried: Iterable[Module]) -> None:
    wanted: dict[Path, dict[str, str]] = {}
    for module in carried:
        package, path = kernel.sources[module.path]
        wanted.setdefault(package, {})[path] = module.path
    for package, paths in wanted.items():
        for path, data in read_deb(package, paths.__contains__):
            tree.file(f"{home}/{paths[path]}", _unpacked(path, data)[1])
