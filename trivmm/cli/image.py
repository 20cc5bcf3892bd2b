"""``trivmm image``: a kernel and an initramfs of a distribution's packages, without root."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from trivmm.cli.options import parse_deadlines
from trivmm.cli.parser import Parser, UsageError
from trivmm.errors import ConfigError, reason_of
from trivmm.image.cpio import cpio
from trivmm.image.extra import add_extra, read_file
from trivmm.image.output import replacing, source_date
from trivmm.image.package.fetch import BUSYBOX, KERNEL, cache_folder, fetch_by_apt, find_package
from trivmm.image.userland import find_kernel, find_parts, make_tree

__all__ = ["image"]

ABOUT = """\
Makes FOLDER/vmlinuz and FOLDER/initramfs of a distribution's packages: a kernel's (linux-image-…, with its modules) and
busybox-static's. The guest loads the drivers of every device, asks for a network address, and shows a login prompt on
the serial port and on virtio-console. The same packages and options give the same bytes."""


def image(arguments: Sequence[str]) -> int:
    """Gives 0. :raises ConfigError: / :raises UsageError: / :raises FetchError:"""
    parser = Parser("trivmm image", ABOUT)
    parser.add_argument("packages", metavar="PACKAGE", nargs="*", help="a .deb: a file, or a URL (…#sha256=SUM)")
    parser.add_argument("--into", metavar="FOLDER", help="where they are made")
    parser.add_argument("--fetch", action="store_true", help=f"what is missing by apt-get: {KERNEL}, {BUSYBOX}")
    parser.add_argument("--module", metavar="NAME", action="append", default=[], help="one more that is loaded at boot")
    parser.add_argument("--add", metavar="FILE:/PATH", action="append", default=[], help="a file or folder of yours")
    parser.add_argument("--run", metavar="FILE", help="a program or script that the guest runs before the login prompt")
    parser.add_argument("--gzip", action="store_true", help="pack the initramfs (smaller, slower under emulation)")
    parser.add_argument("--cache", metavar="FOLDER", help="where fetched packages stay (~/.cache/trivmm)")
    parser.add_argument("--deadlines", metavar="fetch=SECONDS", nargs="+", action="extend", default=[])
    given = parser.parse(arguments)
    if given.into is None:
        raise UsageError("nowhere to make it; give --into FOLDER")
    if not given.packages and not given.fetch:
        raise UsageError(f"no packages; give the .deb files of {KERNEL}'s kernel and {BUSYBOX}, or --fetch")
    limit_s = parse_deadlines(given.deadlines).fetch
    cache = Path(given.cache) if given.cache is not None else cache_folder()

    packages = [find_package(package, cache, limit_s) for package in given.packages]
    if given.fetch:
        there = set().union(*map(find_parts, packages))
        for part, package in (("kernel", KERNEL), ("busybox", BUSYBOX)):
            if part not in there:
                packages.append(fetch_by_apt(package, cache, limit_s))
    time = source_date()
    kernel, busybox = find_kernel(packages)
    tree = make_tree(kernel, busybox, given.module)
    for extra in given.add:
        add_extra(tree, extra)
    if given.run is not None:
        tree.file("etc/run", read_file("--run", Path(given.run))[0], 0o755)

    into = Path(given.into)
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--into", given.into, reason_of(error), "give a folder that can be written") from error
    archive = b"".join(cpio(tree, time))
    if given.gzip:
        archive = gzip.compress(archive, mtime=0)
    for name, data in (("vmlinuz", kernel.image), ("initramfs", archive)):
        with replacing("--into", into / name) as partial:
            partial.write_bytes(data)
    print(f"{into / 'vmlinuz'}: Linux {kernel.version}, {len(kernel.image) / (1 << 20):.1f} MiB")
    print(f"{into / 'initramfs'}: {len(archive) / (1 << 20):.1f} MiB, {sum(1 for _ in tree)} entries")
    return 0
