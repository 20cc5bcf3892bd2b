"""cloud-init's NoCloud seed: a small read-only disk that a guest finds by its label, CIDATA.

https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html: ``user-data`` and ``meta-data`` are always
there, ``network-config`` and ``vendor-data`` where they were given. cloud-init does its work once for each instance-id;
where no meta-data is given that is a sum of the rest, so a seed with new content is a new instance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from trivmm.errors import ConfigError
from trivmm.image.extra import read_file
from trivmm.image.iso9660 import SECTOR, iso9660, label_of
from trivmm.image.output import replacing

__all__ = ["SEED_FILES", "make_seed", "write_seed"]

LABEL: Final = "CIDATA"
USER, META = "user-data", "meta-data"
SEED_FILES: Final = (USER, META, "network-config", "vendor-data")
MAX_PART: Final = 16 << 20  # bytes: cloud-init keeps all of it in memory
HEAD: Final = 17 * SECTOR


def make_seed(files: Mapping[str, bytes], time: int) -> bytes:
    """An image of any of :data:`SEED_FILES`. ``time`` in seconds since 1970."""
    whole = {USER: b"", **files}
    if META not in whole:
        digest = hashlib.sha256()
        for name in sorted(whole):
            digest.update(b"%s %d\n" % (name.encode(), len(whole[name])) + whole[name])
        whole[META] = f"instance-id: iid-{digest.hexdigest()[:16]}\n".encode()
    return iso9660(LABEL, whole, time)


def write_seed(option: str, parts: Mapping[str, Path], to: Path, time: int) -> None:
    """The seed of these files, unless it is there already. Only another seed is replaced, and whoever has that open
    keeps it. :raises ConfigError: in the words of ``option``."""
    files = {}
    for name, path in parts.items():
        files[name], _ = read_file(f"{option} {name}", path)
        if len(files[name]) > MAX_PART:
            raise ConfigError(f"{option} {name}", str(path), "too large", f"give at most {MAX_PART >> 20} MiB")
    seed = make_seed(files, time)
    if to.is_file() and to.stat().st_size:
        old, _ = read_file(f"{option} path", to)
        if old == seed:
            return
        if label_of(old[:HEAD]) != LABEL:
            raise ConfigError(f"{option} path", str(to), "there is something else than a seed", "give another path")
    with replacing(f"{option} path", to) as partial:
        partial.write_bytes(seed)
